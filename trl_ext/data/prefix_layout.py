"""One flat row for groups that share a prompt: each prompt once, followed by its completions, without padding.

Knows token ids, positions and index tensors. Knows nothing of models, attention kernels or text.

Shapes: `S` is the number of sequences (candidates of all groups) and `N` the number of tokens of the flat row. A block
has `A` segments; `Q` is the largest number of queries of a segment, and `T` the largest number of keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch

from trl_ext.data.tokenization import common_prefix_length


BLOCK_COST = 4096
"""The cost of one more block, in pairs of a query and a key: about as many as one core computes in the time that it
takes to start the operations of a block (hidden size 512)."""


class Segment(NamedTuple):
    """Consecutive tokens of the flat row, and the prefix that they attend to besides themselves."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def keys(self) -> int:
        """The number of keys that the segment's last token attends to."""
        return self.prefix_length + self.length

    @property
    def end(self) -> int:
        """Index after the segment's last token."""
        return self.start + self.length


@dataclass
class AttentionBlock:
    """
    Segments of similar lengths. Their attention is computed together.

    Args:
        query_index (`torch.LongTensor` of shape `(A, Q)`): index in the flat row of each segment's tokens. Padding
            repeats the last one.
        key_index (`torch.LongTensor` of shape `(A, T)`): index in the flat row of each segment's prefix, then of its
            tokens, in the order of their positions. Key number j has position j.
        query_position (`torch.LongTensor` of shape `(A, Q)`): position of each query in its sequence.
        causal (`bool`): True if no segment has a prefix, so query number i attends to the keys up to number i.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    query_position: torch.Tensor
    causal: bool
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False)

    def mask(self, window: int | None = None) -> torch.Tensor | None:
        """
        The attention mask: bool `(A, 1, Q, T)`, True = may attend; `None` for plain causal attention.

        Args:
            window (`int`, *optional*): number of positions that a query attends to, including its own.
        """
        if window is not None and window >= self.key_index.shape[1]:
            window = None
        if window is None and self.causal:
            return None
        if window not in self._masks:  # every layer uses the same mask
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
    The position of every token of a flat row, and the keys that it may attend to.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, N)`): prompt of group 0, its completions, prompt of group 1, ...
        position_ids (`torch.LongTensor` of shape `(1, N)`): position of each token in its own sequence.
        last (`torch.LongTensor` of shape `(S,)`): index in the flat row of the last token of each sequence.
        blocks (`list[AttentionBlock]`): prompts and completions, grouped by length. Each token is a query of exactly
            one block.
        inverse (`torch.LongTensor` of shape `(N,)`): index of each token of the flat row in the concatenated `A * Q`
            queries of all blocks.
        completions (`list[Segment]`): each sequence's completion with its prompt as the prefix, groups in order.
        sequence_tokens (`int`): real tokens of all sequences; each sequence counts its prompt.
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
        """N: the tokens that the model processes."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> "PrefixLayout":
        """The same layout on another device. Trainer calls this to move a batch."""
        values = {f.name: self.__dict__[f.name] for f in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved, blocks=[block.to(device) for block in self.blocks])

    def repeated(self, times: int) -> "PrefixLayout":
        """The layout of one row that holds this row `times` times, one copy after the other."""
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
            # a block now follows `times` copies of each earlier block, and the earlier copies of itself
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
        """The token ids of each sequence, prompt and completion, as given to `build_layout`."""
        ids = self.input_ids[0].tolist()
        return [
            ids[own.prefix_start : own.prefix_start + own.prefix_length] + ids[own.start : own.end]
            for own in self.completions
        ]


def build_layout(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> PrefixLayout:
    """
    Lay out groups of (prompt ids, completions' ids) in one flat row.

    Prompts may be empty. Completions have at least one token. K and all lengths may differ between groups.

    Raises:
        `ValueError`: a completion is empty.

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
                raise ValueError(
                    f"A completion of group {group} is empty. Needed: one token or more after the prompt."
                )
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
    Sort segments into blocks of similar lengths. Segments without a prefix form separate blocks, which need no mask.

    A segment joins the last block unless the padding would cost more than a new block. So padding adds at most
    `BLOCK_COST` pairs of a query and a key for each segment.

    Example:

    ```python
    >>> short, longer, long = Segment(0, 20), Segment(20, 40), Segment(60, 500)
    >>> block_segments([short, long, longer]) == [[long], [longer, short]]
    True
    ```
    """
    blocks: list[list[Segment]] = []
    queries = keys = 0  # the largest numbers of a segment in the last block
    for own in sorted(segments, key=lambda own: (own.prefix_length == 0, own.keys, own.length), reverse=True):
        if blocks and (own.prefix_length == 0) == (blocks[-1][0].prefix_length == 0):
            widest = max(queries, own.length)  # segments are sorted by keys, so the first one of a block has the most
            padding = (len(blocks[-1]) + 1) * widest * keys - len(blocks[-1]) * queries * keys - own.length * own.keys
            if padding <= BLOCK_COST:
                blocks[-1].append(own)
                queries = widest
                continue
        blocks.append([own])
        queries, keys = own.length, own.keys
    return blocks


def _build_block(segments: Sequence[Segment]) -> tuple[AttentionBlock, torch.Tensor]:
    """The block of some segments, and a mask of its queries: bool `(A, Q)`, True = real."""
    start, length, prefix_start, prefix_length = torch.tensor(segments)[:, :, None].unbind(1)  # (A, 1) each
    within = torch.arange(int(length.max()))
    own = within.minimum(length - 1)  # (A, Q); padding repeats the last query, so it has keys to attend to
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
    The longest common prefix of a group's candidates, and the rest of each candidate (at least one token).

    Example:

    ```python
    >>> split_prefix([[7, 8, 1], [7, 8, 2, 3]])
    ([7, 8], [[1], [2, 3]])
    ```
    """
    length = common_prefix_length(candidates)
    return candidates[0][:length], [candidate[length:] for candidate in candidates]
