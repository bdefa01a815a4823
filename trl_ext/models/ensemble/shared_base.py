"""Puts reward adapters, saved or new, onto one base in memory, which may be in 4 bits and may have a policy on it.

It knows PEFT adapters, sidecars and bases. It knows nothing of text or of how scores are combined.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForSequenceClassification
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

from trl_ext.models.adapters import adapter_config, changes_to_base
from trl_ext.models.bases import BaseMismatchError, check_probes, check_same_base, plain_name
from trl_ext.models.building import keep_4bit_exact_on_cpu, name_problem
from trl_ext.models.heads import HeadClass, head_modules, make_head_exact, unwrap
from trl_ext.models.loading import check_head_in_files, load_reward_model
from trl_ext.models.sidecar import Sidecar, SidecarError, read_sidecar, set_sidecar


def base_key(folder: str | Path) -> str | None:
    """
    The key of the base of a saved adapter; `None` for a full model or a model without a sidecar.

    Adapters with equal keys can share a base. The key covers the id, revision, quantization, dtype and vocabulary of
    the base, and the shape of the head.
    """
    sidecar = read_sidecar(folder)
    if sidecar is None or not sidecar.is_adapter:
        return None
    base = sidecar.base
    key = [base.id, base.revision, base.dtype, base.quantization, base.vocab_size]
    return json.dumps([*key, sidecar.head_class, sidecar.num_labels, sorted(sidecar.head_modules)], sort_keys=True)


def changes_of(folder: str | Path) -> list[str]:
    """
    What makes a saved adapter change the base weights when it is loaded: settings, as `name=value`, and weights of the
    base that PEFT saved with it, as it does with embeddings that were resized.
    """
    config = PeftConfig.from_pretrained(str(folder))
    changes, file = changes_to_base(config), Path(folder, "adapter_model.safetensors")
    if file.is_file():
        own = (PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type], "trainable_tokens_")
        copied = [f".{name}." for name in config.modules_to_save or []]  # PEFT keeps a copy for each adapter
        with safe_open(file, framework="pt") as tensors:
            names = [key.removeprefix("base_model.model.") for key in tensors.keys()]  # noqa: SIM118 - not a dict
        changes += [name for name in names if not any(part in f".{name}" for part in (*own, *copied))]
    return changes


def check_leaves_base(folder: str | Path) -> None:
    """Raise `ValueError` if loading a saved adapter would change the weights of the model that it is put on."""
    changes = changes_of(folder)
    if changes:
        raise ValueError(
            f"The adapter in {folder} sets {', '.join(changes)}, so PEFT changes the weights of the model that it is "
            "put on. Leave `base_model` out, so that the adapter gets a separate copy of the base, or train it "
            "without that."
        )


def load_adapters(
    folders: Sequence[str | Path], base_model: nn.Module | str | Path | None = None, **load_kwargs: Any
) -> tuple[PeftModel, list[str]]:
    """
    Load adapters with their heads onto one base.

    Args:
        folders (sequence of `str` or `Path`):
            Local folders of adapters with the same [`base_key`].
        base_model (`PreTrainedModel`, `PeftModel`, `str` or `Path`, *optional*):
            A model in memory whose backbone is the base, e.g. a policy in training (a language model with or without
            an adapter). The reward adapters are added to those that it has. Its base must be frozen. Its weights,
            its trainable parameters and its mode do not change; the weights are compared before and after. If
            `base_model` is a path, it says where the base is now, if it moved. By default the base is loaded from its
            recorded place.
        **load_kwargs: arguments of [`load_reward_model`], unless `base_model` is in memory.

    Returns:
        `tuple[PeftModel, list[str]]`: a model whose adapters are frozen, and the name of the adapter of each folder.
        [`use_adapter`] switches between them.

    Raises:
        [`BaseMismatchError`]: the settings of the model in memory, or the scores of the probes, show that the adapters
            were trained on another base.
        [`SidecarError`]: a folder is not an adapter with a sidecar, or they do not share a base.
        `ValueError`: the base of the model in memory is trainable, or an adapter would change its weights.
        `TypeError`: `load_kwargs` are given, and the base is in memory.
    """
    if load_kwargs and isinstance(base_model, nn.Module):
        raise TypeError(f"Found the arguments {sorted(load_kwargs)}. They are only for a base that is loaded here.")
    keys = {base_key(folder) for folder in folders}
    if len(keys) != 1 or None in keys:
        raise SidecarError(
            f"{', '.join(map(str, folders))} cannot share a base. Needed: adapters with a reward_model.json that were "
            "trained on one base, quantized in one way, with heads of one shape."
        )
    sidecars = [read_sidecar(folder) for folder in folders]
    names = [f"member-{number}" for number in range(len(folders))]
    if not isinstance(base_model, nn.Module):
        names[0] = "default"  # PEFT's name for the first adapter of a model
        model = load_reward_model(folders[0], base_model=base_model, **load_kwargs)
        _add_members(model, folders, names, sidecars, None if base_model is None else str(base_model))
        return model, names
    for folder in folders:
        check_leaves_base(folder)
    check_same_base(base_model, sidecars[0], folders[0])
    keep_4bit_exact_on_cpu(base_model)
    owner = unwrap(base_model)
    _check_frozen(owner)
    names = [_free_name(name, owner) for name in names]
    before = _checksums(owner)
    with _unchanged(owner):
        described = sidecars[0]
        model, _ = _reward_model_around(owner, described.num_labels, described.head_class, described.head_modules)
        model = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
        _check_weights(owner, before)
        _add_members(model, folders, names, sidecars)
    _check_weights(owner, before)
    return model, names


def new_adapter(base_model: nn.Module, peft_config: PeftConfig, name: str) -> tuple[PeftModel, str, list[str]]:
    """
    Put a new adapter, with a head of one output, onto the base of a model in memory.

    The head starts at zero, so the model gives 0 for every token. As in [`load_adapters`], the weights, the trainable
    parameters and the mode of the model in memory do not change.

    Args:
        base_model (`PreTrainedModel` or `PeftModel`): a decoder in memory, e.g. a policy in training.
        peft_config (`PeftConfig`): the adapter; the head is added to it. It is not changed.
        name (`str`): the adapter's name; a number is appended if the model has such an adapter already.

    Returns:
        `tuple[PeftModel, str, list[str]]`: the model around the base, the adapter's name, and the head's modules.

    Raises:
        [`BaseMismatchError`]: putting the adapter on the base changed its weights.
        `ValueError`: the base is trainable, or the adapter could not be loaded again.
    """
    keep_4bit_exact_on_cpu(base_model)
    owner = unwrap(base_model)
    _check_frozen(owner)
    name = _free_name(name, owner)
    before = _checksums(owner)
    with _unchanged(owner):
        model, head = _reward_model_around(owner, 1, "sequence")
        config = adapter_config(model, peft_config, head)
        model = PeftModelForSequenceClassification(model, config, adapter_name=name)
        make_head_exact(model, head)
    _check_weights(owner, before)
    return model, name, head


@contextmanager
def use_adapter(model: PeftModel, name: str, sidecar: Sidecar | None = None) -> Iterator[None]:
    """
    Activate one adapter and attach its sidecar; restore the former state afterwards.

    A policy that trains on the same base is not affected, as long as none of its forward passes is running.
    """
    with _unchanged(model):
        model.set_adapter(name)
        if sidecar is not None:
            set_sidecar(model, sidecar)
        yield


def _add_members(
    model: PeftModel,
    folders: Sequence[str | Path],
    names: list[str],
    sidecars: Sequence[Sidecar],
    moved_to: str | None = None,
) -> None:
    """Load all adapters but the first, which is loaded already, and check the heads and scores of all."""
    head = sidecars[0].head_modules
    for name, folder in list(zip(names, folders, strict=True))[1:]:
        model.load_adapter(str(folder), adapter_name=name)
    make_head_exact(model, head)
    model.eval()
    for name, folder, sidecar in zip(names, folders, sidecars, strict=True):
        with use_adapter(model, name, sidecar):
            check_head_in_files(model, head, folder)
            check_probes(model, sidecar, folder, allow_base_mismatch=False, moved_to=moved_to)


def _reward_model_around(
    owner: PreTrainedModel, num_labels: int, head_class: HeadClass, head: list[str] | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """A classification model around the backbone of another model, with a head of zeros; and the head's names."""
    config = copy.deepcopy(owner.config)
    config.num_labels = num_labels
    name_problem(config, num_labels)
    classes = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
    with torch.device("meta"):
        model = classes[head_class].from_config(config)
    prefix = model.base_model_prefix
    if type(model.get_submodule(prefix)) is not type(owner.get_submodule(owner.base_model_prefix)):
        raise BaseMismatchError(
            f"{type(owner).__name__} has another backbone than {type(model).__name__}, so they cannot share it. "
            "Pass a language model of the reward model's family, or leave `base_model` out."
        )
    model.set_submodule(prefix, owner.get_submodule(owner.base_model_prefix))
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(owner, flag, False):  # only quantized models have these fields; PEFT picks its layers by them
            setattr(model, flag, True)
    head = head_modules(model) if head is None else head
    for name in head:  # the adapter contains its copy
        module = model.get_submodule(name).to_empty(device=owner.device)
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    make_head_exact(model, head)
    return model, head


