"""One line that says how far a run of several stages is and when it will be over.

It knows names, shares and seconds, and nothing of what the stages do.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def clock(seconds: float) -> str:
    """`75.2` -> `"1:15"`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Progress:
    """
    Estimates the time that is left from how long each stage takes on a reference machine and how fast this one is.

    On a terminal the line is rewritten in place, elsewhere one is written each `interval` seconds.

    Args:
        expected (`Sequence[tuple[str, float]]`):
            Title and expected seconds of each stage that will run, in order.
        stream (`TextIO`, *optional*, defaults to standard error):
            Where lines go.
        interval (`float`, *optional*, defaults to `15.0`):
            Seconds between lines where they cannot be rewritten.
        now (`Callable[[], float]`, *optional*, defaults to `time.monotonic`):
            The clock, in seconds.
    """

    def __init__(
        self,
        expected: Sequence[tuple[str, float]],
        stream: TextIO | None = None,
        interval: float = 15.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self._expected = list(expected)
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._now = now
        self._begin = now()
        self._index = -1
        self._shown = float("-inf")
        self._width = 0

    def start(self) -> None:
        """The next stage begins."""
        self._index += 1
        self._show(0.0, always=True)

    def update(self, share: float) -> None:
        """The present stage is done to this share, in `[0, 1]`."""
        self._show(share, always=False)

    def finish(self, line: str) -> None:
        """Writes a line that stays, in place of the progress line."""
        self._write(line, stays=True)

    def remaining(self, share: float) -> float:
        """Seconds that are left when the present stage is done to this share."""
        before = sum(seconds for _, seconds in self._expected[: self._index])
        done = before + share * self._expected[self._index][1]
        total = sum(seconds for _, seconds in self._expected)
        elapsed = self._now() - self._begin
        # The first seconds of a run say little about the machine: the reference counts for 10 of them.
        speed = (elapsed + 10.0) / (done + 10.0)
        return (total - done) * speed

    def _show(self, share: float, always: bool) -> None:
        rewritable = self._stream.isatty()
        if not always and self._now() - self._shown < (0.2 if rewritable else self._interval):
            return
        self._shown = self._now()
        title = self._expected[self._index][0]
        self._write(
            f"[{self._index + 1}/{len(self._expected)}] {title}: {share:4.0%}, "
            f"{clock(self._now() - self._begin)} so far, about {clock(self.remaining(share))} left",
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
