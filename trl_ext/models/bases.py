"""The base of an adapter: describes it, compares it with another base, and compares memory with the saved files.

It knows models, weights in memory and in files, and the base that a sidecar records. It knows nothing of heads, files
of adapters, text or training.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from huggingface_hub import constants, snapshot_download
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig

from trl_ext.models.building import as_dtype
from trl_ext.models.heads import unwrap
from trl_ext.models.sidecar import BaseModel, Sidecar, probe_drift, vocab_size


logger = logging.getLogger(__name__)

# Kernels and devices may move probe scores by this share of their standard deviation; a wrong base moves them by 0.12
# to 0.54 of it.
MAX_PROBE_DRIFT = 0.1
# Parts that PEFT's wrappers add to a parameter's name.
_WRAPPERS = ("base_layer", "original_module", "token_adapter")
# How many rows of a tensor, and how many numbers of a quantized tensor, are compared with the file.
_SAMPLED_ROWS, _SAMPLED_NUMBERS = 8, 8192
# Share of the quantized numbers that another device or dtype may round differently.
_ROUNDING = 0.02


class BaseMismatchError(ValueError):
    """The base of a reward model is not what the model was trained on, or could not be loaded again."""


def describe_base(model: nn.Module) -> BaseModel:
    """Id, revision, dtype and quantization of the backbone of a model in memory."""
    base = unwrap(model)
    # only the config of a quantized model has the field
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    floating = (p.dtype for p in base.get_submodule(base.base_model_prefix).parameters() if p.is_floating_point())
    source = base.config._name_or_path
    # only a config from the Hub has the field
    revision = getattr(base.config, "_commit_hash", None)
    if source and Path(source).is_dir():
        source, revision = _in_hub_cache(source) or (str(Path(source).resolve()), revision)
    return BaseModel(
        id=source,
        revision=revision,
        dtype=str(next(floating)).removeprefix("torch."),
        quantization=None if quantization is None else _plain(quantization),
        vocab_size=vocab_size(base),
    )


def _in_hub_cache(folder: str) -> tuple[str, str] | None:
    """Repository and commit of a folder in the Hub's cache: others can load these, and not a path of this machine."""
    path, cache = Path(folder).absolute(), Path(constants.HF_HUB_CACHE).absolute()
    if path.parent.name != "snapshots" or path.parent.parent.parent != cache:
        return None
    kind, *names = path.parent.parent.name.split("--")
    return ("/".join(names), path.name) if kind == "models" else None


def same_source(one: str | Path, other: str) -> bool:
    """Whether two names stand for one folder or one Hub repository."""
    return str(one) == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def base_differences(base: BaseModel, dtype: Any, quantization: dict[str, Any] | None) -> list[str]:
    """The settings in which a base differs from the recorded one, in words. [`check_probes`] compares the weights."""
    found = []
    if as_dtype(dtype) != as_dtype(base.dtype):
        found.append(f"dtype {base.dtype}, asked for {dtype}")
    was, asked = _essence(base.quantization), _essence(quantization)
    if was != asked:
        found.append(f"quantization {was}, asked for {asked}")
    return found


def quantization_config(quantization: dict[str, Any] | None) -> BitsAndBytesConfig | None:
    """The recorded quantization as an argument of `from_pretrained`."""
    if quantization is None or quantization.get("quant_method") != "bitsandbytes":
        return None  # other methods are part of the base checkpoint, which contains their config
    return BitsAndBytesConfig.from_dict(dict(quantization))


def as_recorded(config: BitsAndBytesConfig | None) -> dict[str, Any] | None:
    """A quantization config in the form that a sidecar records."""
    return None if config is None else _plain(config.to_dict())


