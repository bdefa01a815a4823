"""The loss that keeps hidden states able to write the better completion, beside the ranking loss (GRM).

It knows batches of groups, their hidden states, the frozen output layer, and which trainers can have one.
"""

from typing import Any

import torch
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_ext.losses.penalties import next_token_loss
from trl_ext.models.heads import pad_right
from trl_ext.models.language_head import frozen_language_head
from trl_ext.trainers.ranking.recording import signed_ratings


def language_head_of(trainer: Trainer) -> torch.Tensor | None:
    """The frozen output layer for `sft_coefficient`; `None` without it. Raises `ValueError` if there is no layer."""
    coefficient = trainer.args.sft_coefficient
    if not coefficient:
        return None
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        raise ValueError(
            "sft_coefficient needs the whole output layer on every process, and FSDP and ZeRO-3 divide it. Train with "
            "DDP or ZeRO-2, or leave sft_coefficient out."
        )
    try:
        return frozen_language_head(trainer.model)
    except ValueError as error:
        raise ValueError(f"sft_coefficient={coefficient} cannot be used: {error}") from error


def language_loss(hidden: torch.Tensor, weight: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """
    The mean cross-entropy of the tokens of each group's best completion.

    A completion begins after the tokens that all candidates of the group share. Groups in which no candidate is better
    than another have the loss 0. Of several best candidates, the first one counts.

    Args:
        hidden (`torch.Tensor` of shape `(N, T, H)` or `(1, L, H)`): the head's input, of padded rows or of a flat row.
        weight (`torch.Tensor` of shape `(V, H)`): the frozen output layer.
        inputs (`dict`): the batch of a `GroupCollator`.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    sources, targets, groups = best_tokens(inputs)
    mask = inputs["group_mask"]
    each = next_token_loss(hidden.flatten(0, 1)[sources], weight, targets)  # (tokens,)
    total, count = each.new_zeros(len(mask)), each.new_zeros(len(mask))
    count = count.index_add(0, groups, torch.ones_like(each))
    return total.index_add(0, groups, each) / count.clamp(min=1)


def best_tokens(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The tokens of the best completions: where the hidden state is that predicts each, its id, and its group.

    Places count in the flattened hidden states, (N * T) or (L).
    """
    mask, ratings = inputs["group_mask"], signed_ratings(inputs)
    best = ratings.masked_fill(~mask, -torch.inf).argmax(1)  # (B,)
    worst = ratings.masked_fill(~mask, torch.inf).amin(1)
    decided = ratings.gather(1, best[:, None])[:, 0] > worst
    numbers = mask.sum(1).cumsum(0) - mask.sum(1) + best  # among all candidates
    layout = inputs.get("prefix_layout")
    if layout is None:
        ids, real = pad_right(inputs["input_ids"], inputs["attention_mask"])
        lengths, width = real.sum(1).tolist(), ids.shape[1]
    own = inputs["completion_lengths"].gather(1, best[:, None])[:, 0].tolist()
    sources, targets, groups = [], [], []
    for group, number in enumerate(numbers.tolist()):
        if not decided[group]:
            continue
        if layout is None:
            end = number * width + lengths[number]
            places = range(max(end - own[group], number * width + 1), end)  # nothing predicts a first token
            before = [place - 1 for place in places]
        else:
            segment = layout.completions[number]
            first = segment.start + (segment.prefix_length == 0)
            places = range(first, segment.end)
            prompt_end = segment.prefix_start + segment.prefix_length - 1
            before = [prompt_end if place == segment.start else place - 1 for place in places]
        sources += before
        targets += places
        groups += [group] * len(places)
    flat_ids = (ids if layout is None else layout.input_ids).flatten()
    sources, targets, groups = (
        torch.tensor(one, dtype=torch.long, device=mask.device) for one in (sources, targets, groups)
    )
    return sources, flat_ids.to(mask.device)[targets], groups