def _check_frozen(model: nn.Module) -> None:
    """Raise `ValueError` if training would move weights of the backbone that the adapters rely on."""
    adapters = {
        id(parameter)
        for layer in _layers(model)
        for name, parameter in layer.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    backbone = model.get_submodule(model.base_model_prefix)
    loose = [name for name, p in backbone.named_parameters() if p.requires_grad and id(p) not in adapters]
    if loose:
        raise ValueError(
            f"{len(loose)} weights of the base are trainable (`{loose[0]}` ...), and training them would change the "
            "rewards. Put the policy's adapter on it first (`get_peft_model`, which freezes the base), or call "
            "`requires_grad_(False)`."
        )


def _checksums(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Two sums over the bits of each weight and buffer in use, by the name without PEFT's wrappers."""
    sums = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or not tensor.numel():
            continue
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        bits = bits.view(torch.int32) if len(bits) % 4 == 0 else bits
        sums[plain_name(name)] = (int(bits.sum(dtype=torch.int64)), int(bits[::3].sum(dtype=torch.int64)))
    return sums


def _check_weights(model: nn.Module, before: dict[str, tuple[int, int]]) -> None:
    """Raise [`BaseMismatchError`] if a weight of the model in memory has changed."""
    now = _checksums(model)
    changed = [name for name, sums in before.items() if now.get(name) != sums]
    if changed:
        raise BaseMismatchError(
            f"Loading the adapters changed {len(changed)} weights of the model in memory (`{changed[0]}` ...). "
            "Load the model again, and leave `base_model` out, so that the adapters get a separate copy of the base."
        )


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold adapters, heads included."""
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """
    Restore the active adapters, the trainable parameters and the mode of a model afterwards.

    Adapters on modules that had none before become inactive.
    """
    active = {id(layer): list(layer.active_adapters) for layer in _layers(model)}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    name = model.active_adapter if isinstance(model, PeftModel) else None
    try:
        yield
    finally:
        for layer in _layers(model):
            layer.set_adapter(active.get(id(layer), []))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter, was in trainable:
            parameter.requires_grad_(was)
        for module, was in training:
            module.training = was
        if name is not None:
            model.active_adapter = name


def _free_name(name: str, model: nn.Module) -> str:
    """`name`, with a number appended if an adapter in the model has that name already."""
    free, number = name, 1
    while any(f".{free}." in path for path, _ in model.named_parameters()):
        free, number = f"{name}-{number}", number + 1
    return free
