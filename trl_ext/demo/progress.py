"""One line that says how far a run of several stages is and when it will be over.

It knows names, shares and seconds, and nothing of what the stages do.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def clock(seconds: float) -> str:
    """`75.2` -> `"1:15"`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def seconds_left(left: Mapping[str, float], needs: Mapping[str, Sequence[str]], workers: int) -> float:
    """
    How long it takes until all are done, if each free worker takes the first that needs nothing unfinished.

    >>> seconds_left({"a": 1.0, "b": 2.0, "c": 3.0}, {"b": ["a"], "c": ["a"]}, workers=2)
    4.0
    """
    waiting, running, now = dict(left), {}, 0.0
    while waiting or running:
        ready = [name for name in waiting if not any(n in waiting or n in running for n in needs.get(name, ()))]
        for name in ready[: workers - len(running)]:
            running[name] = now + waiting.pop(name)
        now = min(running.values())
        running = {name: end for name, end in running.items() if end > now}
    return now


class Progress:
    """
    Estimates the time that is left from how long each stage takes on a reference machine and how fast this one is.

    On a terminal the line is rewritten in place, elsewhere one is written each `interval` seconds.

    Args:
        expected (`Mapping[str, float]`):
            Seconds of each stage that will run, by its title, in order.
        needs (`Mapping[str, Sequence[str]]`):
            Which of them have to be done before a stage can start.
        workers (`int`, *optional*, defaults to `1`):
            How many run side by side.
        stream (`TextIO`, *optional*, defaults to standard error):
            Where lines go.
        interval (`float`, *optional*, defaults to `15.0`):
            Seconds between lines where they cannot be rewritten.
        now (`Callable[[], float]`, *optional*, defaults to `time.monotonic`):
            The clock, in seconds.
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        needs: Mapping[str, Sequence[str]],
        workers: int = 1,
        stream: TextIO | None = None,
        interval: float = 15.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self._expected = dict(expected)
        self._needs = needs
        self._workers = workers
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._now = now
        self._begin = now()
        self._running: dict[str, float] = {}
        self._finished: set[str] = set()
        self._shown = float("-inf")
        self._width = 0

    def start(self, title: str) -> None:
        """A stage begins."""
        self._running[title] = 0.0
        self._show(always=True)

    def update(self, title: str, share: float) -> None:
        """A stage is done to this share, in `[0, 1]`."""
        self._running[title] = share
        self._show(always=False)

    def finish(self, title: str, line: str) -> None:
        """A stage is done: writes a line that stays, in place of the progress line."""
        self._running.pop(title, None)
        self._finished.add(title)
        self._write(line, stays=True)

    def remaining(self) -> float:
        """Seconds that are left."""
        present = {title: (1 - share) * self._expected[title] for title, share in self._running.items()}
        later = {t: s for t, s in self._expected.items() if t not in present and t not in self._finished}
        left = seconds_left(present | later, self._needs, self._workers)
        done = seconds_left(self._expected, self._needs, self._workers) - left
        # The first seconds of a run say little about the machine: the reference counts for 10 of them.
        return left * (self._now() - self._begin + 10.0) / (max(done, 0.0) + 10.0)

    def _show(self, always: bool) -> None:
        rewritable = self._stream.isatty()
        if not always and self._now() - self._shown < (0.2 if rewritable else self._interval):
            return
        self._shown = self._now()
        shares = ", ".join(f"{title} {share:.0%}" for title, share in self._running.items())
        self._write(
            f"[{len(self._finished & self._expected.keys())}/{len(self._expected)}] {shares}; "
            f"{clock(self._now() - self._begin)} so far, about {clock(self.remaining())} left",
            stays=not rewritable,
        )

    def _write(self, line: str, stays: bool) -> None:
        rewritable = self._stream.isatty()
        padded = f"\r{line:<{self._width}}" if rewritable else line
        self._stream.write(padded + ("\n" if stays else ""))
        self._stream.flush()
        self._width = 0 if stays else len(line)


class ProgressCallback(TrainerCallback):
    """Hands the share of a trainer's steps that are done to a function."""

    def __init__(self, update: Callable[[float], None]):
        self._update = update

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._update(state.global_step / state.max_steps)
