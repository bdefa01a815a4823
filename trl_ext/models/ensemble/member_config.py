"""LoRA configs of ensemble members: checks that they can be stacked, and chooses the layers that they adapt.

It knows PEFT configs, as objects and as files, and the names of a model's modules. It knows nothing of weights.
"""

import copy
import json
from pathlib import Path

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl_ext.models.adapters import adapter_config, changes_to_base, check_adapter_config


def branch_at(model: PreTrainedModel, peft_config: LoraConfig, share: float) -> LoraConfig:
    """
    A copy of the config that leaves the first `share` of the model's layers without adapters.

    The last layer always gets one. PEFT refuses `layers_to_transform` together with `target_modules="all-linear"`;
    [`complete_config`] resolves that.

    Raises:
        `ValueError`: the config sets `layers_to_transform` already.
    """
    if peft_config.layers_to_transform is not None:
        raise ValueError(
            f"`layers_to_transform={peft_config.layers_to_transform}` of the LoRA config and branch_at={share} both "
            "say which layers have adapters. Give one."
        )
    layers = model.config.get_text_config().num_hidden_layers
    config = copy.deepcopy(peft_config)
    config.layers_to_transform = list(range(min(int(share * layers), layers - 1), layers))
    return config


def check_stackable(peft_config: PeftConfig, head: list[str]) -> None:
    """Raise `ValueError` unless the adapter is plain LoRA on linear layers with a trained head."""
    if type(peft_config) is not LoraConfig:
        raise ValueError(f"Ensemble members are LoRA adapters, found {type(peft_config).__name__}. Use `LoraConfig`.")
    check_adapter_config(peft_config)
    wrong = {
        "use_dora": peft_config.use_dora,
        "lora_bias": peft_config.lora_bias,
        "target_parameters": peft_config.target_parameters,
        "trainable_token_indices": peft_config.trainable_token_indices,
        "modules_to_save": [
            name
            for name in peft_config.modules_to_save or []
            if name not in {*head, "score", "classifier", *(path.split(".")[-1] for path in head)}
        ],
    }
    found = changes_to_base(peft_config)
    found += [f"{name}={getattr(peft_config, name)!r}" for name, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ValueError(
            f"The LoRA config sets {', '.join(found)}, which cannot be stacked. Leave it out, or train the members in "
            "separate runs of RewardTrainer."
        )


def complete_config(model: PreTrainedModel, peft_config: LoraConfig, head: list[str]) -> LoraConfig:
    """The user's config with the head added, and `"all-linear"` spelled out as names if the config chooses layers."""
    config = adapter_config(model, peft_config, head)
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        if config.target_modules.lower() != "all-linear":
            raise ValueError(
                f"`target_modules` is the pattern {config.target_modules!r}, which PEFT does not combine with "
                "`layers_to_transform`. Put the layers into the pattern, or list module names."
            )
        config.target_modules = sorted(_linear_names(model, head))
    config.modules_to_save = list(dict.fromkeys(head))
    config.base_model_name_or_path = model.config._name_or_path or None
    config.inference_mode = False
    return config


def _linear_names(model: PreTrainedModel, head: list[str]) -> set[str]:
    """Last parts of the names of all linear layers outside the head."""
    return {
        path.split(".")[-1]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(path == h or path.startswith(f"{h}.") for h in head)
    }


def config_differences(one: Path, other: Path) -> list[str]:
    """The differences that keep two adapters from being stacked."""
    configs = [json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in (one, other)]
    names = ["peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"]
    names += ["layers_to_transform"]
    differing = [name for name in names if configs[0].get(name) != configs[1].get(name)]
    lists = ("target_modules", "modules_to_save")
    return differing + [name for name in lists if _as_set(configs[0].get(name)) != _as_set(configs[1].get(name))]


def _as_set(value: list[str] | str | None) -> set[str]:
    return {value} if isinstance(value, str) else set(value or [])
