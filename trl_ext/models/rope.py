"""Rotary positions that change with the length of a row: which rows may run in one batch.

It knows RoPE settings of a config and the rotary modules of transformers. It knows nothing of batches, text or scores.

Dynamic RoPE (NTK) computes its frequencies from the longest row of a batch once that is longer than the original
context, and keeps them for shorter rows that follow. Longrope (Phi-3) has two sets of frequencies, for batches up to
the original context and beyond. In both, the output for a row depends on the rows beside it.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig


def length_class(config: PretrainedConfig) -> Callable[[int], int]:
    """
    A function from the length of a row to its class: rows of one class may run in one batch.

    All rows are of class 0 for most models. With dynamic or longrope RoPE that is so up to the original context.
    Longer rows are of one other class with longrope, and of a class for each length with dynamic RoPE.
    """
    text = config.get_text_config()
    settings = getattr(text, "rope_parameters", None) or {}  # models without rotary positions have none
    # families with several kinds of layers have settings for each
    kinds = [settings] if "rope_type" in settings else [kind for kind in settings.values() if isinstance(kind, dict)]
    dynamic = [text.max_position_embeddings for kind in kinds if "dynamic" in kind.get("rope_type", "")]
    longrope = [
        kind.get("original_max_position_embeddings") or text.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    # a row of exactly the original length keeps what longer rows left in a dynamic module, which `reset_rope` undoes
    if dynamic:
        return lambda length: 0 if length <= min(dynamic + longrope) else length
    if longrope:
        return lambda length: int(length > min(longrope))
    return lambda length: 0


def reset_rope(model: nn.Module) -> None:
    """Forget the frequencies that dynamic RoPE kept of longer rows."""
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
