"""One row of a data set -> a checked `SpanRow`: outcome, stepwise and segment rows as labelled spans of characters.

Knows the columns of the three types of data set and their valid values. Knows nothing of tokens or of `datasets`: a
row is a dictionary.
"""

import math
import numbers
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from trl_ext.data.chat_templates import Completion, Prompt
from trl_ext.data.offsets import completion_text
from trl_ext.data.schema import template_arguments
from trl_ext.data.span_labels import LabelPlacement, Span, mask_after_first_error
from trl_ext.data.validation import DataError, Kind, RowChecks, shown


SpanKind = Literal["outcome", "stepwise", "segment"]
# For each type of data set, the column with the text and the column with the labels. All have a `prompt` too.
COLUMNS: dict[str, tuple[str, str]] = {
    "outcome": ("completion", "label"),
    "stepwise": ("completions", "labels"),
    "segment": ("completion", "segments"),
}
# Columns that a chat template reads in addition to the messages.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Columns that `spans` writes; it removes `row_counts` again.
WRITTEN = (
    "span_input_ids",
    "label_positions",
    "label_values",
    "label_categories",
    "label_steps",
    "completion_start",
    "row_index",
    "row_counts",
)


@dataclass(frozen=True)
class SpanFormat:
    """How rows are read and labelled. The fields are the arguments of `spans.prepare_spans` with the same names."""

    kind: SpanKind
    label_placement: LabelPlacement
    categories: tuple[str, ...] = ()
    step_separator: str = "\n"
    num_labels: int = 2
    mask_after_first_error: bool = False
    train_on_last_step_only: bool = False

    def __post_init__(self) -> None:
        if self.kind not in COLUMNS:
            raise ValueError(f"kind must be one of {', '.join(COLUMNS)}, found {self.kind!r}")
        if self.label_placement not in ("last", "all", "before"):
            raise ValueError(f"label_placement must be 'last', 'all' or 'before', found {self.label_placement!r}")
        if self.kind == "outcome" and self.label_placement == "before":
            raise ValueError("label_placement='before' would label the prompt of an outcome row; use 'last' or 'all'")
        if self.num_labels not in (1, 2, 3):
            raise ValueError(f"num_labels must be 1 or 2 (right or wrong) or 3 (-1, 0, 1), found {self.num_labels!r}")
        if len(set(self.categories)) < len(self.categories):
            raise ValueError(f"categories must differ from each other, found {list(self.categories)}")


@dataclass(frozen=True)
class SpanRow:
    """One checked row: the text to tokenize, the labelled spans, and the counts for the report.

    The span of an outcome row is its whole completion.
    """

    prompt: Prompt
    completion: Completion
    spans: list[Span]
    kind: Kind
    tools: list[Any] | str | None
    chat_template_kwargs: dict[str, Any] | None
    steps: list[str]
    counts: dict[str, int]


def check_columns(columns: Sequence[str], layout: SpanFormat, dataset_name: str) -> None:
    """Raise `DataError` for a missing column, or for a column with the name of one that `spans` writes."""
    text, label = COLUMNS[layout.kind]
    for column in ("prompt", text, label):
        if column not in columns:
            fix = f"{layout.kind} rows need `prompt`, `{text}` and `{label}`; rename a column with rename_column."
            if column == "prompt":
                fix += " If the completions contain the prompt, add a column of empty prompts."
            raise DataError(
                f"no such column among {sorted(columns)}",
                f"the column {column!r}",
                fix,
                row=0,
                column=column,
                dataset=dataset_name,
            )
    for column in WRITTEN:
        if column in columns:
            raise DataError(
                "a column of that name",
                "a free name",
                "Rename it: tokenization writes a column of that name.",
                row=0,
                column=column,
                dataset=dataset_name,
            )


