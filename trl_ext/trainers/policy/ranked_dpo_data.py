"""Rows and batches of [`RankedDPOTrainer`]: where each completion begins, and the labels that a policy is scored on.

It knows tokenized groups, padding and flat rows. It knows neither models nor losses.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset, Value
from trl import maybe_extract_prompt

from trl_ext.data.collators import FLAT_BELOW, padded
from trl_ext.data.mapping import plain_rows
from trl_ext.data.prefix_layout import build_layout
from trl_ext.data.schema import Schema, check_row, find_schema
from trl_ext.data.tokenization import TextRow, TokenizationSettings, Tokenizer, prompt_length
from trl_ext.data.validation import DataError, RowChecks


IGNORED = -100
"""The label of a token that no completion is scored on."""

COLUMNS = [
    "candidate_ids",
    "candidate_ratings",
    "completion_start",
    "row_index",
    "group_margin",
    "group_target",
    "ref_chosen_logps",
]
"""The columns of a prepared row. TRL's name of the last one is kept; it holds the reference of all candidates."""


def rows_with_prompts(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """
    The plain rows, with a prompt that is no part of the completions.

    Of pairs without a column `prompt` it is what both texts begin with, as in TRL. So it is for rows of any kind whose
    prompt is a text and whose completions are whole chats.
    """
    dataset = plain_rows(dataset)
    columns = set(dataset.column_names or next(iter(dataset)))
    if columns & {"candidate_ids", "chosen_ids"}:
        raise DataError(
            "tokenized rows, which do not say where a completion begins",
            "rows of text or chats",
            "Give the rows as they were before they were tokenized.",
            column=sorted(columns & {"candidate_ids", "chosen_ids"})[0],
            dataset=name,
        )
    first = next(iter(dataset))
    if {"chosen", "rejected"} <= columns:
        if "prompt" not in columns or _is_whole_chats(first["prompt"], [first["chosen"], first["rejected"]]):
            return dataset.map(maybe_extract_prompt)
    elif {"prompt", "completions"} <= columns and _is_whole_chats(first["prompt"], first["completions"]):
        return dataset.map(_with_common_turns)
    return dataset


def _is_whole_chats(prompt: Any, completions: Any) -> bool:
    """Whether a text prompt stands beside lists of messages, which hold it too."""
    lists = isinstance(completions, list) and completions and all(isinstance(own, list) for own in completions)
    return isinstance(prompt, str) and bool(lists)


def _with_common_turns(row: dict[str, Any]) -> dict[str, Any]:
    """The messages that all chats of a row begin with are its prompt; each keeps at least its last message."""
    chats = row["completions"]
    if not _is_whole_chats(row["prompt"], chats):
        return row  # the checks of the rows say what is wrong
    most = min(map(len, chats)) - 1
    same = next((n for n in range(most) if any(chat[n] != chats[0][n] for chat in chats)), max(most, 0))
    return {"prompt": chats[0][:same], "completions": [chat[same:] for chat in chats]}


def schema_of(dataset: Dataset | IterableDataset, name: str, needs_ratings: bool) -> Schema:
    """What the columns of the rows mean."""
    first = next(iter(dataset))
    columns = dataset.column_names or list(first)
    return find_schema(columns, first, name, loss_needs_ratings=needs_ratings, use_pair_ratings=needs_ratings)


def with_completion_starts(
    prepared: Dataset | IterableDataset,
    schema: Schema,
    tokenizer: Tokenizer,
    tokenization: TokenizationSettings,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Add `completion_start` to the rows of `prepare_groups`: the number of leading tokens that come from the prompt.

    A completion begins where the ids of the prompt alone and the ids of prompt and completion part, for the candidate
    where this happens first, as in `trl.DPOTrainer`.
    """
    arguments = {"schema": schema, "tokenizer": tokenizer, "tokenization": tokenization}
    options: dict[str, Any] = {"fn_kwargs": arguments}
    if isinstance(prepared, Dataset):
        features = prepared.features.copy()
        features["completion_start"] = Value("int64")
        options |= {"num_proc": num_proc, "features": features, "desc": "Finding where completions begin"}
    return prepared.map(_completion_start, **options)


def _completion_start(
    row: dict[str, Any], schema: Schema, tokenizer: Tokenizer, tokenization: TokenizationSettings
) -> dict[str, int]:
    group = check_row({name: row[name] for name in schema.columns if name in row}, schema, RowChecks(0, ""))
    text = TextRow(group.prompt, group.completions[0], group.tools, group.chat_template_kwargs)
    return {"completion_start": min(prompt_length(tokenizer, text, row["candidate_ids"], tokenization))}


@dataclass
class RankedDPOCollator:
    """
    Collate prepared groups for a policy's log-probabilities.

    A flat row holds the prompt of a group without its last token, and then each completion with that token before it:
    the first token of every completion is predicted there. It costs one more token for each further completion.

    Args:
        pad_token_id (`int`): id that fills `input_ids`.
        pad_to_multiple_of (`int`, *optional*): round T up to a multiple of this.
        shared_prefix (`bool`, *optional*, defaults to `False`): lay a batch out as one flat row, if that saves at
            least 5 % of the tokens.

    Returns (by `__call__`):
        - `ratings` (B, K) float32 and `group_mask` (B, K) bool, True = a real candidate; N is its sum
        - `row_index` (B,) int64; `margin` (B,) and `target` (B,) float32, if the rows have them
        - `ref_logps` (B, K) float32, if the rows have precomputed log-probabilities of the reference
        - `input_ids` and `labels` of the same shape, int64: the label of a completion's token is its id, of every
          other token -100; `owner`, of that shape too: the number of the candidate (of N) that a token belongs to
        - (N, T) padded on the right with `attention_mask`, or (1, L) with `prefix_layout`

    Example:

    ```python
    >>> rows = [
    ...     {"candidate_ids": [[5, 6, 7], [5, 6, 8, 9]], "candidate_ratings": [1.0, 0.0], "completion_start": 2}
    ... ]
    >>> RankedDPOCollator(pad_token_id=0)([{**row, "row_index": 0} for row in rows])["labels"]
    tensor([[-100, -100,    7, -100],
            [-100, -100,    8,    9]])
    ```
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    shared_prefix: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        largest = max(len(row["candidate_ids"]) for row in rows)

        def filled(values: list, empty: float = 0.0) -> list:
            return [*values, *[empty] * (largest - len(values))]

        batch: dict[str, Any] = {
            "ratings": torch.tensor([filled(row["candidate_ratings"]) for row in rows], dtype=torch.float32),
            "group_mask": torch.tensor([filled([True] * len(row["candidate_ids"]), False) for row in rows]),
            "row_index": torch.tensor([row["row_index"] for row in rows]),
        }
        for name, column in (("margin", "group_margin"), ("target", "group_target")):
            if column in rows[0]:
                batch[name] = torch.tensor([row[column] for row in rows], dtype=torch.float32)
        if "ref_chosen_logps" in rows[0]:
            batch["ref_logps"] = torch.tensor([row["ref_chosen_logps"][:largest] for row in rows])
        sequences = [ids for row in rows for ids in row["candidate_ids"]]
        starts = [row["completion_start"] for row in rows for _ in row["candidate_ids"]]
        if self.shared_prefix:
            shared = [max(row["completion_start"] - 1, 0) for row in rows]
            size = sum(map(len, sequences))
            size -= sum((len(row["candidate_ids"]) - 1) * own for row, own in zip(rows, shared, strict=True))
            if size < FLAT_BELOW * len(sequences) * max(map(len, sequences)):
                return {**batch, **_flat(rows, shared)}
        made = padded(sequences, self.pad_token_id, self.pad_to_multiple_of)
        places = torch.arange(made["input_ids"].shape[1])
        scored = made["attention_mask"].bool() & (places >= torch.tensor(starts)[:, None])
        owner = torch.arange(len(sequences))[:, None].expand_as(scored).contiguous()
        return {**batch, **made, "labels": made["input_ids"].masked_fill(~scored, IGNORED), "owner": owner}


def _flat(rows: list[dict[str, Any]], shared: list[int]) -> dict[str, Any]:
    """The groups as one flat row."""
    groups = [
        (row["candidate_ids"][0][:length], [ids[length:] for ids in row["candidate_ids"]])
        for row, length in zip(rows, shared, strict=True)
    ]
    layout = build_layout(groups)
    labels, owner = torch.full_like(layout.input_ids, IGNORED), torch.zeros_like(layout.input_ids)
    for number, own in enumerate(layout.completions):
        labels[0, own.start + 1 : own.end] = layout.input_ids[0, own.start + 1 : own.end]
        owner[0, own.start : own.end] = number
    return {"input_ids": layout.input_ids, "labels": labels, "owner": owner, "prefix_layout": layout}
