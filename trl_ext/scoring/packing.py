"""Groups rows that share a prompt, and packs the groups into batches of bounded size.

This module knows token ids and row indices. It knows nothing of models or text.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from trl_ext.data.prefix_layout import split_prefix
from trl_ext.data.tokenization import Prompt


class SharedRows(NamedTuple):
    """Rows with one prompt: their indices, the shared token prefix, and the other tokens of each row."""

    rows: list[int]
    prefix: Sequence[int]
    own: list[Sequence[int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest row of this group."""
        return len(self.prefix) + max(map(len, self.own))

    @property
    def num_tokens(self) -> int:
        """Tokens of the flat row that this group needs."""
        return len(self.prefix) + sum(map(len, self.own))


def share_prompts(prompts: Sequence[Prompt] | None, ids: Sequence[Sequence[int]]) -> list[SharedRows]:
    """
    Group rows by their prompt, in any order. A row without a prompt forms its own group; rows without tokens are left
    out.

    Example:

    ```python
    >>> [group.rows for group in share_prompts(["a", "b", "a"], [[1, 2], [3, 4], [1, 5]])]
    [[0, 2], [1]]
    ```
    """
    groups: dict[object, list[int]] = {}
    for row in range(len(ids)):
        if ids[row]:
            prompt = None if prompts is None else prompts[row]
            key = row if not prompt else prompt if isinstance(prompt, str) else json.dumps(prompt, default=str)
            groups.setdefault(key, []).append(row)
    return [SharedRows(rows, *split_prefix([ids[row] for row in rows])) for rows in groups.values()]


def padded_tokens(lengths: Sequence[int], batch_rows: int) -> int:
    """Number of tokens, padding included, of rows that are sorted by length and batched by `batch_rows`."""
    ordered = sorted(lengths, reverse=True)
    return sum(ordered[i] * len(ordered[i : i + batch_rows]) for i in range(0, len(ordered), batch_rows))


def pack(
    groups: Sequence[SharedRows], max_tokens: int | None, max_rows: int | None, flat: bool
) -> list[list[SharedRows]]:
    """
    Pack groups into batches of at most `max_tokens` tokens and `max_rows` sequences, longest sequences first.

    For flat rows a group that is too large is split, and each part then holds the prefix. In a padded batch
    (`flat=False`, groups of one row) every row counts as many tokens as the longest. A single row that is too large
    forms its own batch.
    """
    parts = [part for group in groups for part in _split(group, max_tokens, max_rows)]
    parts.sort(key=lambda part: part.longest, reverse=True)
    batches: list[list[SharedRows]] = []
    for part in parts:
        if batches and _fits([*batches[-1], part], max_tokens, max_rows, flat):
            batches[-1].append(part)
        else:
            batches.append([part])
    return batches


def num_tokens(batch: Sequence[SharedRows], flat: bool) -> int:
    """Number of tokens of a batch that the model processes."""
    if flat:
        return sum(part.num_tokens for part in batch)
    return len(batch) * max(part.num_tokens for part in batch)


def _fits(batch: Sequence[SharedRows], max_tokens: int | None, max_rows: int | None, flat: bool) -> bool:
    if max_rows is not None and sum(len(part.rows) for part in batch) > max_rows:
        return False
    return max_tokens is None or num_tokens(batch, flat) <= max_tokens


def _split(group: SharedRows, max_tokens: int | None, max_rows: int | None) -> list[SharedRows]:
    parts: list[SharedRows] = []
    for row, own in sorted(zip(group.rows, group.own, strict=True), key=lambda pair: len(pair[1]), reverse=True):
        longer = SharedRows([*parts[-1].rows, row], group.prefix, [*parts[-1].own, own]) if parts else None
        if longer is not None and _fits([longer], max_tokens, max_rows, flat=True):
            parts[-1] = longer
        else:
            parts.append(SharedRows([row], group.prefix, [own]))
    return parts
