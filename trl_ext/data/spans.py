"""Tokenizes a data set of outcome, stepwise or segment rows, labels its tokens, and reports what happened.

In all three types, a label belongs to a span of characters. The whole text is tokenized once, and character offsets
put the labels on tokens. It writes *new* columns only, because `datasets` casts a rewritten column to its old type.
`span_rows` reads and checks the rows; `span_labels` chooses the tokens of a label. Knows nothing of padding, models or
losses.

Columns written: `span_input_ids` (token ids), `completion_start` (position of the completion's first token) and
`row_index` (position in the original data set). `label_positions`, `label_values`, `label_categories` (index into the
categories) and `label_steps` (number of the step or segment) have one entry per labelled token.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset, IterableDataset, List, Value

from trl_ext.data.mapping import COUNTS, map_rows, open_rows
from trl_ext.data.offsets import Located, encode_batch_with_offsets
from trl_ext.data.report import COUNTED_OF_SPANS, DataReport
from trl_ext.data.span_labels import (
    LabelPlacement,
    TokenLabels,
    mask_after_first_error,
    place_labels,
    prefix_score_differences,
)
from trl_ext.data.span_rows import (
    COLUMNS,
    TEMPLATE_COLUMNS,
    SpanFormat,
    SpanKind,
    SpanRow,
    check_columns,
    check_span_row,
    find_categories,
)
from trl_ext.data.token_ids import token_ids
from trl_ext.data.tokenization import TextRow, TokenizationSettings, Tokenizer, closing_tokens
from trl_ext.data.validation import Kind, RowChecks, named_by_row


__all__ = [
    "SpanFormat",
    "find_categories",
    "mask_after_first_error",
    "prefix_score_differences",
    "prepare_span_rows",
    "prepare_spans",
]

# Part of the cache key of `datasets`; see `formats`.
_CACHE_VERSION = 5
_FEATURES = {
    "span_input_ids": List(Value("int32")),
    "label_positions": List(Value("int32")),
    "label_values": List(Value("float64")),
    "label_categories": List(Value("int32")),
    "label_steps": List(Value("int32")),
    "completion_start": Value("int64"),
    "row_index": Value("int64"),
}


def prepare_spans(
    dataset: Dataset | IterableDataset,
    tokenizer: Tokenizer,
    *,
    kind: SpanKind,
    tokenization: TokenizationSettings,
    max_length: int | None,
    dataset_name: str = "train",
    num_proc: int | None = None,
    min_survival: float = 0.5,
    label_placement: LabelPlacement | None = None,
    categories: Sequence[str] | None = None,
    step_separator: str = "\n",
    num_labels: int = 2,
    max_completion_length: int | None = None,
    train_on_last_step_only: bool = False,
    mask_after_first_error: bool = False,
    vocab_size: int | None = None,
    max_positions: int | None = None,
) -> tuple[Dataset | IterableDataset, DataReport]:
    """Validate and tokenize the rows of a data set, and label their tokens.

    Rows that it reads, text or chat:

    | kind | columns | labelled |
    |---|---|---|
    | `"outcome"` | `prompt`, `completion`, `label` | the last message of the completion and what closes it |
    | `"stepwise"` | `prompt`, `completions` (list of steps), `labels` (list), as in TRL <= 1.13 | step + separator |
    | `"segment"` | `prompt`, `completion`, `segments`: list of `{start, end, label or score, category?}` | segment |

    Chats may also have `tools` and `chat_template_kwargs`. An outcome is a bool or the probability that the completion
    is right. EOS or the end of the turn has the label too, because the score is read at the last token. The label of a
    step is a bool, 0, 1 or a probability; with `num_labels=3` it is -1, 0 or 1. Steps after a chat prompt form one
    assistant message. The offsets of segments count characters of the completion (of messages: of the content of the
    last one). Segments may be in any order. Their label or score is a bool or any number.

    A null label means that nobody annotated the span, and it is masked. Segments of different categories may overlap;
    segments of one category may not. Segments with null offsets are skipped. Original columns stay. A prepared data
    set is returned unchanged.

    Rows longer than `max_length` tokens are dropped, and rows without a labelled token too. Segment rows without any
    segment are kept: they are correct and just have no loss. The report counts all of this, and is logged once.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows. A stream is prepared lazily.
        tokenizer: a fast transformers tokenizer. It needs a chat template if the rows are chats.
        kind (`str`): `"outcome"`, `"stepwise"` or `"segment"`.
        tokenization (`TokenizationSettings`): how plain text becomes ids.
        max_length (`int` or `None`): limit in tokens for prompt + completion; `None` for no limit.
        dataset_name (`str`, *optional*, defaults to `"train"`): name of the data set in messages.
        num_proc (`int`, *optional*): worker processes for a `Dataset`.
        min_survival (`float`, *optional*, defaults to `0.5`): smallest share of the rows that must survive.
        label_placement (`str`, *optional*): `"last"` (the token with the span's last character; the default for
            steps, where TRL <= 1.13 had it, and segments), `"all"` (every token of the span; the default for
            outcomes, as in Cobbe et al., https://huggingface.co/papers/2110.14168), or `"before"` (the token in
            front of the span, for models that read in both directions).
        categories (sequence of `str`, *optional*): names of the categories of segments, in the order of the model's
            outputs. Not needed if no segment has a category.
        step_separator (`str`, *optional*, defaults to `"\\n"`): text after each step (TRL's default).
        num_labels (`int`, *optional*, defaults to `2`): classes of a step: 1 or 2 for labels from 0 to 1, 3 for -1, 0
            and 1.
        max_completion_length (`int`, *optional*): cut completions after this many tokens, and drop later labels.
        train_on_last_step_only (`bool`, *optional*, defaults to `False`): keep the label of the last step only.
        mask_after_first_error (`bool`, *optional*, defaults to `False`): mask the labels of the steps after the first
            wrong one, for annotations that stop at it.
        vocab_size (`int`, *optional*): size of the model's vocabulary. A row with a token id that is not below it
            raises an error.
        max_positions (`int`, *optional*): longest row that the model can process, in tokens. Longer rows are dropped.

    Returns:
        The data set with the columns above, and its `DataReport`. For a stream, the report fills as rows are read.

    Raises:
        `DataError`: a row or column is malformed, or too few rows survive. For a stream it is raised when the row is
            read.
        `ValueError`: an argument is out of range.
    """
    layout = SpanFormat(
        kind=kind,
        label_placement=label_placement or ("all" if kind == "outcome" else "last"),
        categories=tuple(categories or ()),
        step_separator=step_separator,
        num_labels=num_labels,
        mask_after_first_error=mask_after_first_error,
        train_on_last_step_only=train_on_last_step_only,
    )
    if max_completion_length is not None and max_completion_length < 1:
        raise ValueError(f"max_completion_length must be at least 1, found {max_completion_length}")
    report = DataReport(
        name=dataset_name,
        max_length=max_length,
        max_positions=max_positions,
        streaming=isinstance(dataset, IterableDataset),
        reasons=COUNTED_OF_SPANS,
    )
    opened = open_rows(dataset, report, set(_FEATURES))
    if opened is None:
        return dataset, report
    dataset, columns, first = opened
    check_columns(columns, layout, dataset_name)
    arguments = {
        "tokenizer": tokenizer,
        "tokenization": tokenization,
        "layout": layout,
        "only_kind": check_span_row(first, layout, RowChecks(0, dataset_name)).kind,
        "max_length": report.limit,
        "max_completion_length": max_completion_length,
        "dataset_name": dataset_name,
        "vocab_size": vocab_size,
        "cache_version": _CACHE_VERSION,
    }
    unseen = partial(_unseen_text, tokenizer=tokenizer, tokenization=tokenization, layout=layout)
    return map_rows(dataset, prepare_span_rows, arguments, _FEATURES, report, min_survival, num_proc, unseen), report


def prepare_span_rows(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    tokenizer: Tokenizer,
    tokenization: TokenizationSettings,
    layout: SpanFormat,
    only_kind: Kind,
    max_length: int | None,
    max_completion_length: int | None,
    dataset_name: str,
    vocab_size: int | None,
    cache_version: int,
) -> dict[str, list[Any]]:
    """Makes the new columns of some rows, with their counts."""
    text, label = COLUMNS[layout.kind]
    columns = {name: batch[name] for name in ("prompt", text, label, *TEMPLATE_COLUMNS) if name in batch}
    checks = [RowChecks(index, dataset_name, vocab_size) for index in indices]
    rows = [
        check_span_row({name: values[number] for name, values in columns.items()}, layout, row_checks, only_kind)
        for number, row_checks in enumerate(checks)
    ]
    encoded = named_by_row(
        lambda texts: encode_batch_with_offsets(tokenizer, texts, tokenization),
        [[_text_row(row)] for row in rows],
        checks,
        text,
        only_kind,
    )
    unlike: list[bool] = [False] * len(rows)
    if layout.kind == "stepwise" and only_kind == "text":
        unlike = _unlike_pieces(tokenizer, rows, layout.step_separator)
    closing = 0 if max_completion_length is None or only_kind == "chat" else closing_tokens(tokenizer, tokenization)

    new: dict[str, list[Any]] = {name: [] for name in (*_FEATURES, COUNTS)}
    for row, (located,), row_checks, unlike_pieces in zip(rows, encoded, checks, unlike, strict=True):
        row_checks.known_ids(located.ids, text, tokenizer)
        ids, stop = located.ids, len(located.ids)
        if max_completion_length is not None:
            stop = min(stop, located.completion_start + max_completion_length)
            if stop < len(ids) - closing:  # the tokens with which the tokenizer closes a text stay
                ids = ids[:stop] + ids[len(ids) - closing :]
        cut = len(ids) < len(located.ids)

        whole = layout.kind == "outcome"
        if whole:
            labels = _whole_completion(located, row, layout, len(ids))
        else:
            labels = place_labels(located, row.spans, layout.label_placement)
        visible = stop - (layout.label_placement == "before")  # this label is on the token before its span
        inside = [number for number, place in enumerate(labels.positions) if whole or not cut or place < visible]
        counts = Counter({**row.counts, **labels.counts})
        counts["unseen"] = int(located.unseen is not None)
        counts["unknown"] = int(located.unknown is not None)
        counts["unseen_prompt"] = int(located.unseen_prompt is not None)
        counts["stripped"] = int(located.stripped)
        counts["cut_rows"] = int(cut)
        counts["cut_labels"] = len(labels.positions) - len(inside)
        counts["unlike_pieces"] = int(unlike_pieces)
        counts["unlabelled_rows"] = int(not inside and not counts["no_segments"])
        if max_length is not None and len(ids) > max_length:
            counts = Counter(over_long_rows=1)

        new["span_input_ids"].append(ids)
        for name in ("positions", "values", "categories", "steps"):
            values = getattr(labels, name)
            new[f"label_{name}"].append([values[number] for number in inside])
        new["completion_start"].append(located.completion_start)
        new["row_index"].append(row_checks.row)
        new[COUNTS].append([counts[reason] for reason in COUNTED_OF_SPANS])
    return new


def _text_row(row: SpanRow) -> TextRow:
    return TextRow(row.prompt, row.completion, row.tools, row.chat_template_kwargs)


def _unseen_text(
    row: dict[str, Any], tokenizer: Tokenizer, tokenization: TokenizationSettings, layout: SpanFormat
) -> str:
    """The text of a row that the model does not see."""
    text_row = _text_row(check_span_row(row, layout, RowChecks(0, "")))
    located = encode_batch_with_offsets(tokenizer, [text_row], tokenization)[0]
    return located.unseen or located.unknown or located.unseen_prompt or ""


def _whole_completion(located: Located, row: SpanRow, layout: SpanFormat, length: int) -> TokenLabels:
    """The label of an outcome row on every token from the completion's first one, or on the row's last token only."""
    positions = list(range(located.completion_start, length)) if row.spans else []
    if layout.label_placement == "last":
        positions = positions[-1:]
    count = len(positions)
    return TokenLabels(positions, [span.value for span in row.spans] * count, [0] * count, [0] * count, {})


def _unlike_pieces(tokenizer: Tokenizer, rows: Sequence[SpanRow], separator: str) -> list[bool]:
    """Whether each text has other tokens than its pieces have when tokenized one by one, without special tokens."""
    texts = [separator]
    for row in rows:
        texts += [(row.prompt or "") + row.completion, row.prompt or "", *row.steps]
    sep, *ids = token_ids(tokenizer, texts, add_special_tokens=False)
    unlike, place = [], 0
    for row in rows:
        whole, prompt, *steps = ids[place : place + 2 + len(row.steps)]
        place += 2 + len(row.steps)
        unlike.append(whole != [*prompt, *chain.from_iterable([*step, *sep] for step in steps)])
    return unlike
