"""One flat row for groups that share a prompt: each prompt once, every completion after it, no padding.

Knows token ids, positions and index tensors. Knows nothing of models, attention kernels or text.

Letters: `G` groups, `S` sequences (candidates of all groups), `N` tokens of the flat row, `P` longest prompt, `C`
longest completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from trl_ext.data.tokenization import common_prefix_length


@dataclass
class PrefixLayout:
    """
    Where every token of a flat row stands, and how attention finds the keys it may see.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, N)`): prompt of group 0, its completions, prompt of group 1, ...
        position_ids (`torch.LongTensor` of shape `(1, N)`): position of each token in its own sequence.
        last (`torch.LongTensor` of shape `(S,)`): row index of the last token of each sequence, groups in order.
        prompt_index (`torch.LongTensor` of shape `(G, P)`): row index of each prompt token; padding
            repeats a real index.
        completion_index (`torch.LongTensor` of shape `(S, C)`): the same for completions.
        key_index (`torch.LongTensor` of shape `(S, P + C)`): what each completion may attend to: its prompt
            and itself.
        key_valid (`torch.BoolTensor` of shape `(S, P + C)`): True = real key.
        query_position (`torch.LongTensor` of shape `(S, C)`): position of each completion token.
        key_position (`torch.LongTensor` of shape `(S, P + C)`): position of each key.
        inverse (`torch.LongTensor` of shape `(N,)`): where each token of the row is found in the prompts'
            `(G * P)` rows followed by the completions' `(S * C)` rows.
        sequence_tokens (`int`): real tokens of the sequences, the prompt counted in each.
        padded_tokens (`int`): tokens of the same sequences as one right-padded batch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    prompt_index: torch.Tensor
    completion_index: torch.Tensor
    key_index: torch.Tensor
    key_valid: torch.Tensor
    query_position: torch.Tensor
    key_position: torch.Tensor
    inverse: torch.Tensor
    sequence_tokens: int
    padded_tokens: int
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """N: tokens that go through the model."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> "PrefixLayout":
        """The same layout on another device (Trainer moves batches by calling this)."""
        moved = {
            f.name: value.to(device) if isinstance(value, torch.Tensor) else value
            for f in fields(self)
            if f.name != "_masks" and (value := self.__dict__[f.name]) is not None
        }
        return PrefixLayout(**moved)

    def sequences(self) -> list[list[int]]:
        """The token ids of each sequence, prompt and completion, as they went in."""
        ids = self.input_ids[0][self.key_index]  # (S, P + C)
        return [row[valid].tolist() for row, valid in zip(ids, self.key_valid, strict=True)]

    def prompt_mask(self, window: int) -> torch.Tensor:
        """Causal mask of the prompts within a sliding window: bool `(1, 1, P, P)`, True = may attend."""
        position = torch.arange(self.prompt_index.shape[1], device=self.last.device)
        distance = position[:, None] - position[None, :]
        return ((distance >= 0) & (distance < window))[None, None]

    def completion_mask(self, window: int | None = None) -> torch.Tensor:
        """Mask of the completions: bool `(S, 1, C, P + C)`, True = may attend. Kept: every layer needs the same."""
        if window not in self._masks:
            distance = self.query_position[:, :, None] - self.key_position[:, None, :]  # (S, C, P + C)
            mask = self.key_valid[:, None, :] & (distance >= 0)
            if window is not None:
                mask = mask & (distance < window)
            self._masks[window] = mask[:, None]
        return self._masks[window]


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
    prompts: list[tuple[int, int]] = []  # (start, length) of each group's prompt
    completions: list[tuple[int, int, int]] = []  # (group, start, length)
    for group, (prompt, candidates) in enumerate(groups):
        prompts.append((len(ids), len(prompt)))
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        for candidate in candidates:
            if not len(candidate):
                raise ValueError(f"A completion of group {group} is empty. Needed: at least one token of its own.")
            completions.append((group, len(ids), len(candidate)))
            ids.extend(candidate)
            positions.extend(range(len(prompt), len(prompt) + len(candidate)))

    starts = torch.tensor(prompts)  # (G, 2)
    own = torch.tensor(completions)  # (S, 3)
    group_of, own_start, own_length = own.unbind(1)
    prompt_start, prompt_length = starts.unbind(1)
    longest_prompt, longest_own = int(prompt_length.max()), int(own_length.max())
    within_prompt, within_own = torch.arange(longest_prompt), torch.arange(longest_own)

    last_token = len(ids) - 1
    prompt_valid = within_prompt < prompt_length[:, None]  # (G, P)
    own_valid = within_own < own_length[:, None]  # (S, C)
    prompt_index = (prompt_start[:, None] + within_prompt).clamp(max=last_token)
    completion_index = own_start[:, None] + within_own.minimum(own_length[:, None] - 1)
    offset = prompt_length[group_of]  # (S,)
    # padded queries stand where the last real one stands, so that no row of the mask is empty
    query_position = offset[:, None] + within_own.minimum(own_length[:, None] - 1)
    key_position = torch.cat([within_prompt.expand(len(own), -1), query_position], dim=1)

    inverse = torch.empty(len(ids), dtype=torch.long)
    places = torch.arange(prompt_index.numel()).view_as(prompt_index)
    inverse[prompt_index[prompt_valid]] = places[prompt_valid]
    places = prompt_index.numel() + torch.arange(completion_index.numel()).view_as(completion_index)
    inverse[completion_index[own_valid]] = places[own_valid]

    return PrefixLayout(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        last=own_start + own_length - 1,
        prompt_index=prompt_index,
        completion_index=completion_index,
        key_index=torch.cat([prompt_index[group_of], completion_index], dim=1),
        key_valid=torch.cat([prompt_valid[group_of], own_valid], dim=1),
        query_position=query_position,
        key_position=key_position,
        inverse=inverse,
        sequence_tokens=int((offset + own_length).sum()),
        padded_tokens=len(own) * int((offset + own_length).max()),
    )


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
