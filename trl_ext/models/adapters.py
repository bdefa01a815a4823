"""Adapters of reward models: checks that a PEFT config can be saved and loaded again, and puts an adapter on a model.

It knows PEFT configs and modules. It knows nothing of files, text or training.
"""

import copy
import logging
import re

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from trl_ext.models.heads import head_class


logger = logging.getLogger(__name__)

# Initialisations of LoRA that leave the base as it is and need nothing but the config.
PLAIN_INITS = (True, False, "gaussian", "orthogonal")


def check_adapter_config(config: PeftConfig, *, initialised: bool = False) -> None:
    """
    Raise `ValueError` for an adapter that could not be loaded again as it was trained.

    An adapter is saved without its base. An initialisation that changes the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA,
    MiCA) or that needs data (EVA) is therefore lost: loading would run it again, on the changed weights or not at all.

    Args:
        config (`PeftConfig`): the user's config.
        initialised (`bool`, *optional*, defaults to `False`):
            Whether the adapter is in memory already. Then an initialisation that needs data (EVA) is allowed, because
            it has been run.
    """
    # not every tuner's config has the field
    if config.is_prompt_learning or not hasattr(config, "modules_to_save"):
        raise ValueError(
            f"{type(config).__name__} cannot store a trained reward head next to the adapter (no `modules_to_save`). "
            "Use `LoraConfig` or another tuner with `modules_to_save`."
        )
    if not isinstance(config, LoraConfig):
        return
    init = config.init_lora_weights
    if init == "eva" and not initialised:
        raise ValueError(
            "init_lora_weights='eva' needs data that the trainer does not pass on. Use init_lora_weights=True, or "
            "call `get_peft_model` and `initialize_lora_eva_weights` and pass the PeftModel."
        )
    if init not in PLAIN_INITS and init != "eva":
        raise ValueError(
            f"init_lora_weights={init!r} changes the weights of the base, and an adapter is saved without its base: "
            "the reward model could not be loaded again. Use init_lora_weights=True, 'gaussian' or 'orthogonal'."
        )
    if config.layer_replication:
        raise ValueError(
            "layer_replication changes the number of layers, and an adapter is saved without the config of its base, "
            "so that the reward model could not be loaded again. Save the deeper model first and train on its folder."
        )


def check_policy_adapter(config: PeftConfig | None, *, initialised: bool = True, reference: bool = False) -> None:
    """
    Raise `ValueError` for the adapter of a language model that would not be what was trained, or trained against.

    The initialisations of PEFT that take the base apart by a method with random numbers or with data (`pissa_niter_n`,
    LoftQ, CorDA, LoRA-GA) do it again, otherwise, when the adapter is loaded. `"pissa"` and `"olora"` repeat exactly.

    Args:
        config (`PeftConfig`, *optional*): the adapter's config.
        initialised (`bool`, *optional*, defaults to `True`):
            Whether the adapter is in memory or on disk already. A new one cannot get the data that EVA needs.
        reference (`bool`, *optional*, defaults to `False`):
            Whether training compares with the base, with adapters off. Then the adapter must leave the base as it is.
    """
    init = getattr(config, "init_lora_weights", True)  # None and other tuners have no such field
    if init not in (*PLAIN_INITS, "eva", "pissa", "olora"):
        raise ValueError(
            f"init_lora_weights={init!r} changes the weights of the base, and otherwise each time that the adapter is "
            "loaded: the policy would not be the one that was trained. Save the adapter with "
            "`save_pretrained(path, path_initial_model_for_weight_conversion=...)`, or merge it and use the full "
            "model; for a new adapter use init_lora_weights=True."
        )
    if init == "eva" and not initialised:
        raise ValueError(
            "init_lora_weights='eva' needs data that the trainer does not pass on. Use init_lora_weights=True, or "
            "call `get_peft_model` and `initialize_lora_eva_weights` and pass the PeftModel."
        )
    changes = changes_to_base(config) if reference and config is not None else []
    if changes:
        raise ValueError(
            f"{' and '.join(changes)} changes the weights of the base, and the reference is the base with its "
            "adapters off: it would not be the model that training starts from. Use the default, or train without a "
            "reference (GRPO and PPO: beta=0; DPO: pass `ref_model`)."
        )


