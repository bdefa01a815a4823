"""Which of our log lines are shown: those from transformers' verbosity on, or from a level that a command sets.

It knows loggers, and transformers by one function that returns a level. It knows nothing of what is logged.
"""

import logging
import os
import sys
from typing import TextIO


_OURS = logging.getLogger("trl_ext")
# The level that was last taken over from transformers. Another level was set by somebody else, and stays.
_followed: int = logging.NOTSET


def hide_missing_kernel() -> None:
    """
    Hide bitsandbytes' line about a kernel that it looks for when it is imported, which our modules do.

    4-bit products on a CPU run without the kernel. TRANSFORMERS_VERBOSITY=debug shows the line.
    """

    def shown(record: logging.LogRecord) -> bool:
        debug = os.environ.get("TRANSFORMERS_VERBOSITY", "").lower() == "debug"
        return debug or "gemm_4bit_forward" not in record.getMessage()

    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(shown)


class _StandardError(logging.StreamHandler):
    """Writes to standard error, unless the program around us shows log lines itself."""

    def __init__(self):
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    @property
    def stream(self) -> TextIO:
        return sys.stderr  # what it is now: a test or a notebook may have replaced it

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def show_logs(level: int | None = None, default: int = logging.INFO) -> None:
    """
    Show our log lines from a level on, whatever transformers shows.

    Args:
        level (`int`, *optional*): of `logging`. By default what TRANSFORMERS_VERBOSITY says, if it is set.
        default (`int`, *optional*, defaults to `logging.INFO`): the level where neither says anything.
    """
    if level is None:
        named = getattr(logging, os.environ.get("TRANSFORMERS_VERBOSITY", "").upper() or "NOTSET", None)
        level = named if isinstance(named, int) and named else default
    _OURS.setLevel(level)
    _add_handler()


def follow_transformers(level: int | None = None) -> None:
    """
    Show our log lines from the level on that transformers shows its own from.

    It changes nothing where somebody has set the level of the logger `trl_ext`, or where the program around us has set
    up logging (the root logger has a handler): then our lines go the way of all lines.

    Args:
        level (`int`, *optional*): what a trainer's `log_level` says. By default transformers' verbosity.
    """
    global _followed
    if logging.getLogger().handlers or _OURS.level not in (logging.NOTSET, _followed):
        return
    if level is None:
        from transformers.utils.logging import get_verbosity

        level = get_verbosity()
    _OURS.setLevel(level)
    _followed = level
    _add_handler()


def _add_handler() -> None:
    if not _OURS.handlers:
        _OURS.addHandler(_StandardError())
