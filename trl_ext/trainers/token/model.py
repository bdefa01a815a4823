"""Models whose head gives an output for every token: a check of the model, and a forward pass on a batch.

It knows models and collated batches. It knows nothing of losses, metrics or data sets.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl_ext.models.building import choose_head_class
from trl_ext.models.heads import HeadError, head_class, run_with_head_output, unwrap
from trl_ext.models.shared_prefix import flat_token_logits
from trl_ext.models.sidecar import Sidecar, get_sidecar, read_sidecar
from trl_ext.trainers.token.objective import TokenObjective


logger = logging.getLogger(__name__)


def known_sidecar(model: str | nn.Module) -> Sidecar | None:
    """The sidecar of a model that is trained further, if it has one."""
    if isinstance(model, str):
        return read_sidecar(model) if Path(model).is_dir() else None
    return get_sidecar(model)


def check_token_model(model: nn.Module, objective: TokenObjective, kind: str, known: Sidecar | None) -> None:
    """
    Raise [`HeadError`] unless the head gives the needed number of outputs for every token.

    Args:
        model (`nn.Module`): the model to train.
        objective ([`TokenObjective`]): defines the number of outputs.
        kind (`str`): the kind of reward model that is trained. If `known` has another one, a warning is logged.
        known ([`Sidecar`], *optional*): the sidecar that the model was loaded with.
    """
    base, needed = unwrap(model), objective.categories * objective.outputs
    if base.config.num_labels != needed:
        raise HeadError(
            f"The head of {type(base).__name__} has {base.config.num_labels} outputs. Needed: {needed} "
            f"({objective.categories} categories of {objective.outputs}). Load it with `num_labels={needed}`, or "
            "change the trainer's arguments."
        )
    if head_class(model) == "sequence" and choose_head_class(base.config) == "token":
        raise HeadError(
            f"{type(base).__name__} pools the tokens before its head, so there is no output for each token. Load it "
            "with `AutoModelForTokenClassification`, or pass its path to the trainer."
        )
    if known is not None and known.kind not in (kind, "scalar"):
        logger.warning(f"The model was trained as {known.kind!r} and is now trained further as {kind!r}.")


def token_outputs(model: nn.Module, inputs: dict[str, Any], objective: TokenObjective) -> torch.Tensor:
    """
    The head's output for every token, (B, T, G, C), fp32, from a flat row or from padded rows.

    A [`~trl_ext.models.ensemble.stacked_model.StackedRewardModel`] gives the outputs of all members, in order.

    After a flat row the model keeps the attention of flat rows. See
    [`~trl_ext.models.shared_prefix.flat_token_logits`].
    """
    if "prefix_layout" in inputs:
        index = inputs["token_index"]  # (B, T)
        layout = inputs["prefix_layout"].to(index.device)
        flat = flat_token_logits(model, layout)
        rows = torch.arange(0, len(flat), layout.num_tokens, device=flat.device)  # where each member's row begins
        raw = flat[(rows[:, None, None] + index).flatten(0, 1)]  # (B, T, G * C)
    else:
        _, raw = run_with_head_output(model, inputs["input_ids"], inputs["attention_mask"])
    if raw.dim() != 3:
        raise HeadError(
            f"The head of {type(unwrap(model)).__name__} runs after pooling (output {tuple(raw.shape)}), so there is "
            "no output for each token. Use a model of another family."
        )
    return raw.float().view(*raw.shape[:2], objective.categories, objective.outputs)


def as_predictions(
    logits: torch.Tensor, inputs: dict[str, torch.Tensor], objective: TokenObjective
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Outputs (B, T, G, C), or with more axes, and labels (B, T, G), in the form that `Trainer` expects.

    Both are -100 where there is no value. With one category there is no axis G. With three classes, labels are class
    numbers from 0.
    """
    labels = inputs["token_labels"] + (1.0 if objective.outputs == 3 else 0.0)
    labels = labels.masked_fill(~inputs["label_mask"], -100.0)  # (B, T, G)
    padding = ~inputs["attention_mask"].bool()  # (B, T)
    logits = logits.masked_fill(padding.view(*padding.shape, *[1] * (logits.dim() - 2)), -100.0)
    return (logits[:, :, 0], labels[:, :, 0]) if objective.categories == 1 else (logits, labels)
