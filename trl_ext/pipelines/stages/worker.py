"""The program of each process of [`~trl_ext.pipelines.stages.runner.OwnProcesses`]: it takes jobs and returns results.

Jobs arrive on standard input, and results leave on standard output. The output of jobs goes to standard error.
"""

import os
import pickle
import queue
import signal
import threading
import traceback
from typing import Any, BinaryIO

from trl_ext.pipelines.stages.runner import StageError, read_message, write_message


def main() -> None:
    """Run jobs until there are no more; end at once when the parent process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles interrupts
    os.environ["TRL_EXT_STAGE_PROCESS"] = "1"
    jobs, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    received: queue.Queue[bytes | None] = queue.Queue()
    busy = threading.Event()
    threading.Thread(target=_receive, args=(jobs, received, busy), daemon=True).start()
    prepare = received.get()
    if prepare is not None and (prepare := pickle.loads(prepare)) is not None:
        prepare()
    while (message := received.get()) is not None:
        try:
            job = pickle.loads(message)
            content = pickle.dumps(("done", job(lambda share: _send(results, ("progress", share)))))
        except Exception as error:
            content = pickle.dumps(("failed", (_portable(error), traceback.format_exc())))
        busy.clear()
        try:
            write_message(results, content)
        except BrokenPipeError:  # the parent process no longer waits for the result
            return


def _receive(jobs: BinaryIO, received: "queue.Queue[bytes | None]", busy: threading.Event) -> None:
    while (message := read_message(jobs)) is not None:
        busy.set()
        received.put(message)
    if busy.is_set():
        os._exit(1)
    received.put(None)


def _send(results: BinaryIO, value: Any) -> None:
    write_message(results, pickle.dumps(value))


def _portable(error: Exception) -> Exception:
    """The error, or a [`StageError`] with its text if it cannot be sent to the other process."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # an exception's constructor may raise anything
        pass
    return StageError(f"{type(error).__name__}: {error}")
