"""Shows the progress of a run of several stages and the time left: a live display in a terminal, lines elsewhere.

It knows names, shares and seconds, and nothing of what the stages do.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_ext.pipelines.stages.cached_stages import Outcome


def clock(seconds: float) -> str:
    """`75.2` -> `"1:15"`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def seconds_left(left: Mapping[str, float], needs: Mapping[str, Sequence[str]], workers: int) -> float:
    """
    Seconds until all stages are done, if each free worker takes the first stage whose needs are done.

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
    Shows the progress of the stages of a run, and estimates the time left.

    On a terminal it is a live display: a bar for each running stage, with log lines above it. Elsewhere it writes a
    line every `interval` seconds. The estimate uses the seconds of each stage on a reference machine and the speed of
    this machine. It is a context manager, which restores the terminal at the end, also after an interrupt.

    Args:
        expected (`Mapping[str, float]`, *optional*):
            Expected seconds of each stage, by title, in order. Without them there is no estimate.
        needs (`Mapping[str, Sequence[str]]`, *optional*):
            The stages that must be done before a stage can start.
        workers (`int`, *optional*, defaults to `1`):
            How many stages run side by side.
        stream (`TextIO`, *optional*, defaults to standard error):
            Where the display or the lines go.
        interval (`float`, *optional*, defaults to `15.0`):
            Seconds between two lines, if the stream is not a terminal.
        now (`Callable[[], float]`, *optional*, defaults to `time.monotonic`):
            The clock, in seconds.
    """

    def __init__(
        self,
        expected: Mapping[str, float] | None = None,
        needs: Mapping[str, Sequence[str]] | None = None,
        workers: int = 1,
        stream: TextIO | None = None,
        interval: float = 15.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self._expected = dict(expected or {})
        self._needs = needs or {}
        self._workers = workers
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._now = now
        self._begin = now()
        self._running: dict[str, float] = {}
        self._finished: set[str] = set()
        self._shown = float("-inf")
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            before = sys.stderr
            console = Console(file=self._stream)
            self._live = Live(console=console, get_renderable=self._display, refresh_per_second=4, transient=True)
            self._live.start()
            _move_logs(before, sys.stderr)  # now the display's stream, so that log lines appear above it
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            before = sys.stderr
            self._live.stop()
            _move_logs(before, sys.stderr)
            self._live = None

    def start(self, title: str) -> None:
        """A stage begins."""
        self._running[title] = 0.0
        self._show(always=True)

    def update(self, title: str, share: float) -> None:
        """Set the share of a stage that is done, in `[0, 1]`."""
        self._running[title] = share
        self._show(always=False)

    def finish(self, title: str, line: str) -> None:
        """Mark a stage as done, and write a line that stays."""
        self._running.pop(title, None)
        self._finished.add(title)
        self._write(line)

    def remaining(self) -> float:
        """Seconds that are left."""
        present = {title: (1 - share) * self._expected.get(title, 0.0) for title, share in self._running.items()}
        later = {t: s for t, s in self._expected.items() if t not in present and t not in self._finished}
        left = seconds_left(present | later, self._needs, self._workers)
        done = seconds_left(self._expected, self._needs, self._workers) - left
        # The first seconds say little about this machine's speed, so the reference machine counts as 10 of them.
        return left * (self._now() - self._begin + 10.0) / (max(done, 0.0) + 10.0)

    def _times(self) -> str:
        times = f"{clock(self._now() - self._begin)} so far"
        return f"{times}, about {clock(self.remaining())} left" if self._expected else times

    def _counts(self) -> str:
        return f"[{len(self._finished & self._expected.keys())}/{len(self._expected)}] " if self._expected else ""

    def _display(self) -> Table:
        """The current display of a terminal: a bar for each running stage, and the times."""
        table = Table.grid(padding=(0, 1))
        for title, share in list(self._running.items()):
            # a moving bar for a stage that has not reported its progress yet
            table.add_row(Text(title), ProgressBar(1.0, share, width=30, pulse=share == 0), f"{share:.0%}")
        table.add_row(Text(f"{self._counts()}{self._times()}"))
        return table

    def _show(self, always: bool) -> None:
        if self._live is not None or (not always and self._now() - self._shown < self._interval):
            return  # a live display refreshes itself
        self._shown = self._now()
        shares = ", ".join(f"{title} {share:.0%}" for title, share in self._running.items())
        self._write(f"{self._counts()}{shares}; {self._times()}")

    def _write(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(Text(line))
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


def _move_logs(before: TextIO, after: TextIO) -> None:
    """Give log handlers the new standard error; they hold the stream of the time when they were made."""
    loggers = [logging.root, *(one for one in logging.root.manager.loggerDict.values())]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):  # a placeholder for a logger has none
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)


def ended(title: str, outcome: Outcome) -> str:
    """The line for a finished stage."""
    return f"{title}: {'kept from an earlier run' if outcome.cached else f'done in {clock(outcome.seconds)}'}"


class ProgressCallback(TrainerCallback):
    """Passes the share of a trainer's steps that are done to a function."""

    def __init__(self, update: Callable[[float], None]):
        self._update = update

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._update(state.global_step / state.max_steps)
