"""The output layer of the language model below a reward head: a frozen weight that turns hidden states into logits.

A classification model has no such layer. It is the input embedding where the two are tied, and otherwise it is read
from the files of the language model. Knows modules and files of weights, and nothing of losses.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from trl_ext.models.bases import local_copy
from trl_ext.models.heads import output_layer, unwrap


# What families call the layer in their files, and the fields of a config that change logits after it.
_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight")
_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def frozen_language_head(model: nn.Module) -> torch.Tensor:
    """
    The weight of the output layer, (V, H), without a gradient: token logits are `hidden @ weight.T`.

    Trained embeddings are copied, so that the layer stays as it was.

    Args:
        model (`PreTrainedModel` or `PeftModel`): sequence-classification model of a decoder.

    Raises:
        ValueError: the model is no decoder, its family changes logits after the layer, the layer has a bias or lacks
            tokens that were added, or it is not tied to the embeddings and not in the files of the model.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    name = type(base).__name__
    if "score" not in dict(base.named_children()):
        raise ValueError(f"{name} is no decoder with a `score` head, so it has no language-model head.")
    changed = [field for field in _CHANGES if getattr(config, field, None) not in (None, 1, 1.0)]
    if changed:  # the families' own names; most configs have none of them
        raise ValueError(f"{name} changes logits after its output layer ({changed[0]}), which is not supported.")
    if config.tie_word_embeddings:
        embeddings = base.get_input_embeddings().weight
        weight = embeddings.detach().clone() if embeddings.requires_grad else embeddings.detach()
    else:
        source = config._name_or_path or base.config._name_or_path
        folder = local_copy(source, getattr(base.config, "_commit_hash", None))
        weight = None if folder is None else _from_files(folder, name)
        if weight is None:
            raise ValueError(
                f"{name} is not tied to its embeddings, and {source!r} holds none of {', '.join(_NAMES)}. Pass a "
                "language model, and not a reward model."
            )
        weight = weight.to(next(base.parameters()).device)
        tokens = base.get_input_embeddings().weight.shape[0]
        if tokens > len(weight):
            raise ValueError(
                f"The embeddings of {name} have {tokens} tokens, and its output layer knows {len(weight)}: tokens "
                "were added. Leave the option out, or add the tokens to the language model first."
            )
    width = output_layer(model).in_features
    if weight.shape[1] != width:
        raise ValueError(
            f"The output layer of {name} reads {weight.shape[1]} features, and its hidden states {width}."
        )
    return weight


def _from_files(folder: Path, model: str) -> torch.Tensor | None:
    found = None
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            known = set(tensors.keys())
            if any(name.replace(".weight", ".bias") in known for name in _NAMES):
                raise ValueError(f"The output layer of {model} has a bias, which is not supported.")
            for name in _NAMES:
                if found is None and name in known:
                    found = tensors.get_tensor(name)
    return found
