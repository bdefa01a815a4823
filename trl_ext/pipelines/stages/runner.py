"""How jobs run: in this process, or in processes of their own that give all their memory back.

[`run_job`] runs one job. [`ThisProcess`] and [`OwnProcesses`] run several, for `run_stages`. A job is a function that
gets a function to report its progress with. This module knows jobs by name; it does not know what they do.

A process of its own is a fresh Python that imports this package (`worker`), not your script: a script needs no
`if __name__ == "__main__"` for it. It ends with the process that started it, however that one ends.
"""

import inspect
import io
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal, Protocol, get_args


# What is to be done: it gets a function to call with the share that is done, in `[0, 1]`, and returns its result.
Job = Callable[[Callable[[float], None]], Any]
OnProgress = Callable[[str, float], None]

Isolate = Literal["auto", "always", "never"]

_START = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__package__}.worker import main; main()"


class StageError(RuntimeError):
    """A stage cannot run, its process was killed, or its result cannot be kept. The message says what to do."""


class NotPortableError(ValueError):
    """A job holds something that another process cannot import or receive."""


def run_job(
    name: str,
    job: Job,
    isolate: Isolate = "auto",
    *,
    portable: bool = True,
    environment: Mapping[str, str] | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Any:
    """
    Run one job to its end.

    Args:
        name (`str`): what errors call it.
        job (`Callable`): the job; in a process of its own it travels by pickle, as does its result.
        isolate (`str`, *optional*, defaults to `"auto"`):
            `"always"` gives the job a process of its own, so that it leaves no memory behind; `"never"` runs it in
            this one; `"auto"` isolates it where there is a GPU and the job can travel.
        portable (`bool`, *optional*, defaults to `True`):
            Whether the job can travel. `False` for one that holds a model in memory.
        environment (`Mapping[str, str]`, *optional*):
            The environment variables of a process of its own. Those of this process by default.
        on_progress (`Callable[[float], None]`, *optional*): called with the share that is done, in `[0, 1]`.

    Returns:
        What the job returns.

    Raises:
        [`NotPortableError`]: `"always"`, and the job cannot travel.
        [`StageError`]: its process was killed.
        Exception: whatever the job raises, in either process, with the other process's traceback as a note.
    """
    check_isolate(isolate)
    if isolate == "always" and not portable:
        raise NotPortableError(
            f"The stage {name} cannot have a process of its own: it holds a model or a function in memory. Give "
            "models and reward functions by path or name, or set isolate='never'."
        )
    if isolate == "never" or not portable or (isolate == "auto" and not _on_gpu()):
        return job(on_progress)
    with OwnProcesses(1, environment=environment) as processes:
        try:
            processes.start(name, job)
        except NotPortableError:
            if isolate == "always":
                raise
            return job(on_progress)
        return processes.wait(lambda _, share: on_progress(share))[1]


def check_isolate(isolate: str) -> None:
    """Raise `ValueError` for a value that is no [`Isolate`]."""
    if isolate not in get_args(Isolate):
        raise ValueError(f"isolate={isolate!r} is not known. Needed: one of {', '.join(get_args(Isolate))}.")


def _on_gpu() -> bool:
    import torch  # here, so that a process for stages without it starts fast

    return torch.cuda.is_available()


class JobRunner(Protocol):
    """Runs jobs. At most as many are started as are `free`; `wait` gives them back as they end."""

    @property
    def free(self) -> int:
        """How many jobs can be started now."""

    def start(self, name: str, job: Job) -> None:
        """Start a job."""

    def wait(self, on_progress: OnProgress) -> tuple[str, Any]:
        """Name and result of the next job that ends; raises what it raised."""


class ThisProcess:
    """One job at a time, in this process."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    @property
    def free(self) -> int:
        return 1 - len(self._jobs)

    def start(self, name: str, job: Job) -> None:
        self._jobs[name] = job

    def wait(self, on_progress: OnProgress) -> tuple[str, Any]:
        name, job = self._jobs.popitem()
        return name, job(partial(on_progress, name))


class OwnProcesses:
    """
    Jobs side by side in a few processes. Each process takes one job after the other, and is started when there is a
    first one for it. Use it as a context: leaving it ends the processes, at once if an exception leaves it.

    Jobs, results and exceptions travel by pickle, so that a job is a function of a module, or a `partial` of one. What
    a job prints goes to standard error.

    Args:
        count (`int`):
            How many processes at most.
        prepare (`Callable[[], None]`, *optional*):
            Called once in each process, before its first job.
        environment (`Mapping[str, str]`, *optional*):
            Environment variables of the processes. Those of this process by default.

    Raises:
        ValueError: `count` is below 1.
        [`NotPortableError`]: (`start`) the job cannot travel.
        [`StageError`]: (`wait`) a process was killed, often for lack of memory.
    """

    def __init__(
        self, count: int, prepare: Callable[[], None] | None = None, environment: Mapping[str, str] | None = None
    ):
        if count < 1:
            raise ValueError(f"{count} processes; at least 1 is needed")
        self._count = count
        self._prepare = prepare
        self._environment = environment
        self._processes: dict[subprocess.Popen[bytes], threading.Thread] = {}  # and what listens to it
        self._busy: dict[subprocess.Popen[bytes], str] = {}
        self._messages: queue.Queue[tuple[subprocess.Popen[bytes], bytes | None]] = queue.Queue()

    def __enter__(self) -> "OwnProcesses":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for process in self._processes:
            if kind is not None:
                process.kill()
            with suppress(OSError):  # it is dead already
                process.stdin.close()  # which ends a process that waits for a job
        for process, listener in self._processes.items():
            process.wait()
            listener.join()
            process.stdout.close()
        self._processes, self._busy = {}, {}

    @property
    def free(self) -> int:
        return self._count - len(self._busy)

    def start(self, name: str, job: Job) -> None:
        message = dumps(job)
        process = next((process for process in self._processes if process not in self._busy), None) or self._open()
        self._busy[process] = name
        _send(process, message)

    def _open(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([str(path) for path in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=None if self._environment is None else dict(self._environment),
        )
        listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        listener.start()
        self._processes[process] = listener
        _send(process, dumps(self._prepare))
        return process

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        while (message := read_message(process.stdout)) is not None:
            self._messages.put((process, message))
        self._messages.put((process, None))

    def wait(self, on_progress: OnProgress) -> tuple[str, Any]:
        while True:
            process, message = self._messages.get()
            name = self._busy.get(process)
            if name is None:  # it ended while it had nothing to do
                continue
            if message is None:
                raise StageError(
                    f"the process of {name!r} ended with exit code {process.wait()} (below zero: the signal that "
                    "killed it; -9 is often a lack of memory)"
                )
            kind, content = pickle.loads(message)
            if kind == "progress":
                on_progress(name, content)
                continue
            del self._busy[process]
            if kind == "failed":
                error, trace = content
                error.add_note(f"The stage {name} failed in its own process:\n{trace}")
                raise error
            return name, content


def dumps(value: Any) -> bytes:
    """A pickle for another process. Raises [`NotPortableError`] for what that process could not import."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except NotPortableError:
        raise
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotPortableError(f"{error}. {_MOVE}") from error
    return buffer.getvalue()


_MOVE = "Put it into a module of its own, or set isolate='never'."


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if inspect.isfunction(value) or inspect.isclass(value):
            name = f"{value.__module__}.{value.__qualname__}"
            if value.__module__ == "__main__" or "<l" in name:  # <lambda>, <locals>
                raise NotPortableError(
                    f"{name!r} is defined in the script, within a function or as a lambda, and another process cannot "
                    f"import it. {_MOVE}"
                )
        return NotImplemented


def _send(process: "subprocess.Popen[bytes]", message: bytes) -> None:
    with suppress(OSError):  # it died; `wait` says so
        write_message(process.stdin, message)


def write_message(file: Any, message: bytes) -> None:
    """Write a message, with its length before it."""
    file.write(len(message).to_bytes(8, "little") + message)
    file.flush()


def read_message(file: Any) -> bytes | None:
    """The next message, or `None` where the other end is gone."""
    head = file.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    message = file.read(size)
    return message if len(message) == size else None


def in_own_process() -> bool:
    """Whether this code runs in a process that a runner started."""
    return os.environ.get("TRL_EXT_STAGE_PROCESS") == "1"
