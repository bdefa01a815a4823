"""What the stages of `test_cached_stages.py` do, in a module that processes of their own import fast."""

import os
import signal
import time


def add(context):
    """The sum of its own number and of the results that it needs, also in a file."""
    context.progress(0.5)
    total = context.settings["number"] + sum(result["total"] for result in context.results.values())
    (context.folder / "total.txt").write_text(str(total))
    assert {int((folder / "total.txt").read_text()) for folder in context.folders.values()} == {
        result["total"] for result in context.results.values()
    }
    return {"total": total, "process": os.getpid()}


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def meet(context):
    """Waits until the other stage has begun."""
    (context.folder.parent / f"{context.settings['here']}.met").touch()
    wait_for(context.folder.parent / f"{context.settings['there']}.met")
    return {}


def fail(context):
    wait_for(context.folder.parent / "sleeps")
    raise LookupError("nothing there")


def kill(context):
    wait_for(context.folder.parent / "sleeps")
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(context):
    (context.folder.parent / "sleeps").write_text(str(os.getpid()))
    time.sleep(600)