def plain_name(name: str) -> str:
    """The name that a weight has in a model without adapters."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def check_same_base(model: nn.Module, sidecar: Sidecar, path: str | Path) -> None:
    """
    Raise [`BaseMismatchError`] if a model in memory has other settings than the recorded base.

    The path is not compared, because folders move. [`check_probes`] compares what the models compute.
    """
    here = describe_base(model)
    differences = base_differences(sidecar.base, here.dtype, here.quantization)
    if sidecar.base.vocab_size not in (None, here.vocab_size):
        differences.append(f"{sidecar.base.vocab_size} token embeddings, found {here.vocab_size}")
    if sidecar.probes is None and not same_source(here.id, sidecar.base.id):
        differences.append(f"base model {sidecar.base.id!r}, found {here.id!r} (without probes to compare them by)")
    if differences:
        raise BaseMismatchError(
            f"{path} was trained on another base than the model in memory: {'; '.join(differences)}. Its scores would "
            "change. Load the model in memory with the settings of the recorded base."
        )


def check_probes(
    model: nn.Module, sidecar: Sidecar, path: str | Path, allow_base_mismatch: bool, moved_to: str | None = None
) -> None:
    """
    Compare the scores of the probes with those at save time, and log how far they moved.

    Args:
        model (`nn.Module`): the loaded reward model.
        sidecar ([`Sidecar`]): holds the probes.
        path (`str` or `Path`): where the reward model is, for messages.
        allow_base_mismatch (`bool`): warn instead of raising.
        moved_to (`str`, *optional*): where the base was loaded from, if that is not its recorded place. Then only
            rounding is allowed.

    Raises:
        [`BaseMismatchError`]: the scores moved by more than rounding.
    """
    drift = probe_drift(model, sidecar)
    if drift is None:
        return
    report = (
        f"{path}: scores of {len(sidecar.probes['input_ids'])} probes moved by at most {drift['max']:.2g} "
        f"({drift['relative']:.1%} of their standard deviation) since the model was saved"
    )
    exact = sidecar.base.quantization is None and sidecar.base.dtype == "float32"
    size = max(1.0, *(abs(score) for score in sidecar.probes["scores"]))
    rounding = drift["max"] <= (1e-4 if exact else 2e-2) * size
    if rounding or (moved_to is None and drift["relative"] <= MAX_PROBE_DRIFT):
        logger.info(f"{report}.")
    elif allow_base_mismatch:
        logger.warning(f"{report}. The model is loaded anyway because allow_base_mismatch=True.")
    else:
        raise BaseMismatchError(
            f"{report}. The base at {moved_to or sidecar.base.id!r} is not the one it was trained on (other weights, "
            "quantization or dtype). Restore the original base, or pass allow_base_mismatch=True to use the changed "
            "scores."
        )


# ---------------------------------------------------------------------------------------------------- memory and disk
_SAVED_ALONE = "An adapter is saved without its base, so that it could not be loaded again as it was trained."


def check_base_is_saved(model: nn.Module, why: str = _SAVED_ALONE) -> None:
    """
    Raise [`BaseMismatchError`] unless the base of a model in memory can be loaded again from the model's path.

    An adapter is saved without its base, so the base must be on disk. A few rows of each weight are compared with the
    safetensors files of the folder, or of the Hub repository's local copy. Weights that the files do not name, and
    weights that are sharded over processes, are not compared.

    Args:
        model (`nn.Module`): a model that has an adapter or will get one.
        why (`str`, *optional*): the sentence of the message that says why the base is loaded again.
    """
    base = unwrap(model)
    source = base.config._name_or_path
    cure = (
        f"{why} Save the model without an adapter and with its tokenizer (`model.save_pretrained(folder)`), and train "
        "on that folder."
    )
    if not source:
        raise BaseMismatchError(f"The model in memory was not loaded from a folder or Hub repository. {cure}")
    folder = local_copy(source, getattr(base.config, "_commit_hash", None))  # only a config from the Hub has the hash
    if folder is None:
        if Path(source).is_absolute():
            raise BaseMismatchError(f"The model in memory was loaded from {source}, which does not exist now. {cure}")
        logger.info(f"There is no local copy of {source} to compare the model in memory with.")
        return
    differing = list(_differing_weights(base, folder, isinstance(model, PeftModel)))
    if differing:
        more = f" and {len(differing) - 1} more weights" if len(differing) > 1 else ""
        raise BaseMismatchError(
            f"The model in memory differs from the files in {source}: `{differing[0]}`{more} differ, e.g. because an "
            f"adapter was merged into it. {cure}"
        )


def local_copy(source: str, revision: str | None) -> Path | None:
    """The folder with the weights of a model that was loaded by its path or Hub id; `None` if it is not here."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=["*.safetensors"], local_files_only=True)
        )
    except (OSError, ValueError):
        return None


