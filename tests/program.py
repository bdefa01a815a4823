"""Runs a function of a test module in a process of its own, or in several of one group.

A process of its own is what W&B needs (its settings and files belong to a process), and what a launcher starts. Knows
nothing of what the function does: it calls it with a folder and some text, and hands back the JSON that it returns.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run_program(
    function: Callable[..., Any],
    folder: Path,
    *arguments: str | Path,
    launcher: Sequence[str] = PYTHON,
    timeout: float = 300,
    **environment: str,
) -> Any:
    """What ``function(folder, *arguments)`` returns in the first of the processes that a launcher starts."""
    name = f"{function.__module__}:{function.__name__}"
    started = subprocess.Popen(
        [*launcher, "-m", "tests.program", name, str(folder), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**without_wandb(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
    )
    try:
        output, errors = started.communicate(timeout=timeout)
    finally:
        started.terminate()  # a launcher then ends its processes; a process that has ended does not notice
        started.wait()
    assert started.returncode == 0, errors[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def without_wandb() -> dict[str, str]:
    """This process's environment without the W&B settings that `tests/conftest.py` makes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}


def run_offline_wandb(function: Callable[..., Any], folder: Path, *arguments: str | Path, **environment: str) -> Any:
    """As `run_program` in one process, with W&B offline: the files of its runs are in `folder`, complete."""
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    return run_program(function, folder, *arguments, **{**offline, **environment})


def leave_together(folder: Path) -> None:
    """
    End a process of a launched group once every other one is through with its work.

    A plain end does not do: torch 2.13 can hang when a gloo group is destroyed right after a collective, because its
    thread waits for the interpreter lock that the destructor holds. A barrier of the group does not do either: the
    process that passes it first and ends takes away the connection on which the other one still waits. So the
    processes wait for each other's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"done-{rank}").touch()
    while not all((folder / f"done-{other}").exists() for other in range(processes)):
        time.sleep(0.05)
    sys.stdout.flush()
    os._exit(0)


def main(name: str, folder: str, *arguments: str) -> None:
    module, function = name.split(":")
    told = getattr(importlib.import_module(module), function)(Path(folder), *arguments)
    if os.environ.get("RANK", "0") == "0":
        print("RESULT " + json.dumps(told, default=str), flush=True)
    if "RANK" in os.environ:
        leave_together(Path(folder))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
