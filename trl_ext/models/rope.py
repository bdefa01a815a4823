"""Finds rows that may share a batch when a model's rotary positions depend on the length of the batch.

It knows RoPE settings of a config and the rotary modules of transformers. It knows nothing of batches, text or scores.

Dynamic RoPE (NTK) computes its frequencies from the longest row of a batch if that row exceeds the original context,
and keeps them for shorter rows that follow. Longrope (Phi-3) has two sets of frequencies: one for batches up to the
original context and one for longer ones. With both, the output for a row depends on the other rows of its batch.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig


def original_context(config: PretrainedConfig) -> int | None:
    """The longest row, in tokens, that never changes the output for other rows; `None` if no row does."""
    return min([number for numbers in _contexts(config) for number in numbers], default=None)


def _contexts(config: PretrainedConfig) -> tuple[list[int], list[int]]:
    """The original contexts of the model's dynamic and of its longrope rotary positions."""
    text = config.get_text_config()
    settings = getattr(text, "rope_parameters", None) or {}  # models without rotary positions have none
    # families with several kinds of layers have one set of settings for each
    kinds = [settings] if "rope_type" in settings else [kind for kind in settings.values() if isinstance(kind, dict)]
    dynamic = [text.max_position_embeddings for kind in kinds if "dynamic" in kind.get("rope_type", "")]
    longrope = [
        kind.get("original_max_position_embeddings") or text.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return dynamic, longrope


def length_class(config: PretrainedConfig) -> Callable[[int], int]:
    """
    Return a function from the length of a row to its class. Rows of one class may run in one batch.

    For most models all rows have class 0. With dynamic or longrope RoPE, rows up to the original context have class 0.
    Longer rows share one other class with longrope, and have one class per length with dynamic RoPE.
    """
    dynamic, longrope = _contexts(config)
    # a dynamic module does not reset for a row of exactly the original length; `reset_rope` does
    if dynamic:
        return lambda length: 0 if length <= min(dynamic + longrope) else length
    if longrope:
        return lambda length: int(length > min(longrope))
    return lambda length: 0


def reset_rope(model: nn.Module) -> None:
    """Restore the original frequencies, which dynamic RoPE replaced for longer rows."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)  # only rotary modules have it
        named = {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
        for prefix, kind in named.items():
            if not isinstance(kind, str) or "dynamic" not in kind:
                continue
            original = getattr(module, f"{prefix}original_inv_freq")
            current: torch.Tensor = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
