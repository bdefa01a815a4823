"""Where stages run: one after the other in this process, or side by side in processes of their own.

It knows jobs by name and what became of them; what a stage is, and which is ready, is in `cached_stages`.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol


# What is to be done: given a function for the share that is done, in `[0, 1]`, it returns its result.
Job = Callable[[Callable[[float], None]], Any]
OnProgress = Callable[[str, float], None]


class JobRunner(Protocol):
    """What runs jobs. At most as many are started as are `free`; `wait` gives them back as they end."""

    @property
    def free(self) -> int:
        """How many jobs can be started now."""

    def start(self, name: str, job: Job) -> None:
        """Starts a job."""

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


class WorkerDied(RuntimeError):
    """A process ended in the middle of a job."""


class OwnProcesses:
    """
    Jobs side by side in a few processes, each of which takes one job after the other and is started when there is one
    for it. A context: they end with it, and at once where it is left by an exception; if this process is killed, they
    end at their next report of progress.

    Jobs, results and exceptions travel by pickle, so that a job is a function of a module, or a `partial` of one.

    Args:
        count (`int`):
            How many processes at most.
        prepare (`Callable[[], None]`, *optional*):
            Called once in each of them, before its first job.

    Raises:
        ValueError: `count` is below 1.
        [`WorkerDied`]: (`wait`) A process was killed, for want of memory say.
    """

    def __init__(self, count: int, prepare: Callable[[], None] | None = None):
        if count < 1:
            raise ValueError(f"{count} processes; at least 1 is needed")
        self._count = count
        self._prepare = prepare
        self._processes: dict[Connection, BaseProcess] = {}
        self._busy: dict[Connection, str] = {}

    def __enter__(self) -> "OwnProcesses":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for pipe, process in self._processes.items():
            if kind is not None:
                process.terminate()
            pipe.close()  # which ends a process that waits for a job
        for process in self._processes.values():
            process.join()
        self._processes, self._busy = {}, {}

    @property
    def free(self) -> int:
        return self._count - len(self._busy)

    def start(self, name: str, job: Job) -> None:
        pipe = next((pipe for pipe in self._processes if pipe not in self._busy), None) or self._open()
        self._busy[pipe] = name
        pipe.send(job)

    def _open(self) -> Connection:
        spawn = multiprocessing.get_context("spawn")  # a fork would share locks and threads of torch
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(theirs, self._prepare))
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._processes[ours] = process
        return ours

    def wait(self, on_progress: OnProgress) -> tuple[str, Any]:
        while True:
            for pipe in wait(list(self._busy)):
                name = self._busy[pipe]
                try:
                    kind, content = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process = self._processes[pipe]
                    process.join()
                    raise WorkerDied(
                        f"the process of {name!r} ended with exit code {process.exitcode} (below zero: the signal "
                        "that killed it; -9 is often a lack of memory)"
                    ) from None
                if kind == "progress":
                    on_progress(name, content)
                    continue
                del self._busy[pipe]
                if kind == "failed":
                    raise content
                return name, content


def _work(pipe: Connection, prepare: Callable[[], None] | None) -> None:
    """What each process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that started this one
    if prepare is not None:
        prepare()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result = job(lambda share: pipe.send(("progress", share)))
        except BrokenPipeError:  # whoever asked for it is gone
            return
        except Exception as error:
            error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
            pipe.send(("failed", error))
        else:
            pipe.send(("done", result))
