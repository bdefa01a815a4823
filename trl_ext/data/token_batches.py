"""Groups rows into batches by their number of tokens, and keeps rows of the same prompt together.

Knows lengths and prompts of tokenized rows, and the size of a batch of them. Knows nothing of text, models or loaders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset

from trl_ext.data.collators import FLAT_BELOW
from trl_ext.data.tokenization import common_prefix_length


@dataclass(frozen=True)
class RowSize:
    """
    The tokens and sequences that a row adds to a batch.

    Args:
        flat (`int`): tokens of the row in a flat layout.
        sequences (`int`): sequences of the row in a padded layout (the candidates of a group).
        longest (`int`): tokens of the longest sequence.
        prompt (`int`, *optional*): a hash of the prompt. Rows with the same hash share their first `prompt_tokens`
            tokens, and a flat layout holds these tokens once.
        prompt_tokens (`int`): tokens of the prompt.
    """

    flat: int
    sequences: int
    longest: int
    prompt: int | None = None
    prompt_tokens: int = 0


def group_sizes(dataset: Dataset, shared_prefix: bool) -> list[RowSize]:
    """The sizes of prepared groups (`candidate_ids`). Common prefixes count only if `shared_prefix` is set."""
    sizes = []
    for batch in dataset.select_columns(["candidate_ids"]).iter(batch_size=1024):
        for candidates in batch["candidate_ids"]:
            shared = common_prefix_length(candidates) if shared_prefix else 0
            lengths = [len(ids) for ids in candidates]
            sizes.append(RowSize(sum(lengths) - (len(lengths) - 1) * shared, len(lengths), max(lengths)))
    return sizes


def span_sizes(dataset: Dataset) -> list[RowSize]:
    """The sizes of prepared rows with labelled spans (`span_input_ids`, `completion_start`)."""
    sizes = []
    for batch in dataset.select_columns(["span_input_ids", "completion_start"]).iter(batch_size=1024):
        for ids, start in zip(batch["span_input_ids"], batch["completion_start"], strict=True):
            # a hash of integers is the same in every process
            prompt = hash(tuple(ids[:start])) if 0 < start < len(ids) else None
            sizes.append(RowSize(len(ids), 1, len(ids), prompt, 0 if prompt is None else start))
    return sizes


def order_rows(sizes: Sequence[RowSize], strategy: str, seed: int, by_prompt: bool = False) -> list[int]:
    """
    Returns the row numbers in the order in which batches take them.

    Args:
        sizes (`Sequence[RowSize]`): the rows.
        strategy (`str`): `"random"`, `"sequential"`, or `"group_by_length"` (longest first).
        seed (`int`): seed of the random order.
        by_prompt (`bool`): move all rows of a prompt to the place of the first one.

    Example:

    ```python
    >>> rows = [RowSize(9, 1, 9, prompt, 4) for prompt in (7, 8, 7, 8)]
    >>> order_rows(rows, "sequential", 0, by_prompt=True)
    [0, 2, 1, 3]
    ```
    """
    order = list(range(len(sizes)))
    if strategy != "sequential":
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    if strategy == "group_by_length":
        order.sort(key=lambda row: sizes[row].longest, reverse=True)
    if by_prompt:
        first: dict[tuple, int] = {}
        keys = {row: ("row", row) if sizes[row].prompt is None else ("prompt", sizes[row].prompt) for row in order}
        for row in order:
            first.setdefault(keys[row], len(first))
        order.sort(key=lambda row: first[keys[row]])
    return order


@dataclass
class _Batch:
    """A batch that is being filled: its rows and its size."""

    flat_rows: bool
    multiple: int
    rows: list[int] = field(default_factory=list)
    flat: int = 0
    sequences: int = 0
    longest: int = 0
    prompts: set[int | None] = field(default_factory=set)

    def tokens_with(self, size: RowSize) -> int:
        """Tokens that the model would process with this row added, by the collators' rule for flat and padded rows."""
        flat, sequences, longest = self._grown(size)
        if self.flat_rows and flat < FLAT_BELOW * sequences * longest:
            return flat
        return sequences * -(-longest // self.multiple) * self.multiple

    def add(self, row: int, size: RowSize) -> None:
        self.flat, self.sequences, self.longest = self._grown(size)
        self.prompts.add(size.prompt)
        self.rows.append(row)

    def _grown(self, size: RowSize) -> tuple[int, int, int]:
        shared = size.prompt_tokens if size.prompt in self.prompts else 0
        return self.flat + size.flat - shared, self.sequences + size.sequences, max(self.longest, size.longest)


def pack_by_tokens(
    sizes: Sequence[RowSize], order: Sequence[int], max_tokens: int, flat_rows: bool, multiple: int | None = None
) -> list[list[int]]:
    """
    Cut `order` into batches of at most `max_tokens` tokens. The limit counts the tokens that the model processes,
    padding included.

    A row is never split. A row that is larger than `max_tokens` forms its own batch.

    Args:
        sizes, order: the sizes of the rows, and the order in which to take them.
        max_tokens (`int`): largest number of tokens in a batch.
        flat_rows (`bool`): whether the collator may lay batches out flat; if not, it pads every batch.
        multiple (`int`, *optional*): the collator pads rows to a multiple of this length.

    Example:

    ```python
    >>> rows = [RowSize(flat, 2, longest) for flat, longest in ((30, 20), (30, 20), (90, 50), (20, 15))]
    >>> pack_by_tokens(rows, range(4), max_tokens=60, flat_rows=True)
    [[0, 1], [2], [3]]
    >>> pack_by_tokens(rows, range(4), max_tokens=60, flat_rows=False)
    [[0], [1], [2], [3]]
    ```
    """
    batches: list[_Batch] = []
    for row in order:
        if not batches or batches[-1].tokens_with(sizes[row]) > max_tokens:
            batches.append(_Batch(flat_rows, multiple or 1))
        batches[-1].add(row, sizes[row])
    return [batch.rows for batch in batches]


def tokens_alone(size: RowSize, flat_rows: bool, multiple: int | None = None) -> int:
    """Tokens of a batch with only this row. The arguments are those of [`pack_by_tokens`]."""
    return _Batch(flat_rows, multiple or 1).tokens_with(size)


def pack_by_rows(order: Sequence[int], batch_size: int, drop_last: bool) -> list[list[int]]:
    """Cut `order` into batches of `batch_size` rows. If the last one is smaller, `drop_last` drops it."""
    batches = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    return batches[:-1] if drop_last and batches and len(batches[-1]) < batch_size else batches


def fill_processes(batches: Sequence[list[int]], processes: int, drop_last: bool) -> list[list[int]]:
    """
    Make the number of batches a multiple of the number of processes: drop the last batches, or halve the largest ones.

    Batches of one row cannot be halved. If there are too few batches, the loader repeats the first ones, as in TRL.

    Example:

    ```python
    >>> fill_processes([[0, 1], [2, 3, 4], [5]], processes=2, drop_last=False)
    [[0, 1], [2], [3, 4], [5]]
    ```
    """
    if drop_last:
        return list(batches[: len(batches) // processes * processes])
    batches = list(batches)
    while len(batches) % processes:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        rows = batches[largest]
        if len(rows) < 2:
            break
        batches[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return batches
