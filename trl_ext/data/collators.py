"""Lists -> tensors: collators that pad rows or lay them out flat. Knows neither tokenizers nor losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.data.prefix_layout import build_layout, split_prefix


FLAT_BELOW = 0.95
"""A batch is laid out flat if the flat row has less than this share of the padded tokens. At a share near 1 the flat
layout would be up to 2 % slower."""


@dataclass
class GroupCollator:
    """Collate groups with any number of candidates each (the rows of `prepare_groups`).

    Candidates are stacked group after group into one batch of N sequences; per-group tensors are padded to the largest
    group, K. `ratings` comes first, because some code counts the rows of a batch by its first tensor: it then counts
    groups.

    Args:
        pad_token_id (`int`): id that fills `input_ids` (any valid id: the attention mask says what is real).
        pad_to_multiple_of (`int`, *optional*): round T up to a multiple of this.
        shared_prefix (`bool`, *optional*, defaults to `False`): lay a batch out as one flat row that holds each shared
            prompt once ([`PrefixLayout`]), if that saves at least 5 % of the tokens. Such a batch has `prefix_layout`
            instead of `input_ids` and `attention_mask`.

    Returns (by `__call__`), in this order:
        - `ratings` (B, K) float32, 0 where there is no candidate
        - `group_mask` (B, K) bool, True = a real candidate; N is its sum
        - `completion_lengths` (B, K) int64: tokens after the prefix that all candidates of the group share
        - `row_index` (B,) int64
        - `margin` (B,) float32 and `target` (B,) float32, if the rows have `group_margin` and `group_target`
        - `input_ids` (N, T) int64 and `attention_mask` (N, T) int64, padded on the right

    Raises:
        `ValueError`: there are no rows, or a row has another number of candidates than of ratings.

    Example:

    ```python
    >>> collator = GroupCollator(pad_token_id=0)
    >>> collator(
    ...     [
    ...         {"candidate_ids": [[5, 6, 7], [5, 8]], "candidate_ratings": [1.0, 0.0], "row_index": 3},
    ...         {"candidate_ids": [[9, 1], [9, 2], [9]], "candidate_ratings": [2.0, 5.0, 2.0], "row_index": 4},
    ...     ]
    ... )
    {'ratings': tensor([[1., 0., 0.],
            [2., 5., 2.]]),
     'group_mask': tensor([[ True,  True, False],
            [ True,  True,  True]]),
     'completion_lengths': tensor([[2, 1, 0],
            [2, 2, 1]]),
     'row_index': tensor([3, 4]),
     'input_ids': tensor([[5, 6, 7],
            [5, 8, 0],
            [9, 1, 0],
            [9, 2, 0],
            [9, 0, 0]]),
     'attention_mask': tensor([[1, 1, 1],
            [1, 1, 0],
            [1, 1, 0],
            [1, 1, 0],
            [1, 0, 0]])}
    ```
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    shared_prefix: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise ValueError("a batch needs at least one row, found none")
        largest = max(len(row["candidate_ids"]) for row in rows)
        ratings, group_mask, lengths, parts = [], [], [], []
        for row in rows:
            size = len(row["candidate_ids"])
            if len(row["candidate_ratings"]) != size:
                raise ValueError(
                    f"row {row['row_index']} has {size} candidates and {len(row['candidate_ratings'])} ratings; "
                    "prepare the data set with prepare_groups"
                )
            parts.append(split_prefix(row["candidate_ids"]))
            missing = [0] * (largest - size)
            ratings.append([*row["candidate_ratings"], *missing])
            group_mask.append([*[True] * size, *missing])
            lengths.append([*map(len, parts[-1][1]), *missing])

        batch = {
            "ratings": torch.tensor(ratings, dtype=torch.float32),  # (B, K)
            "group_mask": torch.tensor(group_mask, dtype=torch.bool),  # (B, K)
            "completion_lengths": torch.tensor(lengths),  # (B, K)
            "row_index": torch.tensor([row["row_index"] for row in rows]),
        }
        for name, column in (("margin", "group_margin"), ("target", "group_target")):
            if column in rows[0]:
                batch[name] = torch.tensor([row[column] for row in rows], dtype=torch.float32)

        sequences = [ids for row in rows for ids in row["candidate_ids"]]
        flat_tokens = sum(map(len, sequences)) - sum((len(own) - 1) * len(prefix) for prefix, own in parts)
        if self.shared_prefix and flat_tokens < FLAT_BELOW * len(sequences) * max(map(len, sequences)):
            return {**batch, "prefix_layout": build_layout(parts)}
        return {**batch, **padded(sequences, self.pad_token_id, self.pad_to_multiple_of)}


