"""Hides log lines of other packages that are known to be harmless, while a command runs.

It knows loggers and messages. It imports neither torch nor transformers. `trl_ext.logs` decides which of our own lines
are shown.
"""

import logging
import os
import re
import warnings


# logger -> the lines on which no user can act; each has its reason
HARMLESS = {
    # our loaders refuse a checkpoint with missing weights, so a report of a new head tells nothing new
    "transformers.modeling_utils": re.compile("LOAD REPORT"),
    "transformers.utils.loading_report": re.compile("LOAD REPORT"),
    # `chosen`, `prompt` and so on are ignored on purpose: batches are made of the token ids in other columns
    "transformers.trainer": re.compile("have been ignored: "),
}
# FutureWarnings that TRL and PEFT cause by their own calls of transformers, so that no user can act on them
OUTDATED_CALLS = (r".\w*gradient_checkpointing\w*. is deprecated",)

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_ROW = re.compile(r"^\s*(?P<key>[^|\s]+)\s*\|\s*(?P<status>[A-Z]+)", re.MULTILINE)
_HEADS = {"score", "classifier", "pooler", "lm_head"}


class _Harmless(logging.Filter):
    """Drops matching lines of a logger. It keeps a load report that says more than that a head is new or unused."""

    def __init__(self, pattern: re.Pattern):
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not self.pattern.search(message) or ("LOAD REPORT" in message and _says_more(message))


def _says_more(report: str) -> bool:
    rows = [row.groupdict() for row in _ROW.finditer(_STYLE.sub("", report))]
    statuses = [row for row in rows if row["status"] in ("MISSING", "UNEXPECTED", "MISMATCH", "CONVERSION")]
    if not statuses:
        return True
    of_heads = [bool(_HEADS & set(row["key"].split("."))) for row in statuses]
    return not all(of_heads) or any(row["status"] in ("MISMATCH", "CONVERSION") for row in statuses)


def quiet_noise() -> None:
    """Hide harmless lines. If TRANSFORMERS_VERBOSITY is `debug`, nothing is hidden."""
    if os.environ.get("TRANSFORMERS_VERBOSITY", "").lower() == "debug":
        return
    for name, pattern in HARMLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(found, _Harmless) for found in logger.filters):
            logger.addFilter(_Harmless(pattern))
    for message in OUTDATED_CALLS:
        warnings.filterwarnings("ignore", message, FutureWarning)
