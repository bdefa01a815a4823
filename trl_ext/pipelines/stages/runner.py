"""Runs jobs in this process, or in separate processes that free all their memory when they end.

[`run_job`] runs one job. [`ThisProcess`] and [`OwnProcesses`] run several, for `run_stages`. A job is a function that
gets one argument: a function that reports its progress. This module does not know what jobs do.

A separate process is a new Python that imports this package (`worker`), not your script, so your script needs no
`if __name__ == "__main__"`. It ends when the process that started it ends, for whatever reason.
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


# A job gets a function to call with the share that is done, in `[0, 1]`, and returns its result.
Job = Callable[[Callable[[float], None]], Any]
OnProgress = Callable[[str, float], None]

Isolate = Literal["auto", "always", "never"]

_START = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__package__}.worker import main; main()"


class StageError(RuntimeError):
    """A stage cannot run, its process was killed, or its result cannot be kept. The message says what to do."""


class NotPortableError(ValueError):
    """A job holds an object that another process cannot import or receive."""


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
        name (`str`): name of the job in errors.
        job (`Callable`): the job. For a separate process the job and its result are pickled.
        isolate (`str`, *optional*, defaults to `"auto"`):
            `"always"` runs the job in a separate process, so that it leaves no memory allocated. `"never"` runs it in
            this process. `"auto"` uses a separate process if there is a GPU and the job can be pickled.
        portable (`bool`, *optional*, defaults to `True`):
            Whether the job can be sent to another process. `False` for a job that holds a model in memory.
        environment (`Mapping[str, str]`, *optional*):
            The environment variables of a separate process. Those of this process by default.
        on_progress (`Callable[[float], None]`, *optional*): called with the share that is done, in `[0, 1]`.

    Returns:
        The result of the job.

    Raises:
        [`NotPortableError`]: `isolate="always"`, and the job cannot be sent to another process.
        [`StageError`]: the separate process was killed.
        Exception: any error of the job. One from a separate process has that process's traceback as a note.
    """
    check_isolate(isolate)
    if isolate == "always" and not portable:
        raise NotPortableError(
            f"The stage {name} cannot run in a separate process, because it holds a model or a function in memory. "
            "Give models and reward functions by path or name, or set isolate='never'."
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
    """Raise `ValueError` for an unknown value of `isolate`."""
    if isolate not in get_args(Isolate):
        raise ValueError(f"isolate={isolate!r} is not known. Needed: one of {', '.join(get_args(Isolate))}.")


def _on_gpu() -> bool:
    import torch  # imported here, so that processes for stages without torch start fast

    return torch.cuda.is_available()


class JobRunner(Protocol):
    """Runs jobs. Callers start at most `free` jobs at a time; `wait` returns them as they end."""

    @property
    def free(self) -> int:
        """How many jobs can be started now."""

    def start(self, name: str, job: Job) -> None:
        """Start a job."""

    def wait(self, on_progress: OnProgress) -> tuple[str, Any]:
        """Return the name and result of the next job that ends, or raise the job's error."""


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
    Runs jobs side by side in a few processes. Each process takes one job after the other and starts with its first
    job. Use it as a context manager: leaving it ends the processes, at once if there was an exception.

    Jobs, results and exceptions are pickled, so a job must be a function of a module or a `partial` of one. The output
    of jobs goes to standard error.

    Args:
        count (`int`):
            Largest number of processes.
        prepare (`Callable[[], None]`, *optional*):
            Called once in each process, before its first job.
        environment (`Mapping[str, str]`, *optional*):
            Environment variables of the processes. Those of this process by default.

    Raises:
        ValueError: `count` is below 1.
        [`NotPortableError`]: (`start`) the job cannot be sent to another process.
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
        self._processes: dict[subprocess.Popen[bytes], threading.Thread] = {}  # with the thread that listens to each
        self._busy: dict[subprocess.Popen[bytes], str] = {}
        self._messages: queue.Queue[tuple[subprocess.Popen[bytes], bytes | None]] = queue.Queue()

    def __enter__(self) -> "OwnProcesses":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for process in self._processes:
            if kind is not None:
                process.kill()
            with suppress(OSError):  # the process has ended already
                process.stdin.close()  # ends a process that waits for a job
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
            if name is None:  # the process ended while it had no job
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
                error.add_note(f"The stage {name} failed in a separate process:\n{trace}")
                raise error
            return name, content


def dumps(value: Any) -> bytes:
    """Pickle a value for another process. Raises [`NotPortableError`] for code that the process cannot import."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except NotPortableError:
        raise
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotPortableError(f"{error}. {_MOVE}") from error
    return buffer.getvalue()


_MOVE = "Put it into a module, or set isolate='never'."


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if inspect.isfunction(value) or inspect.isclass(value):
            name = f"{value.__module__}.{value.__qualname__}"
            if value.__module__ == "__main__" or "<l" in name:  # <lambda>, <locals>
                raise NotPortableError(
                    f"{name!r} is defined in the script, inside a function or as a lambda, so another process cannot "
                    f"import it. {_MOVE}"
                )
        return NotImplemented


def _send(process: "subprocess.Popen[bytes]", message: bytes) -> None:
    with suppress(OSError):  # the process died; `wait` reports it
        write_message(process.stdin, message)


def write_message(file: Any, message: bytes) -> None:
    """Write the length of a message, then the message."""
    file.write(len(message).to_bytes(8, "little") + message)
    file.flush()


def read_message(file: Any) -> bytes | None:
    """The next message, or `None` if the other end is closed."""
    head = file.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    message = file.read(size)
    return message if len(message) == size else None


def in_own_process() -> bool:
    """Whether this code runs in a process that a runner started."""
    return os.environ.get("TRL_EXT_STAGE_PROCESS") == "1"
