"""One flat row for groups that share a prompt: each prompt once, every completion after it, no padding.

Knows token ids, positions and index tensors. Knows nothing of models, attention kernels or text.

Letters: `S` sequences (candidates of all groups), `N` tokens of the flat row; `A` segments of a block, and of
these `Q` most queries and `T` most keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch

from trl_ext.data.tokenization import common_prefix_length


BLOCK_COST = 4096
"""What another block costs, in pairs of a query and a key: about what one core computes in the time that it takes to
start a block's operations (hidden size 512)."""


class Segment(NamedTuple):
    """Tokens that follow each other in the row, and the prefix that they see besides themselves."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def keys(self) -> int:
        """Keys that the segment's last token sees."""
        return self.prefix_length + self.length

    @property
    def end(self) -> int:
        """Index after the segment's last token."""
        return self.start + self.length


@dataclass
class AttentionBlock:
    """
    Segments of similar lengths, whose attention is computed together.

    Args:
        query_index (`torch.LongTensor` of shape `(A, Q)`): row index of each segment's tokens; padding repeats the
            last.
        key_index (`torch.LongTensor` of shape `(A, T)`): row index of its prefix and then of its tokens, in the order
            of their positions, so that key number j stands at position j.
        query_position (`torch.LongTensor` of shape `(A, Q)`): position of each query in its sequence.
        causal (`bool`): no segment has a prefix, so that query number i sees the keys up to number i.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    query_position: torch.Tensor
    causal: bool
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False)

    def mask(self, window: int | None = None) -> torch.Tensor | None:
        """
        Who sees whom: bool `(A, 1, Q, T)`, True = may attend; `None` for plain causal attention.

        Args:
            window (`int`, *optional*): positions that a query sees, its own counted.
        """
        if window is not None and window >= self.key_index.shape[1]:
            window = None
        if window is None and self.causal:
            return None
        if window not in self._masks:  # every layer needs the same
            keys = torch.arange(self.key_index.shape[1], device=self.key_index.device)
            distance = self.query_position[:, :, None] - keys  # (A, Q, T)
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            self._masks[window] = mask[:, None]
        return self._masks[window]

    def to(self, device: torch.device | str) -> "AttentionBlock":
        """The same block on another device."""
        tensors = ("query_index", "key_index", "query_position")
        return replace(self, **{name: self.__dict__[name].to(device) for name in tensors}, _masks={})


@dataclass
class PrefixLayout:
    """
    Where every token of a flat row stands, and how attention finds the keys it may see.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, N)`): prompt of group 0, its completions, prompt of group 1, ...
        position_ids (`torch.LongTensor` of shape `(1, N)`): position of each token in its own sequence.
        last (`torch.LongTensor` of shape `(S,)`): row index of the last token of each sequence, groups in order.
        blocks (`list[AttentionBlock]`): prompts and completions, by length; each token is a query of one.
        inverse (`torch.LongTensor` of shape `(N,)`): where each token of the row is found in the `A * Q` queries of
            all blocks, one block after the other.
        completions (`list[Segment]`): each sequence's own tokens and its prompt, groups in order.
        sequence_tokens (`int`): real tokens of the sequences, the prompt counted in each.
        padded_tokens (`int`): tokens of the same sequences as one right-padded batch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    blocks: list[AttentionBlock]
    inverse: torch.Tensor
    completions: list[Segment]
    sequence_tokens: int
    padded_tokens: int

    @property
    def num_tokens(self) -> int:
        """N: tokens that go through the model."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> "PrefixLayout":
        """The same layout on another device (Trainer moves batches by calling this)."""
        values = {f.name: self.__dict__[f.name] for f in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved, blocks=[block.to(device) for block in self.blocks])

    def repeated(self, times: int) -> "PrefixLayout":
        """The layout of `times` such rows one after the other, as one row."""
        copies = torch.arange(times, device=self.last.device)[:, None]
        shifts = copies * self.num_tokens  # (times, 1)

        def shifted(index: torch.Tensor) -> torch.Tensor:
            return (shifts[..., None] + index).flatten(0, 1)  # (times * A, ...)

        blocks = [
            replace(
                block,
                query_index=shifted(block.query_index),
                key_index=shifted(block.key_index),
                query_position=block.query_position.repeat(times, 1),
                _masks={},
            )
            for block in self.blocks
        ]
        sizes = torch.tensor([block.query_index.numel() for block in self.blocks], device=self.inverse.device)
        ends = sizes.cumsum(0)
        size, end = (values[torch.bucketize(self.inverse, ends, right=True)] for values in (sizes, ends))  # (N,)
        return PrefixLayout(
            input_ids=self.input_ids.repeat(1, times),
            position_ids=self.position_ids.repeat(1, times),
            last=(shifts + self.last).flatten(),
            blocks=blocks,
            # before a block now stand `times` copies of each block before it, and the block's own earlier copies
            inverse=((times - 1) * (end - size) + copies * size + self.inverse).flatten(),
            completions=[
                own._replace(start=own.start + shift, prefix_start=own.prefix_start + shift)
                for shift in shifts[:, 0].tolist()
                for own in self.completions
            ],
            sequence_tokens=times * self.sequence_tokens,
            padded_tokens=times * self.padded_tokens,
        )

    def sequences(self) -> list[list[int]]:
        """The token ids of each sequence, prompt and completion, as they went in."""
        ids = self.input_ids[0].tolist()
        return [
            ids[own.prefix_start : own.prefix_start + own.prefix_length] + ids[own.start : own.end]
            for own in self.completions
        ]


def build_layout(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> PrefixLayout:
    """
    Lay out groups of (prompt ids, completions' ids) in one flat row.

    Prompts may be empty, completions have at least one token, K and all lengths may differ.

    Example:

    ```python
    >>> layout = build_layout([([7, 8], [[1], [2, 3]])])
    >>> layout.input_ids, layout.position_ids, layout.last
    (tensor([[7, 8, 1, 2, 3]]), tensor([[0, 1, 2, 2, 3]]), tensor([2, 4]))
    ```
    """
    ids: list[int] = []
    positions: list[int] = []
    prompts: list[Segment] = []
    completions: list[Segment] = []
    for group, (prompt, candidates) in enumerate(groups):
        shared = Segment(len(ids), len(prompt))
        if shared.length:
            prompts.append(shared)
        ids.extend(prompt)
        positions.extend(range(shared.length))
        for candidate in candidates:
            if not len(candidate):
                raise ValueError(f"A completion of group {group} is empty. Needed: at least one token of its own.")
            own = Segment(len(ids), len(candidate), shared.start, shared.length)
            completions.append(own)
            ids.extend(candidate)
            positions.extend(range(shared.length, own.keys))

    blocks: list[AttentionBlock] = []
    inverse = torch.empty(len(ids), dtype=torch.long)
    places = 0
    for segments in block_segments([*prompts, *completions]):
        block, valid = _build_block(segments)
        inverse[block.query_index[valid]] = places + valid.flatten().nonzero()[:, 0]
        places += valid.numel()
        blocks.append(block)
    return PrefixLayout(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        last=torch.tensor([own.end - 1 for own in completions]),
        blocks=blocks,
        inverse=inverse,
        completions=completions,
        sequence_tokens=sum(own.keys for own in completions),
        padded_tokens=len(completions) * max(own.keys for own in completions),
    )


def block_segments(segments: Sequence[Segment]) -> list[list[Segment]]:
    """
    Segments in blocks of similar lengths, those without a prefix apart (they need no mask).

    A segment joins a block unless the padding that this makes costs more than a block of its own. So the pairs of
    queries and keys, padding counted, are at most `BLOCK_COST` more for each segment than without padding.

    Example:

    ```python
    >>> short, longer, long = Segment(0, 20), Segment(20, 40), Segment(60, 500)
    >>> block_segments([short, long, longer]) == [[long], [longer, short]]
    True
    ```
    """
    blocks: list[list[Segment]] = []
    queries = keys = 0  # most of a segment in the last block
    for own in sorted(segments, key=lambda own: (own.prefix_length == 0, own.keys, own.length), reverse=True):
        if blocks and (own.prefix_length == 0) == (blocks[-1][0].prefix_length == 0):
            widest = max(queries, own.length)  # the keys are sorted: none has more than the first
            padding = (len(blocks[-1]) + 1) * widest * keys - len(blocks[-1]) * queries * keys - own.length * own.keys
            if padding <= BLOCK_COST:
                blocks[-1].append(own)
                queries = widest
                continue
        blocks.append([own])
        queries, keys = own.length, own.keys
    return blocks


def _build_block(segments: Sequence[Segment]) -> tuple[AttentionBlock, torch.Tensor]:
    """The block of some segments, and which of its queries are real: bool `(A, Q)`."""
    start, length, prefix_start, prefix_length = torch.tensor(segments)[:, :, None].unbind(1)  # (A, 1) each
    within = torch.arange(int(length.max()))
    own = within.minimum(length - 1)  # (A, Q); padding stands where the last query stands: it sees something
    keys = torch.arange(int((prefix_length + length).max()))
    key_index = torch.where(keys < prefix_length, prefix_start + keys, start + keys - prefix_length)  # (A, T)
    block = AttentionBlock(
        query_index=start + own,
        key_index=key_index.minimum(start + length - 1),
        query_position=prefix_length + own,
        causal=segments[0].prefix_length == 0,
    )
    return block, within < length


def split_prefix(candidates: Sequence[Sequence[int]]) -> tuple[Sequence[int], list[Sequence[int]]]:
    """
    The longest common prefix of a group's candidates and what each has of its own (at least one token).

    Example:

    ```python
    >>> split_prefix([[7, 8, 1], [7, 8, 2, 3]])
    ([7, 8], [[1], [2, 3]])
    ```
    """
    length = common_prefix_length(candidates)
    return candidates[0][:length], [candidate[length:] for candidate in candidates]
