"""Rows and calls that the tests of labelled spans share."""

from datasets import Dataset, IterableDataset

from tests.tiny import tiny_tokenizer
from trl_ext.data.spans import prepare_spans
from trl_ext.data.tokenization import TokenizationSettings


TOKENIZER = tiny_tokenizer("llama")
NEW = ["span_input_ids", "label_positions", "label_values", "label_categories", "label_steps"]
NEW += ["completion_start", "row_index"]


def prepare(rows, kind, tokenizer=TOKENIZER, **kwargs):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    tokenization = TokenizationSettings.for_training(tokenizer)
    return prepare_spans(
        dataset, tokenizer, **{"kind": kind, "tokenization": tokenization, "max_length": None, **kwargs}
    )


def stream_of(rows: list[dict]) -> IterableDataset:
    def generate():
        yield from rows

    return IterableDataset.from_generator(generate)


def outcome(completion=" 56.", label=True, prompt="7 * 8 =") -> dict:
    return {"prompt": prompt, "completion": completion, "label": label}


def stepwise(completions=("3 + 4 = 7.", "7 * 2 = 14."), labels=(True, False), prompt="Question: ") -> dict:
    return {"prompt": prompt, "completions": list(completions), "labels": list(labels)}


def segmented(completion, *segments, prompt="Well?") -> dict:
    keys = ("start", "end", "label", "category")
    return {
        "prompt": prompt,
        "completion": completion,
        "segments": [dict(zip(keys, segment, strict=False)) for segment in segments],
    }


def labelled_text(row: dict, tokenizer=TOKENIZER) -> list[str]:
    """Text of each labelled token."""
    return [tokenizer.decode([row["span_input_ids"][position]]) for position in row["label_positions"]]


def nonzero(report) -> dict:
    return {reason: count for reason, count in report.counts.items() if count}
