"""Several saved adapters on one base: the base is in memory once, also in 4 bits, and also if a policy trains on it.

Knows PEFT adapters, sidecars and bases. Knows nothing of text or of how scores are combined.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

from trl_ext.models.building import keep_4bit_exact_on_cpu
from trl_ext.models.heads import make_head_exact, unwrap
from trl_ext.models.loading import (
    BaseMismatchError,
    check_head_in_files,
    check_probes,
    check_same_base,
    load_reward_model,
)
from trl_ext.models.sidecar import Sidecar, SidecarError, read_sidecar, set_sidecar


def base_key(folder: str | Path) -> str | None:
    """
    What two saved adapters must have in common to share a base; `None` for a full model or one without a sidecar.

    Id, revision, quantization, dtype and vocabulary of the base, and the shape of the head.
    """
    sidecar = read_sidecar(folder)
    if sidecar is None or not sidecar.is_adapter:
        return None
    base = sidecar.base
    key = [base.id, base.revision, base.dtype, base.quantization, base.vocab_size]
    return json.dumps([*key, sidecar.head_class, sidecar.num_labels, sorted(sidecar.head_modules)], sort_keys=True)


def load_adapters(
    folders: Sequence[str | Path], base_model: nn.Module | None = None, **load_kwargs: Any
) -> tuple[PeftModel, list[str]]:
    """
    Load adapters with their heads onto one base.

    Args:
        folders (sequence of `str` or `Path`):
            Local folders of adapters with the same [`base_key`].
        base_model (`PreTrainedModel` or `PeftModel`, *optional*):
            A model in memory whose backbone is the base, e.g. a policy that is trained (a language model, with an
            adapter of its own or not yet). The adapters are put beside those that it has. What it computes, what of it
            is trainable and its mode stay as they are. Its base has to be frozen. By default the base is loaded.
        **load_kwargs: for [`load_reward_model`], if `base_model` is not given.

    Returns:
        `tuple[PeftModel, list[str]]`: a model whose adapters are frozen, and the name of the adapter of each folder.
        [`use_adapter`] switches between them.

    Raises:
        [`BaseMismatchError`]: the model in memory is not what the adapters were trained on, by what it says of itself
            or by the scores of the probes.
        [`SidecarError`]: a folder is not an adapter with a sidecar, or they do not share a base.
        `ValueError`: the base of the model in memory is trainable.
    """
    keys = {base_key(folder) for folder in folders}
    if len(keys) != 1 or None in keys:
        raise SidecarError(
            f"{', '.join(map(str, folders))} cannot share a base. Needed: adapters with a reward_model.json that were "
            "trained on one base, quantized in one way, with heads of one shape."
        )
    sidecars = [read_sidecar(folder) for folder in folders]
    names = [f"member-{number}" for number in range(len(folders))]
    if base_model is None:
        names[0] = "default"  # PEFT's name for the adapter that a model is loaded with
        model = load_reward_model(folders[0], **load_kwargs)
        _add_members(model, folders, names, sidecars)
        return model, names
    check_same_base(base_model, sidecars[0], folders[0])
    keep_4bit_exact_on_cpu(base_model)
    owner = unwrap(base_model)
    _check_frozen(owner)
    names = [_free_name(name, owner) for name in names]
    with _unchanged(owner):
        model = _reward_model_around(owner, sidecars[0])
        model = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
        _add_members(model, folders, names, sidecars)
    return model, names


@contextmanager
def use_adapter(model: PeftModel, name: str, sidecar: Sidecar | None = None) -> Iterator[None]:
    """
    Make one adapter the active one, with its sidecar, and put everything back afterwards.

    A policy that trains on the same base does not notice, so long as none of its forward passes is under way.
    """
    with _unchanged(model):
        model.set_adapter(name)
        if sidecar is not None:
            set_sidecar(model, sidecar)
        yield


def _add_members(
    model: PeftModel, folders: Sequence[str | Path], names: list[str], sidecars: Sequence[Sidecar]
) -> None:
    """Load all adapters but the first, which is there, and check heads and scores of all."""
    head = sidecars[0].head_modules
    for name, folder in list(zip(names, folders, strict=True))[1:]:
        model.load_adapter(str(folder), adapter_name=name)
    make_head_exact(model, head)
    model.eval()
    for name, folder, sidecar in zip(names, folders, sidecars, strict=True):
        with use_adapter(model, name, sidecar):
            check_head_in_files(model, head, folder)
            check_probes(model, sidecar, folder, allow_base_mismatch=False)


def _reward_model_around(owner: PreTrainedModel, sidecar: Sidecar) -> PreTrainedModel:
    """A classification model whose backbone is that of another model, with a head of zeros."""
    config = copy.deepcopy(owner.config)
    config.num_labels = sidecar.num_labels
    classes = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
    with torch.device("meta"):
        model = classes[sidecar.head_class].from_config(config)
    prefix = model.base_model_prefix
    if type(model.get_submodule(prefix)) is not type(owner.get_submodule(owner.base_model_prefix)):
        raise BaseMismatchError(
            f"The backbone of {type(owner).__name__} is not that of {type(model).__name__}, so it cannot be shared. "
            "Pass a language model of the reward model's family, or leave `base_model` out."
        )
    model.set_submodule(prefix, owner.get_submodule(owner.base_model_prefix))
    for name in sidecar.head_modules:  # the adapter brings its own copy
        module = model.get_submodule(name).to_empty(device=owner.device)
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    make_head_exact(model, sidecar.head_modules)
    return model


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
            "rewards. Put the policy's own adapter on it first (`get_peft_model`, which freezes the base), or call "
            "`requires_grad_(False)`."
        )


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold adapters, heads included."""
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back active adapters, what is trainable, and the mode. Adapters on modules that had none become inactive."""
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
    """`name`, or if an adapter in the model has it, with a number behind it."""
    free, number = name, 1
    while any(f".{free}." in path for path, _ in model.named_parameters()):
        free, number = f"{name}-{number}", number + 1
    return free
