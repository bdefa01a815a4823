"""Malformed outcome, stepwise and segment rows: each gives a DataError with row, column and cure."""

import pytest
from datasets import Dataset, IterableDataset

from tests.tiny import tiny_tokenizer
from trl_ext.data.spans import find_categories, prepare_spans
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.data.validation import DataError


TOKENIZER = tiny_tokenizer("llama")
NAN = float("nan")
USER = [{"role": "user", "content": "hello"}]


def prepare(dataset, kind, tokenizer=TOKENIZER, **kwargs):
    tokenization = TokenizationSettings.for_training(tokenizer)
    return prepare_spans(
        dataset, tokenizer, **{"kind": kind, "tokenization": tokenization, "max_length": None, **kwargs}
    )


def outcome(**changes) -> dict:
    return {"prompt": "a", "completion": "b c", "label": True, **changes}


def steps(**changes) -> dict:
    return {"prompt": "a", "completions": ["b", "c"], "labels": [1, 0], **changes}


def segment(**changes) -> dict:
    return {"start": 0, "end": 4, "label": 1.0, "category": "x", **changes}


def segments(*values) -> dict:
    return {"prompt": "a", "completion": "b cd é", "segments": list(values)}


GOOD = {
    "outcome": outcome(),
    "chat": outcome(prompt=USER),
    "stepwise": steps(),
    "three": steps(labels=[1, -1]),
    "segment": segments(segment()),
}
# name -> (kind, bad row, column, what the message must contain)
BAD_ROWS = {
    "empty completion": ("outcome", outcome(completion=""), "completion", "an empty string"),
    "None completion": ("outcome", outcome(completion=None), "completion", "found None"),
    "list for string": ("outcome", outcome(completion=["b"]), "completion", "a list that holds str 'b'"),
    "text label": ("outcome", outcome(label="yes"), "label", "found str 'yes'; needed a finite number from 0 to 1"),
    "label above 1": ("outcome", outcome(label=2), "label", "found int 2"),
    "NaN label": ("outcome", outcome(label=NAN), "label", "found float nan"),
    "non-dict message": ("outcome", outcome(prompt=["a"]), "prompt", "a list that holds str 'a'"),
    "chat row among text rows": ("outcome", outcome(prompt=USER), "completion", "needed text rows, as row 0 is one"),
    "no text at the end": (
        "chat",
        outcome(prompt=USER, completion=[{"role": "assistant", "tool_calls": [{"name": "f"}]}]),
        "completion",
        "text as the content of the last message",
    ),
    "a picture for text": (
        "chat",
        outcome(prompt=USER, completion=[{"role": "assistant", "content": [{"type": "image", "url": "b.png"}]}]),
        "completion",
        "a message with the content list",
    ),
    "string for steps": ("stepwise", steps(completions="bc"), "completions", "a list of steps"),
    "no steps": ("stepwise", steps(completions=[], labels=[]), "completions", "a list of steps"),
    "None step": ("stepwise", steps(completions=["b", None]), "completions", "the step None"),
    "message as step": ("stepwise", steps(completions=["b", USER[0]]), "completions", "without roles"),
    "too few labels": ("stepwise", steps(labels=[1]), "labels", "found 1 values; needed a list of 2"),
    "too many labels": ("stepwise", steps(labels=[1, 0, 1]), "labels", "found 3 values; needed a list of 2"),
    "None labels": ("stepwise", steps(labels=None), "labels", "found None; needed a list of 2"),
    "-1 for two classes": ("stepwise", steps(labels=[1, -1]), "labels", "Use num_labels=3"),
    "label above 1 for two classes": ("stepwise", steps(labels=[1, 1.5]), "labels", "from 0 to 1"),
    "bool for three classes": ("three", steps(labels=[True, False]), "labels", "found bool True"),
    "fraction for three classes": ("three", steps(labels=[1, 0.5]), "labels", "found float 0.5"),
    "text for three classes": ("three", steps(labels=["+", "-"]), "labels", "found str '+'"),
    "NaN for three classes": ("three", steps(labels=[1.0, NAN]), "labels", "found float nan"),
    "segments that are no list": (
        "segment",
        {**segments(), "segments": {"start": [0]}},
        "segments",
        "needed a list of segments",
    ),
    "segment that is no dictionary": ("segment", segments([0, 4]), "segments", "found list [0, 4]"),
    "span outside of the text": ("segment", segments(segment(end=7)), "segments", "0 to 7 in a completion of 6"),
    "span before the text": ("segment", segments(segment(start=-1)), "segments", "a span outside of the text: -1"),
    "byte offsets": ("segment", segments(segment(end=len("b cd é".encode()))), "segments", "(not bytes)"),
    "empty span": ("segment", segments(segment(start=4)), "segments", "an empty span: 4 to 4"),
    "reversed span": ("segment", segments(segment(start=4, end=1)), "segments", "a span outside of the text: 4 to 1"),
    "half an offset": ("segment", segments(segment(start=0.5)), "segments", "start = float 0.5"),
    "text offset": ("segment", segments(segment(end="4")), "segments", "end = str '4'"),
    "overlap in a category": (
        "segment",
        segments(segment(start=3, end=6), segment(start=0, end=4)),
        "segments",
        "overlapping spans of one category: 0 to 4 and 3 to 6",
    ),
    "overlap with a null label": (
        "segment",
        segments(segment(), segment(start=3, end=6, label=None)),
        "segments",
        "overlapping",
    ),
    "unknown category": ("segment", segments(segment(category="z")), "segments", "the unknown category 'z'"),
    "no category": ("segment", segments(segment(category=None)), "segments", "a segment without a category"),
    "label and score": ("segment", segments(segment(score=0.5)), "segments", "label 1.0 and score 0.5"),
    "neither label nor score": (
        "segment",
        segments({"start": 0, "end": 1, "category": "x"}),
        "segments",
        "a label or",
    ),
    "infinite label": ("segment", segments(segment(label=float("inf"))), "segments", "found float inf"),
    "text label of a segment": ("segment", segments(segment(label="bad")), "segments", "found str 'bad'"),
}
ARROW_CANNOT_HOLD = {  # mixed types in a column exist in a stream only
    "list for string", "text label", "label above 1", "NaN label", "non-dict message",
    "chat row among text rows", "no text at the end",
    "a picture for text", "string for steps", "message as step", "bool for three classes", "text for three classes",
    "segments that are no list", "segment that is no dictionary", "text offset", "text label of a segment",
    "neither label nor score",  # becomes a null label
}  # fmt: skip


