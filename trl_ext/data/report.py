"""What happened to the rows of a data set: counts for each reason, logged once in one line.

Knows only the counts of each row. `trl_ext.data.formats` and `trl_ext.data.spans` make these counts.
"""

import logging
import os
from dataclasses import dataclass, field

from torch.utils.data import get_worker_info

from trl_ext.data.validation import DataError, shown


logger = logging.getLogger(__name__)

# The counts of a group, in the order of the list that `formats` stores with it.
COUNTED = {
    "over_long_rows": "dropped: longer than {limit} (fewer than 2 candidates fit)",
    "over_long_candidates": "single candidates longer than {limit} left out of larger groups",
    "tied": "fully tied (no gradient)",
    "identical": "with candidates of identical tokens",
    "no_prompt": "with an empty prompt",
    "unseen": "with completions whose text the chat template leaves out, wholly or in part",
    "unknown": "with a completion that has only unknown tokens, since the tokenizer knows none of its words",
    "unseen_prompt": "with text of the prompt, or tools, that the chat template leaves out",
}
# The counts of a row with labelled spans, in the order of the list that `spans` stores with it.
COUNTED_OF_SPANS = {
    "over_long_rows": "dropped: longer than {limit}",
    "unlabelled_rows": "dropped: without a labelled token",
    "no_segments": "without any segment (kept; without a label they have no loss)",
    "no_prompt": "with an empty prompt",
    "unseen": "with completions of which the chat template leaves out an earlier message, thinking or a call",
    "unknown": "with a completion that has only unknown tokens, since the tokenizer knows none of its words",
    "unseen_prompt": "with text of the prompt, or tools, that the chat template leaves out",
    "stripped": "whose completion the chat template stripped of white space at an end",
    "cut_rows": "cut at max_completion_length",
    "cut_labels": "labels dropped because they lie behind max_completion_length",
    "unannotated": "labels that are null (not annotated), masked",
    "after_error": "labels after the first wrong step, masked",
    "no_offsets": "segments without offsets, skipped",
    "empty_steps": "steps without text",
    "no_token": "labels dropped because their text has no token",
    "shared": "labels on a token that has an equal label of another span (kept once)",
    "conflicting": "labels that contradict each other on one token, masked",
    "straddling": "labels on a token that also holds text outside of the span",
    "unlike_pieces": "whose tokens differ from prompt, steps and separators tokenized one by one (as in TRL <= 1.13)",
}
# Text that the model does not see, in any of these rows.
UNSEEN = ("unseen", "unknown", "unseen_prompt")
# A row with one of these counts is not used.
DROPPING = {"over_long_rows", "unlabelled_rows"}
# These are in the summary, but they are normal and cause no warning.
EXPECTED = {"no_segments", "unannotated", "after_error", "unlike_pieces"}
# A stream has no length. Its survival rate is checked once this many rows were read.
STREAM_ROWS_BEFORE_JUDGING = 256


def stream_reader() -> str | None:
    """This reader of a stream, where several may share its shards; `None` where one process reads it alone.

    Each of several readers counts the rows that it reads from 0.
    """
    worker, processes = get_worker_info(), int(os.environ.get("WORLD_SIZE", "1"))
    names = []
    if worker is not None and worker.num_workers > 1:
        names.append(f"DataLoader worker {worker.id} of {worker.num_workers}")
    if processes > 1:
        names.append(f"process {os.environ.get('RANK', '0')} of {processes}")
    return " in ".join(names) or None