@dataclass
class SpanCollator:
    """Collate labelled sequences (the rows of `prepare_spans`).

    Args:
        pad_token_id (`int`): id that fills `input_ids` (any valid id: the attention mask says what is real).
        num_categories (`int`, *optional*, defaults to `1`): G, the number of categories.
        pad_to_multiple_of (`int`, *optional*): round T up to a multiple of this.
        shared_prefix (`bool`, *optional*, defaults to `False`): also lay a batch out as one flat row, if that saves at
            least 5 % of the tokens. Rows with the same prompt then share it. Rows of different ensemble members
            (column `member`) share nothing.

    Returns (by `__call__`), in this order:
        - `token_labels` (B, T, G) float32, 0 where there is no label
        - `label_mask` (B, T, G) bool, True = the token has a label
        - `label_steps` (B, T, G) int64: the step or segment of the row that the label belongs to, -1 if there is none
        - `completion_start` (B,) int64: position of the completion's first token
        - `row_index` (B,) int64
        - `input_ids` (B, T) int64 and `attention_mask` (B, T) int64, padded on the right
        - for a flat row, `prefix_layout` ([`PrefixLayout`]) and `token_index` (B, T) int64: the index of each token in
          the flat row (0 for padding)

    Raises:
        `ValueError`: there are no rows, or the category of a label is not below `num_categories`.

    Example:

    ```python
    >>> collator = SpanCollator(pad_token_id=0)
    >>> collator(
    ...     [
    ...         {
    ...             "span_input_ids": [5, 6, 7],
    ...             "label_positions": [1, 2],
    ...             "label_values": [1.0, -1.0],
    ...             "label_categories": [0, 0],
    ...             "label_steps": [0, 1],
    ...             "completion_start": 1,
    ...             "row_index": 3,
    ...         }
    ...     ]
    ... )
    {'token_labels': tensor([[[ 0.],
             [ 1.],
             [-1.]]]),
     'label_mask': tensor([[[False],
             [ True],
             [ True]]]),
     'label_steps': tensor([[[-1],
             [ 0],
             [ 1]]]),
     'completion_start': tensor([1]),
     'row_index': tensor([3]),
     'input_ids': tensor([[5, 6, 7]]),
     'attention_mask': tensor([[1, 1, 1]])}
    ```
    """

    pad_token_id: int
    num_categories: int = 1
    pad_to_multiple_of: int | None = None
    shared_prefix: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise ValueError("a batch needs at least one row, found none")
        batch = padded([row["span_input_ids"] for row in rows], self.pad_token_id, self.pad_to_multiple_of)
        shape = (*batch["input_ids"].shape, self.num_categories)
        labels = torch.zeros(shape)  # (B, T, G)
        mask = torch.zeros(shape, dtype=torch.bool)  # (B, T, G)
        steps = torch.full(shape, -1, dtype=torch.int64)  # (B, T, G)
        for number, row in enumerate(rows):
            if max(row["label_categories"], default=0) >= self.num_categories:
                raise ValueError(
                    f"row {row['row_index']} has a label of category {max(row['label_categories'])}, but "
                    f"num_categories is {self.num_categories}; give the number of categories in the data"
                )
            where = (number, row["label_positions"], row["label_categories"])
            labels[where] = torch.tensor(row["label_values"], dtype=torch.float32)
            mask[where] = True
            steps[where] = torch.tensor(row["label_steps"], dtype=torch.int64)
        return {
            "token_labels": labels,
            "label_mask": mask,
            "label_steps": steps,
            "completion_start": torch.tensor([row["completion_start"] for row in rows]),
            "row_index": torch.tensor([row["row_index"] for row in rows]),
            **batch,
            **(_flat(rows, batch["input_ids"].shape[1]) if self.shared_prefix else {}),
        }


def _flat(rows: list[dict[str, Any]], width: int) -> dict[str, Any]:
    """`prefix_layout` and `token_index` of rows with labelled spans; empty if the flat row saves too little."""
    groups: dict[tuple[int | None, ...] | int, list[int]] = {}
    for number, row in enumerate(rows):
        ids, start = row["span_input_ids"], row["completion_start"]
        prompt = (row.get("member"), *ids[:start])
        groups.setdefault(prompt if 0 < start < len(ids) else number, []).append(number)
    parts = [split_prefix([rows[number]["span_input_ids"] for number in numbers]) for numbers in groups.values()]
    layout = build_layout(parts)
    if layout.num_tokens >= FLAT_BELOW * layout.padded_tokens:
        return {}
    index = torch.zeros(len(rows), width, dtype=torch.int64)  # (B, T)
    place = 0  # in the flat row, which holds a prompt, its completions, the next prompt, ...
    for numbers, (prefix, completions) in zip(groups.values(), parts, strict=True):
        index[numbers, : len(prefix)] = torch.arange(place, place + len(prefix))
        place += len(prefix)
        for number, own in zip(numbers, completions, strict=True):
            index[number, len(prefix) : len(prefix) + len(own)] = torch.arange(place, place + len(own))
            place += len(own)
    return {"prefix_layout": layout, "token_index": index}


def padded(
    sequences: Sequence[Sequence[int]], pad_token_id: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of sequences of token ids, both (N, T) int64, padded on the right."""
    width = max(len(ids) for ids in sequences)
    if multiple is not None:
        width = -(-width // multiple) * multiple
    input_ids = torch.tensor([[*ids, *[pad_token_id] * (width - len(ids))] for ids in sequences])  # (N, T)
    lengths = torch.tensor([len(ids) for ids in sequences])  # (N,)
    return {"input_ids": input_ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}