def arguments(kind: str) -> dict:
    if kind == "three":
        return {"kind": "stepwise", "num_labels": 3}
    kind = "outcome" if kind == "chat" else kind
    return {"kind": kind, "categories": ["x", "y"] if kind == "segment" else None}


def check(error: DataError, row: int, column: str, message: str) -> None:
    assert (error.row, error.column) == (row, column)
    text = str(error)
    assert text.startswith(f"train data, row {row}, column {column!r}: found ")
    assert message in text
    assert "; needed " in text and error.fix and text.endswith(error.fix)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_in_a_stream(name):
    kind, bad, column, message = BAD_ROWS[name]

    def generate():
        yield from [GOOD[kind], GOOD[kind], bad]

    stream, _ = prepare(IterableDataset.from_generator(generate), **arguments(kind))
    rows = iter(stream)
    next(rows)
    next(rows)
    with pytest.raises(DataError) as caught:
        next(rows)
    check(caught.value, 2, column, message)


@pytest.mark.parametrize("name", [name for name in BAD_ROWS if name not in ARROW_CANNOT_HOLD])
def test_bad_row_in_a_data_set(name):
    kind, bad, column, message = BAD_ROWS[name]
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list([GOOD[kind], bad]), **arguments(kind))
    check(caught.value, 1, column, message)
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list([bad]), **arguments(kind))
    assert (caught.value.row, caught.value.column) == (0, column)


def test_good_rows_are_good():
    for kind, row in GOOD.items():
        assert prepare(Dataset.from_list([row]), **arguments(kind))[1].kept == 1
    touching = segments(segment(), segment(start=4, end=6), segment(start=2, end=5, category="y"))
    assert prepare(Dataset.from_list([touching]), **arguments("segment"))[1].kept == 1


@pytest.mark.parametrize(
    ("kind", "row", "column"),
    [
        ("outcome", {"prompt": "a", "completion": "b"}, "label"),
        ("outcome", {"completion": "b", "label": True}, "prompt"),
        ("outcome", steps(), "completion"),
        ("stepwise", outcome(), "completions"),
        ("stepwise", {"prompt": "a", "completions": ["b"]}, "labels"),
        ("segment", outcome(), "segments"),
    ],
)
def test_missing_column(kind, row, column):
    with pytest.raises(DataError, match=f"no such column among.*{kind} rows need") as caught:
        prepare(Dataset.from_list([row]), kind)
    assert (caught.value.row, caught.value.column) == (0, column)


def test_reserved_column_and_no_rows():
    with pytest.raises(DataError, match="column 'label_steps': found a column of that name"):
        prepare(Dataset.from_list([outcome(label_steps=[1])]), "outcome")
    with pytest.raises(DataError, match="found no rows"):
        prepare(Dataset.from_list([outcome()]).select([]), "outcome")


def test_categories_must_be_named_where_there_are_some():
    with pytest.raises(DataError, match="no category, as `categories` is not given.*find_categories"):
        prepare(Dataset.from_list([segments(segment())]), "segment")
    prepared, _ = prepare(Dataset.from_list([segments(segment(category=None))]), "segment", categories=["x"])
    assert prepared[0]["label_categories"] == [0]


@pytest.mark.parametrize(
    "malformed",
    [["x"], "[{}]", {"start": [0], "end": [1], "label": [1.0]}, None, [segment(category=["a", "b"])]],
    ids=["strings", "json", "columns", "null", "list of categories"],
)
def test_looking_for_categories_leaves_malformed_segments_to_the_row_checks(malformed):
    good = segments(segment(category="b"), segment(category="a"), segment(category=None))
    assert find_categories([{"segments": malformed}, good]) == ["a", "b"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "pairs"}, "kind must be one of outcome, stepwise, segment"),
        ({"kind": "segment", "label_placement": "first"}, "label_placement must be"),
        ({"kind": "outcome", "label_placement": "before"}, "would label the prompt"),
        ({"kind": "stepwise", "num_labels": 4}, "num_labels must be 1 or 2"),
        ({"kind": "segment", "categories": ["x", "x"]}, "categories must differ"),
        ({"kind": "stepwise", "max_completion_length": 0}, "at least 1"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prepare(Dataset.from_list([outcome()]), **kwargs)


def test_error_crosses_worker_processes():
    rows = [steps()] * 3 + [steps(labels=[1])]
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list(rows), "stepwise", num_proc=2)
    assert (caught.value.row, caught.value.column) == (3, "labels")