def _differing_weights(base: nn.Module, folder: Path, has_adapter: bool) -> Iterator[str]:
    """Names of the weights of the backbone that differ from those in the folder's files."""
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            places.update(dict.fromkeys(tensors.keys(), file))
    prefix = f"{base.base_model_prefix}."
    modules = dict(base.named_modules())
    for name, weight in base.named_parameters():
        plain = plain_name(name)
        key = plain if plain in places else plain.removeprefix(prefix)  # the file of a bare model has no prefix
        # an adapter saves everything that it trains, including biases of the base
        compared = name.startswith(prefix) and key in places and not (has_adapter and weight.requires_grad)
        if not compared or weight.is_meta or weight.numel() == 0 or isinstance(weight, DTensor):
            continue
        with safe_open(places[key], framework="pt") as tensors:
            if not _is_same(weight.data, modules[name.rpartition(".")[0]], tensors.get_slice(key)):
                yield plain


def _is_same(weight: torch.Tensor, module: nn.Module, saved: Any) -> bool:
    """Whether a few rows of a weight in memory equal those in its file (a slice of safetensors)."""
    shape = saved.get_shape()
    if isinstance(module, bnb.nn.Linear4bit) and list(weight.shape) != shape:
        return _is_same_4bit(module.weight, saved)
    if isinstance(module, bnb.nn.Linear8bitLt) and weight.dtype == torch.int8:
        return _is_same_int8(weight, saved)
    if len(shape) != weight.dim() or shape[1:] != list(weight.shape[1:]):
        return True  # memory and file hold the weight in different forms, which cannot be compared
    count = min(len(weight), shape[0]) if shape else 1  # embeddings may have been resized
    if len(shape) < 2:
        here, there = weight.reshape(-1)[:count], saved[:].reshape(-1)[:count]
        return torch.equal(here.cpu(), there.to(weight.dtype))
    rows = torch.linspace(0, count - 1, min(count, _SAMPLED_ROWS)).long().unique().tolist()
    return all(torch.equal(weight[row].cpu(), saved[row : row + 1][0].to(weight.dtype)) for row in rows)


def _is_same_4bit(weight: Any, saved: Any) -> bool:
    """Quantize the first blocks of the file like the weight in memory, and compare the codes."""
    state, columns = weight.quant_state, saved.get_shape()[-1]
    rows = saved[: max(1, _SAMPLED_NUMBERS // columns)]
    numbers = rows.reshape(-1)[: rows.numel() // state.blocksize * state.blocksize].to(weight.device, state.dtype)
    if not len(numbers):
        return True
    codes, _ = bnb.functional.quantize_4bit(numbers, blocksize=state.blocksize, quant_type=state.quant_type)
    codes = codes.view(torch.uint8).reshape(-1)
    here = weight.data.view(torch.uint8).reshape(-1)[: len(codes)]
    return (here != codes).float().mean().item() <= _ROUNDING


def _is_same_int8(weight: torch.Tensor, saved: Any) -> bool:
    """Round the first rows of the file to int8 as bitsandbytes does, and compare."""
    rows = saved[: max(1, min(len(weight), _SAMPLED_NUMBERS // weight.shape[-1]))].float()
    codes = (rows * 127 / rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)).round()
    here = weight[: len(codes)].cpu().float()
    return ((here - codes).abs() > 1).float().mean().item() <= _ROUNDING


# -------------------------------------------------------------------------------------------------------------- plain
def _essence(quantization: dict[str, Any] | None) -> dict[str, Any] | None:
    """The fields of a bitsandbytes config that change the weights."""
    if quantization is None:
        return None
    if quantization.get("load_in_8bit"):
        return {"load_in_8bit": True}
    keys = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    return {key: quantization.get(key) for key in keys}


def _plain(value: Any) -> Any:
    """A copy that JSON can hold: dtypes and enums as strings, sets as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