def check_span_row(
    row: dict[str, Any], layout: SpanFormat, checks: RowChecks, only_kind: Kind | None = None
) -> SpanRow:
    """Makes a `SpanRow` of one row. Raises `DataError` for the first fault in it.

    Args:
        only_kind (`str`, *optional*): "text" or "chat", the kind of row 0.
    """
    column, label_column = COLUMNS[layout.kind]
    steps: list[str] = []
    completion = row[column]
    if layout.kind == "stepwise":
        steps = _steps(completion, checks)
        completion = "".join(step + layout.step_separator for step in steps)
    kind, prompt = checks.one_kind(checks.prompt(row["prompt"]), [completion], [column])
    if only_kind is not None and kind != only_kind:
        raise checks.error(
            column, f"a {kind} row", f"{only_kind} rows, as row 0 is one", "Convert the data set to one kind."
        )
    tools, template = template_arguments(row, checks) if kind == "chat" else (None, None)
    try:
        text = completion_text(completion)
    except TypeError as error:
        raise checks.error(column, str(error), "a text", "Put the labelled text last, as a string.") from error

    counts: Counter[str] = Counter(no_prompt=int(not row["prompt"]))
    labels = row[label_column]
    if layout.kind == "outcome":
        value = None if labels is None else checks.number(labels, label_column, minimum=0, maximum=1)
        counts["unannotated"] += value is None
        spans = [] if value is None else [Span(0, len(text), value)]
    elif layout.kind == "stepwise":
        spans = _step_spans(steps, labels, layout, checks, counts)
    else:
        spans = _segment_spans(text, labels, layout, checks, counts)
    return SpanRow(prompt, completion, spans, kind, tools, template, steps, dict(counts))


def _steps(value: Any, checks: RowChecks) -> list[str]:
    """The steps of a row. Steps may be empty."""
    if not isinstance(value, (list, tuple)) or not value:
        raise checks.error(
            "completions",
            shown(value),
            "a list of steps",
            "Give the steps of the solution as a list of strings, also after a chat prompt.",
        )
    for step in value:
        if not isinstance(step, str):
            raise checks.error(
                "completions", f"the step {shown(step)}", "a string", "Give the steps as strings, without roles."
            )
    return list(value)


def _step_spans(
    steps: list[str], labels: Any, layout: SpanFormat, checks: RowChecks, counts: Counter[str]
) -> list[Span]:
    """The spans of the steps that have a label. Each includes its separator."""
    if not isinstance(labels, (list, tuple)) or len(labels) != len(steps):
        found = f"{len(labels)} values" if isinstance(labels, (list, tuple)) else shown(labels)
        raise checks.error(
            "labels", found, f"a list of {len(steps)}, one per step", "Give one label per step; null for no label."
        )
    values = [None if label is None else _step_label(label, layout, checks) for label in labels]
    counts["empty_steps"] = sum(not step.strip() for step in steps)
    counts["unannotated"] = values.count(None)
    if layout.mask_after_first_error:
        values = mask_after_first_error(values, wrong_below=0.0 if layout.num_labels == 3 else 0.5)
        counts["after_error"] = values.count(None) - counts["unannotated"]
    if layout.train_on_last_step_only:
        values = [None] * (len(values) - 1) + values[-1:]
    spans, start = [], 0
    for number, (step, value) in enumerate(zip(steps, values, strict=True)):
        end = start + len(step) + len(layout.step_separator)
        if value is not None:
            spans.append(Span(start, end, value, step=number))
        start = end
    return spans


def _step_label(label: Any, layout: SpanFormat, checks: RowChecks) -> float:
    """-1, 0 or 1 for three classes; else a bool, 0, 1, or the probability that the step is right."""
    if layout.num_labels != 3:
        if isinstance(label, numbers.Real) and label == -1:
            raise checks.error(
                "labels",
                shown(label),
                f"labels from 0 to 1 for num_labels={layout.num_labels}",
                "Use num_labels=3 for labels -1, 0, 1, or map them: -1 to 0, 0 to null.",
            )
        return checks.number(label, "labels", minimum=0, maximum=1)
    if isinstance(label, bool) or label not in (-1, 0, 1):
        raise checks.error(
            "labels",
            shown(label),
            "-1 (wrong), 0 (neutral) or 1 (right) for num_labels=3",
            "Use num_labels=2 for labels that are true, false or a probability.",
        )
    return float(label)


