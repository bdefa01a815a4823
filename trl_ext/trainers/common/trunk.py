"""The argument `trunk_cache`: which layers a trainer may run once for each text, and where their states are kept.

It knows trainers and adapters. [`FrozenTrunk`] knows how states are kept and layers are skipped.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from trl_ext.models.ensemble.branching import find_layers
from trl_ext.models.fingerprint import add_tensor
from trl_ext.models.frozen_trunk import FrozenTrunk, MemoryStates, StoredStates
from trl_ext.models.heads import last_head_module, unwrap
from trl_ext.models.rope import original_context


logger = logging.getLogger(__name__)


@contextmanager
def trunk_states(trunk: FrozenTrunk | None) -> Iterator[None]:
    """
    Keep and use states while a trainer trains, evaluations in between included, and say at the end what that saved.

    The model is the user's before and after: what runs through it then must neither be kept nor read from the cache.
    """
    if trunk is None:
        yield
        return
    trunk.install()
    try:
        yield
    finally:
        trunk.remove()
    logger.info(
        f"{trunk.skipped} of {trunk.passes} batches found all their states kept. These take "
        f"{trunk.store.size / 2**20:.0f} MiB."
    )


def keep_trunk_states(trainer: Trainer) -> None:
    """
    Follow the trainer's `trunk_cache`; the last step but one of a trainer's `__init__`. See [`trunk_states`].

    Raises:
        ValueError: the layers below the adapters do not give the same states in every epoch, or nothing is below them.
    """
    wish = trainer.args.trunk_cache
    if wish is None:
        return
    model = unwrap(trainer.model)
    backbone = model.get_submodule(model.base_model_prefix)
    layers, first = _frozen_layers(backbone, model.config.get_text_config().num_hidden_layers)
    _refuse_what_changes(trainer, backbone, layers, first)
    _check(trainer.model, backbone, layers, first)
    store = MemoryStates() if wish == "memory" else StoredStates(Path(wish) / _key_of(backbone, layers, first))
    trainer._trunk = FrozenTrunk(backbone, layers, first, store)
    place = "in memory" if wish == "memory" else f"in {wish}"
    logger.info(
        f"Layers 0 to {first - 1} of {len(layers)} are not trained: each text runs through them once, and their "
        f"states are kept {place}."
    )


def _frozen_layers(backbone: nn.Module, number: int) -> tuple[nn.ModuleList, int]:
    """The layers, and the first that an adapter or the optimizer changes."""
    changed = [name for name, weight in backbone.named_parameters() if weight.requires_grad or ".lora_" in name]
    layers, first = find_layers(backbone, changed, number) if changed else (None, 0)
    if layers is None or first == 0:
        found = "nothing in the backbone is trained" if not changed else f"{changed[0]} is trained or adapted"
        raise ValueError(
            f"trunk_cache: {found}. Needed: adapters in the upper layers only, and nothing trained below them. Give "
            f"LoraConfig layers_to_transform=list(range({number - number // 4}, {number})), for example."
        )
    return layers, first


def _refuse_what_changes(trainer: Trainer, backbone: nn.Module, layers: nn.ModuleList, first: int) -> None:
    """Raise `ValueError` if the states below the adapters differ between epochs or between batches."""
    args, config = trainer.args, unwrap(trainer.model).config.get_text_config()
    above = {id(module) for layer in layers[first:] for module in layer.modules()}
    below = [module for module in backbone.modules() if id(module) not in above]
    dropout = getattr(config, "attention_dropout", 0.0) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in below
    )
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    moving = original_context(config) is not None
    reasons = {
        "the layers below the adapters have dropout; set it to 0 in model_init_kwargs": dropout,
        "neftune_noise_alpha changes the inputs in every epoch; leave it out": args.neftune_noise_alpha is not None,
        "torch_compile compiles the layers; leave it out": args.torch_compile,
        "FSDP and DeepSpeed shard the layers; leave them out": sharded,
        "the rotary positions of this model depend on the longest row of a batch": moving,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"trunk_cache={args.trunk_cache!r} is not possible: {reason}.")


@torch.no_grad()
def _check(model: nn.Module, backbone: nn.Module, layers: nn.ModuleList, first: int) -> None:
    """Compare the head's output with and without kept states, and the states of training, on a few random rows."""
    outputs: list[torch.Tensor] = []
    base = unwrap(model)
    handle = last_head_module(base).register_forward_hook(lambda module, args, output: outputs.append(output))
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.config.get_text_config().vocab_size, (2, 7), generator=generator).to(device)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3], device=device)
    model.eval()
    trunk = None
    try:
        model(input_ids=ids, attention_mask=mask)
        trunk = FrozenTrunk(backbone, layers, first, MemoryStates())
        trunk.install()
        for _ in range(2):
            model(input_ids=ids, attention_mask=mask)
        plain, kept = outputs[0].float(), outputs[-1].float()
        # the padding of the second row has no kept states, so only rows and places with tokens are compared
        real = mask.bool() if plain.shape[1:2] == mask.shape[1:] else slice(None)
        copies = len(plain) // len(mask) if isinstance(real, torch.Tensor) else 1  # an ensemble repeats the rows
        real = real.repeat(copies, 1) if isinstance(real, torch.Tensor) else real
        same = torch.allclose(plain[real], kept[real], atol=1e-5, rtol=1e-3)
        reason = f"its head gives outputs that differ by {(plain[real] - kept[real]).abs().max():.2g}"
        trunk.remove()
        in_training = FrozenTrunk(backbone, layers, first, MemoryStates())
        _run_in_training(model, in_training, ids, mask)
        if same and not trunk.store.is_like(in_training.store):
            same = False
            reason = (
                "the layers below the adapters give other states in training than in evaluation: set their dropout "
                "to 0 in model_init_kwargs"
            )
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        same, reason = False, f"{type(error).__name__}: {error}"
    finally:
        handle.remove()
        model.eval()
        if trunk is not None:
            trunk.remove()
        for module in training:
            module.training = True
    if not same:
        raise ValueError(
            f"trunk_cache does not work with {type(base).__name__} ({reason}). Needed: layers that take the states of "
            "the layer before and return new ones. Leave trunk_cache out."
        )


def _run_in_training(model: nn.Module, trunk: FrozenTrunk, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Keep the states of rows in training mode. Leaves the random numbers as they were."""
    model.train()
    trunk.install()
    try:
        with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # checkpointing wants a gradient
            model(input_ids=ids, attention_mask=mask)
    finally:
        trunk.remove()


def _key_of(backbone: nn.Module, layers: nn.ModuleList, first: int) -> str:
    """A name for everything that the states depend on, besides the texts: weights and config of the trunk."""
    above = {id(module) for layer in layers[first:] for module in layer.modules()}
    config: Any = backbone.config.to_diff_dict()
    for name in ("_name_or_path", "num_labels", "id2label", "label2id", "pad_token_id", "architectures"):
        config.pop(name, None)
    digest = hashlib.sha256(f"{first} {sorted(config.items(), key=str)}".encode())
    for name, module in backbone.named_modules():
        if id(module) in above:
            continue
        for own, weight in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            add_tensor(digest, f"{name}.{own}", weight)
    return digest.hexdigest()[:16]
