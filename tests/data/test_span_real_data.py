"""The real outcome, step and segment data: every row goes in or is named, and labels are where they belong."""

import json

import pytest
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer

from tests.tiny import tiny_tokenizer
from trl_ext.data.collators import SpanCollator
from trl_ext.data.segmentation import sentences
from trl_ext.data.spans import find_categories, prepare_spans
from trl_ext.data.tokenization import TokenizationSettings, encode


# Rows and steps (and rows with a mistake) of each task, from the data's own description.
STEPWISE = {
    "word_sorting": (300, 3508, 266),
    "tracking_shuffled_objects": (300, 1617, 260),
    "logical_deduction": (300, 2497, 294),
    "multistep_arithmetic": (300, 1506, 238),
    "dyck_languages": (986, 24178, 650),
}


def read(path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    return rows


def prepare(rows, tokenizer, **kwargs):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    tokenization = TokenizationSettings.for_training(tokenizer)
    return prepare_spans(dataset, tokenizer, **{"tokenization": tokenization, "max_length": None, **kwargs})


def text_until(row: dict, position: int, tokenizer) -> str:
    return tokenizer.decode(row["span_input_ids"][: position + 1], skip_special_tokens=True)


def test_orm_gsm8k(data_dir):
    path = data_dir / "orm_gsm8k" / "model_solutions.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "stories260K")
    rows = read(path)[:600]
    prepared, report = prepare(rows, tokenizer, kind="outcome", max_length=1024)
    assert report.rows == 600 and report.kept == len(prepared) > 590
    tokenization = TokenizationSettings.for_training(tokenizer)
    for new in prepared.select(range(50)):
        row = rows[new["row_index"]]
        ids = encode(tokenizer, row["prompt"], row["completion"], tokenization).ids
        assert new["span_input_ids"] == ids
        assert new["label_positions"] == list(range(new["completion_start"], len(ids)))
        assert set(new["label_values"]) == {float(row["label"])}
        assert new["completion_start"] > len(row["prompt"]) // 8
    stream = load_dataset("json", data_files=str(path), split="train", streaming=True).take(100)
    streamed, _ = prepare(stream, tokenizer, kind="outcome", max_length=1024)
    first = list(streamed)
    assert [row["label_positions"] for row in first] == prepared["label_positions"][: len(first)]
    batch = SpanCollator(tokenizer.pad_token_id)(first[:8])
    assert batch["label_mask"].any(dim=(1, 2)).all()


@pytest.mark.parametrize(("task", "kind"), [*((task, "real") for task in STEPWISE), ("dyck_languages", "qwen")])
def test_steps_of_bigbench_mistake(data_dir, task, kind):
    rows = read(data_dir / "steps_bigbench_mistake" / f"{task}.jsonl")
    number, steps, mistakes = STEPWISE[task]
    assert (len(rows), sum(len(row["completions"]) for row in rows)) == (number, steps)
    assert sum(row["mistake_index"] is not None for row in rows) == mistakes
    real = kind == "real"
    if not real:
        rows = rows[500:600]  # the empty step is in 538
        number, steps = 100, sum(len(row["completions"]) for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "stories260K") if real else tiny_tokenizer(kind)
    prepared, report = prepare(rows, tokenizer, kind="stepwise")
    assert report.kept == number and "answer" in prepared.column_names
    empty = sum(not step for row in rows for step in row["completions"])
    assert report.counts["empty_steps"] == empty == (task == "dyck_languages")
    found = sum(len(labels) for labels in prepared["label_positions"])
    # SentencePiece-like tokenizers keep newlines apart; in Qwen's the empty step shares "\n\n" with the one before.
    shared = report.counts["shared"] + 2 * (report.counts["conflicting"] // 2)
    assert shared == (empty if kind == "qwen" else 0)
    assert found == steps - shared
    assert report.counts["no_token"] == 0
    for row in prepared.select(range(0, number, 150)):
        prefix = row["prompt"]
        ends = []
        for step in row["completions"]:
            prefix += step + "\n"
            ends.append(prefix)
        for position, step, value in zip(row["label_positions"], row["label_steps"], row["label_values"], strict=True):
            assert text_until(row, position, tokenizer).startswith(ends[step])
            assert not text_until(row, position - 1, tokenizer).startswith(ends[step])
            assert value == float(row["labels"][step])

    rows = rows[:200]
    mistakes = sum(row["mistake_index"] is not None for row in rows)
    masked, report = prepare(rows, tokenizer, kind="stepwise", mask_after_first_error=True)
    wrong = [values.count(0.0) for values in masked["label_values"]]
    assert max(wrong) == 1 and sum(wrong) == mistakes
    for row in masked:
        if row["mistake_index"] is not None:
            assert row["label_steps"][-1] == row["mistake_index"] and row["label_values"][-1] == 0.0
    after = sum(len(row["labels"]) - 1 - row["mistake_index"] for row in rows if row["mistake_index"] is not None)
    assert report.counts["after_error"] == after


def derived_segments(row: dict) -> list[dict]:
    """Two categories of a derived row in our layout."""
    return [
        {"start": segment["start"], "end": segment["end"], "label": segment[category], "category": category}
        for segment in row["segments"]
        for category in ("relevance", "factuality")
    ]


def finegrained_rows(data_dir) -> list[dict]:
    """Relevance of sub-sentences and factuality of sentences over one completion, as the annotation has it."""
    derived = read(data_dir / "segment_finegrained" / "segments_derived.jsonl")
    prompts = {row["id"]: row["prompt"] for row in read(data_dir / "segment_finegrained" / "prompts.jsonl")}
    rows: dict[str, dict] = {}
    for row in derived:
        category = "factuality" if row["level"] == "sentence" else "relevance"
        new = rows.setdefault(
            row["id"], {"prompt": prompts[row["id"]], "completion": row["completion"], "segments": []}
        )
        new["segments"] += [segment for segment in derived_segments(row) if segment["category"] == category]
    return list(rows.values())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_segment_finegrained_two_categories_at_two_grains(data_dir, kind):
    rows = finegrained_rows(data_dir)
    assert len(rows) == 500 and sum(not row["completion"].isascii() for row in rows) == 50
    assert find_categories(rows) == ["factuality", "relevance"]
    tokenizer = tiny_tokenizer(kind)
    prepared, report = prepare(rows, tokenizer, kind="segment", categories=["relevance", "factuality"])
    nulls = sum(segment["label"] is None for row in rows for segment in row["segments"])
    total = sum(len(row["segments"]) for row in rows)
    assert report.counts["unannotated"] == nulls > 0
    assert report.counts["shared"] == report.counts["conflicting"] == report.counts["no_token"] == 0
    assert sum(len(values) for values in prepared["label_values"]) == total - nulls
    assert report.kept + report.counts["unlabelled_rows"] == 500
    checked = 0
    for row in prepared:
        if row["completion"].isascii() or kind == "bert":
            continue
        for position, value, category, step in zip(
            *(row[f"label_{name}"] for name in ("positions", "values", "categories", "steps")), strict=True
        ):
            segment = row["segments"][step]
            prefix = row["prompt"] + row["completion"][: segment["end"]]
            assert text_until(row, position, tokenizer).startswith(prefix)
            assert not text_until(row, position - 1, tokenizer).startswith(prefix)
            assert (value, ["relevance", "factuality"][category]) == (segment["label"], segment["category"])
            checked += 1
    assert checked > 200 or kind == "bert"
    batch = SpanCollator(0, num_categories=2)([prepared[i] for i in range(4)])
    assert batch["label_mask"].any(dim=(0, 1)).all()


def test_segment_finegrained_human_spans(data_dir):
    rows = read(data_dir / "segment_finegrained" / "dev_feedback.jsonl")
    given = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": row["completion"],
            "segments": [
                {"start": span["start"], "end": span["end"], "score": -1.0, "category": span["error_type"]}
                for span in reversed(row["spans"])
            ]
            + [{"start": None, "end": None, "score": -0.5, "category": "Missing"} for _ in row["missing_info"]],
        }
        for row in rows
    ]
    categories = find_categories(given)
    assert len(categories) == 6
    prepared, report = prepare(
        given, tiny_tokenizer("qwen"), kind="segment", categories=categories, label_placement="all"
    )
    assert report.counts["no_offsets"] == 842
    without = sum(not row["segments"] for row in given)
    assert report.counts["no_segments"] == without > 0
    labelled = [set(zip(row["label_steps"], row["label_categories"], strict=True)) for row in prepared]
    assert sum(len(spans) for spans in labelled) == 1373
    assert report.kept == sum(bool(spans) for spans in labelled) + without
    tokenizer = tiny_tokenizer("qwen")
    for row in prepared.select(range(0, len(prepared), 10)):
        for step in set(row["label_steps"]):
            segment = row["segments"][step]
            tokens = [p for p, s in zip(row["label_positions"], row["label_steps"], strict=True) if s == step]
            text = tokenizer.decode([row["span_input_ids"][token] for token in tokens])
            assert row["completion"][segment["start"] : segment["end"]].strip() in text


def test_sentences_of_real_completions(data_dir):
    rows = [
        row for row in read(data_dir / "segment_finegrained" / "segments_derived.jsonl") if row["level"] == "sentence"
    ]
    same = 0
    for row in rows:
        spans = sentences(row["completion"])
        assert "".join(row["completion"][start:end] for start, end in spans) == row["completion"]
        same += [segment["start"] for segment in row["segments"]] == [start for start, _ in spans]
    assert same / len(rows) > 0.85  # the derived segments come from a regular expression