@dataclass
class DataReport:
    """Counts of the rows of one data set.

    For a `Dataset`, the report is complete when the function that prepares it returns. For an `IterableDataset`, the
    report fills while rows stream, and counts each row once, in the first pass. It fills in the process that reads the
    rows. With `DataLoader` workers that is the worker: it still warns and checks survival, but the report of the
    parent stays empty.

    Args:
        name (`str`): name of the data set ("train", "eval").
        max_length (`int`, *optional*): the limit in tokens that the user set.
        max_positions (`int`, *optional*): the limit in tokens that the model sets, if it has one.
        streaming (`bool`): whether the rows are a stream, so that the counts still grow.
        rows (`int`): rows read.
        kept (`int`): rows that training uses.
        counts (`dict[str, int]`): how often each reason occurred.
        reasons (`dict[str, str]`): each reason and its text in the summary; `COUNTED` or `COUNTED_OF_SPANS`.
        first_unseen (`tuple[int, str]`, *optional*): the first row with a count of `UNSEEN`, and the text that the
            model does not see.
    """

    name: str = "train"
    max_length: int | None = None
    max_positions: int | None = None
    streaming: bool = False
    rows: int = 0
    kept: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=lambda: COUNTED, repr=False)
    first_unseen: tuple[int, str] | None = field(default=None, repr=False)
    _said: set[str] = field(default_factory=set, repr=False)
    _last_row: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        self.counts = {**dict.fromkeys(self.reasons, 0), **self.counts}

    @property
    def limit(self) -> int | None:
        """The longest row that is kept, in tokens: the smaller of the two limits, `None` if there is none."""
        return min((limit for limit in (self.max_length, self.max_positions) if limit is not None), default=None)

    @property
    def dropped(self) -> int:
        """Rows that are not used."""
        return self.rows - self.kept

    def add(self, counts: list[int], rows: int, kept: int) -> None:
        """Add the counts of `rows` rows, in the order of `reasons`. Of these rows, `kept` are used."""
        self.rows += rows
        self.kept += kept
        for reason, count in zip(self.reasons, counts, strict=True):
            self.counts[reason] += int(count)

    def add_streamed(self, row: int, counts: list[int], kept: bool, min_survival: float) -> None:
        """Add one row of a stream, unless an earlier pass counted it. Warn of each reason once; check survival."""
        if row <= self._last_row:
            return
        self._last_row = row
        self.add(counts, rows=1, kept=int(kept))
        for reason, count in zip(self.reasons, counts, strict=True):
            if count and reason not in EXPECTED and reason not in self._said:
                self._said.add(reason)
                reader = stream_reader()
                number = f"{row} as counted by {reader}" if reader else row
                self._warn(
                    f"{self.name} data, row {number} is the first row counted as {reason}: {self._phrase(reason)}"
                )
        if self.rows >= STREAM_ROWS_BEFORE_JUDGING:
            self.check_seen()
            self.check_survival(min_survival)

    def check_survival(self, min_survival: float) -> None:
        """Raise `DataError` with the counts if no row is used, or less than the share `min_survival`."""
        if self.rows and (self.kept == 0 or self.kept < min_survival * self.rows):
            raise DataError(
                found=self.summary().removeprefix(f"{self.name} data: "),  # the error begins with it
                needed=f"at least {min_survival:.0%} of the rows, and at least one row",
                fix="Raise max_length, shorten or label the rows, or lower min_survival if the loss is intended.",
                dataset=self.name,
            )

    def check_seen(self) -> None:
        """Raise `DataError` if the chat template leaves out text in every row."""
        if self.rows and self.counts.get("unseen") == self.rows:
            row, text = self.first_unseen or (None, "")
            example = f", here {shown(text)}" if text else ""
            raise DataError(
                found=f"text of a completion that the chat template leaves out in every row{example}",
                needed="a chat template that renders the completions as they are",
                fix="Give another chat template (chat_template_path), or remove from the messages what it leaves out.",
                row=row,
                dataset=self.name,
            )

    def show(self) -> None:
        """Log the summary once, on the main process only: as a warning if a reason not in `EXPECTED` occurred."""
        if "summary" in self._said:
            return
        self._said.add("summary")
        if any(count for reason, count in self.counts.items() if reason not in EXPECTED):
            self._warn(self.summary())
        else:
            logger.info(self.summary())

    def summary(self) -> str:
        """One line: rows, rows kept, and each reason that occurred.

        ```python
        >>> report.summary()
        'train data: 31 of 64 rows kept; 33 dropped: longer than max_length=512 (fewer than 2 candidates fit)'
        ```
        """
        parts = [f"{self.name} data: {self.kept} of {self.rows} rows kept{' so far' if self.streaming else ''}"]
        parts += [f"{count} {self._phrase(reason)}" for reason, count in self.counts.items() if count]
        if self.first_unseen is not None:
            row, text = self.first_unseen
            parts.append(f"the first text that the model does not see, in row {row}: {shown(text)}")
        return "; ".join(parts)

    def short(self) -> str:
        """How many rows are kept, without reasons: `train: 31 of 64 rows kept`."""
        if self.streaming:
            return f"{self.name}: a stream, counted while it is read"
        return f"{self.name}: {self.kept} of {self.rows} rows kept"

    def news(self) -> dict[str, int]:
        """What occurred, under the names of `as_metrics`: once, and for a stream each time, because counts grow."""
        if "metrics" in self._said and not self.streaming:
            return {}
        self._said.add("metrics")
        return {name: count for name, count in self.as_metrics().items() if count}

    def as_metrics(self) -> dict[str, int]:
        """The counts under the names `data/<name>/rows`, `.../kept`, `.../dropped` and one for each reason."""
        values = {"rows": self.rows, "kept": self.kept, "dropped": self.dropped, **self.counts}
        return {f"data/{self.name}/{key}": value for key, value in values.items()}

    def _phrase(self, reason: str) -> str:
        limit = f"max_length={self.max_length}"
        if self.max_positions is not None and self.limit == self.max_positions != self.max_length:
            limit = f"{self.max_positions} tokens, all the positions of the model ({limit})"
        return self.reasons[reason].format(limit=limit)

    def _warn(self, message: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            logger.warning(message)