def changes_to_base(config: PeftConfig) -> list[str]:
    """
    The settings of a PEFT config that make the adapter change the base weights when it is loaded, as `name=value`.

    Such an adapter needs a separate copy of the base. It cannot share one with other adapters or with a policy.
    """
    # other tuners lack some of these fields
    init = getattr(config, "init_lora_weights", True)
    changing = {
        "init_lora_weights": init not in (*PLAIN_INITS, "eva"),
        "layer_replication": bool(getattr(config, "layer_replication", None)),
        "bias": getattr(config, "bias", "none") != "none",
    }
    return [f"{name}={getattr(config, name)!r}" for name, changes in changing.items() if changes]


def add_adapter(
    model: PreTrainedModel, peft_config: PeftConfig, head: list[str], *, autocast_adapter_dtype: bool = True
) -> PeftModel:
    """
    Wrap the model with an adapter, and make sure that its head is trained and saved whatever the user's config says.

    The task type becomes that of the model's class. The head joins `modules_to_save` and is excluded from the
    adapter's targets; a target that names it is dropped with a warning. The given config is not changed. Raises
    `ValueError` for a config that cannot be saved and loaded again ([`check_adapter_config`]), and for a config whose
    only target is the head.
    """
    config = adapter_config(model, peft_config, head)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return peft_model


def adapter_config(model: PreTrainedModel, peft_config: PeftConfig, head: list[str]) -> PeftConfig:
    """A copy of the user's config that also trains and saves the head; raises as [`add_adapter`] does."""
    check_adapter_config(peft_config)
    config = copy.deepcopy(peft_config)
    targets = _as_list(config.target_modules)
    of_head = sorted(target for target in targets if _only_in_head(target, model, head))
    if of_head and len(of_head) == len(targets):
        raise ValueError(
            f"`target_modules` names the reward head {of_head} and nothing else. The head starts random and is "
            "trained in full anyway. Name modules of the backbone, e.g. 'all-linear', or leave `peft_config` out."
        )
    if of_head:
        logger.warning(
            f"`target_modules` names the reward head {of_head}. The head starts random, so it is trained and saved in "
            "full, without an adapter."
        )
        config.target_modules = [target for target in targets if target not in of_head]
    config.task_type = "TOKEN_CLS" if head_class(model) == "token" else "SEQ_CLS"
    # PEFT appends "classifier" and "score" itself for both
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *head]))
    linear = [
        path
        for name in head
        for path, m in model.get_submodule(name).named_modules(prefix=name)
        if isinstance(m, nn.Linear)
    ]
    if hasattr(config, "exclude_modules"):  # a few tuners lack it; `make_head_exact` refuses a head that they adapt
        if isinstance(config.exclude_modules, str):
            config.exclude_modules = f"(?:{config.exclude_modules})|(?:.*\\.)?(?:{'|'.join(map(re.escape, linear))})"
        else:
            config.exclude_modules = sorted({*(config.exclude_modules or []), *linear})
    return config


def _as_list(targets: list[str] | set[str] | str | None) -> list[str]:
    """The module names in `target_modules`; an empty list for a pattern, `"all-linear"` or the default."""
    return [] if targets is None or isinstance(targets, str) else list(targets)


def _only_in_head(target: str, model: PreTrainedModel, head: list[str]) -> bool:
    """Whether a name in `target_modules` stands for modules of the head and for nothing else."""
    matched = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
    return bool(matched) and all(any(name == h or name.startswith(f"{h}.") for h in head) for name in matched)