def _segment_spans(
    text: str, segments: Any, layout: SpanFormat, checks: RowChecks, counts: Counter[str]
) -> list[Span]:
    """The spans of the segments that have offsets and a label, numbered as in the row."""
    if segments is None:
        segments = []
    if not isinstance(segments, (list, tuple)):
        raise checks.error(
            "segments", shown(segments), "a list of segments", "Give a list of {start, end, label or score, category}."
        )
    counts["no_segments"] += not segments
    spans, places = [], []
    for number, segment in enumerate(segments):
        if not isinstance(segment, dict):
            raise checks.error(
                "segments", shown(segment), "{start, end, label or score, category}", "Make it a dictionary."
            )
        category = _category(segment.get("category"), layout, checks)
        value = _segment_value(segment, checks)
        if segment.get("start") is None or segment.get("end") is None:
            counts["no_offsets"] += 1
            continue
        start, end = (_offset(segment[name], name, checks) for name in ("start", "end"))
        if not 0 <= start < end <= len(text):
            what = "an empty span" if start == end else "a span outside of the text"
            raise checks.error(
                "segments",
                f"{what}: {start} to {end} in a completion of {len(text)} characters",
                "0 <= start < end <= length",
                "Offsets count characters (not bytes) of the completion alone, and end is not included.",
            )
        places.append((category, start, end))
        if value is None:
            counts["unannotated"] += 1
        else:
            spans.append(Span(start, end, value, category, number))
    for (category, start, end), (next_category, next_start, next_end) in pairwise(sorted(places)):
        if category == next_category and next_start < end:
            raise checks.error(
                "segments",
                f"overlapping spans of one category: {start} to {end} and {next_start} to {next_end}",
                "spans of one category that do not overlap",
                "Give them different categories, or merge them.",
            )
    return spans


def _category(name: Any, layout: SpanFormat, checks: RowChecks) -> int:
    """Index of a category. A segment without a category belongs to the only category."""
    if name in layout.categories:
        return layout.categories.index(name)
    if name is None and len(layout.categories) <= 1:
        return 0
    known = f"one of {list(layout.categories)}" if layout.categories else "no category, as `categories` is not given"
    raise checks.error(
        "segments",
        "a segment without a category" if name is None else f"the unknown category {name!r}",
        known,
        "Name all categories in `categories`, in the order of the head's outputs (find_categories lists them).",
    )


def _segment_value(segment: dict[str, Any], checks: RowChecks) -> float | None:
    """The `label` or `score` of a segment; `None` if both are null."""
    label, score = segment.get("label"), segment.get("score")
    if label is not None and score is not None:
        raise checks.error(
            "segments",
            f"label {label!r} and score {score!r} in one segment",
            "one of them",
            "Remove the one that the model should not learn, or set it to null.",
        )
    if label is None and score is None:
        if not segment.keys() & {"label", "score"}:
            raise checks.error(
                "segments", f"a segment with {sorted(segment)} only", "a label or a score", "Add one; null masks it."
            )
        return None
    return checks.number(score if label is None else label, "segments")


def _offset(value: Any, name: str, checks: RowChecks) -> int:
    whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not whole or value != int(value):
        raise checks.error(
            "segments", f"{name} = {shown(value)}", "a whole number", "Give both offsets in characters, or both null."
        )
    return int(value)


def find_categories(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The categories of the segments of some rows, sorted. Reads all rows and skips malformed ones."""
    lists = (row["segments"] for row in rows)
    segments = (segment for listed in lists if isinstance(listed, (list, tuple)) for segment in listed)
    found = (segment.get("category") for segment in segments if isinstance(segment, dict))
    return sorted({category for category in found if isinstance(category, str)})
