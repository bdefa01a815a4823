"""Saving and loading a reward model so that its scores survive.

It knows folders, safetensors, PEFT adapters and the sidecar. It knows nothing of text, data sets or training.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_ext.models.bases import (
    BaseMismatchError,
    as_recorded,
    base_differences,
    check_probes,
    describe_base,
    quantization_config,
    same_source,
)
from trl_ext.models.building import build_reward_model
from trl_ext.models.heads import HeadError, head_modules, head_parameters, make_head_exact
from trl_ext.models.sidecar import (
    KINDS,
    SIDECAR_NAME,
    BaseModel,
    Sidecar,
    SidecarError,
    read_sidecar,
    set_sidecar,
    vocab_size,
)


__all__ = ["BaseMismatchError", "describe_base", "load_reward_model", "local_folder", "save_sidecar"]

logger = logging.getLogger(__name__)

# The files that are downloaded from a Hub repository.
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt", "*.py")


# ------------------------------------------------------------------------------------------------------------- saving
def save_sidecar(model: nn.Module, sidecar: Sidecar, folder: str | Path) -> None:
    """Check that the files of a model that was just saved hold its whole head, and write the sidecar beside them."""
    check_saved_head(model, sidecar.head_modules, folder)
    sidecar.save(folder)
    set_sidecar(model, sidecar)


def check_saved_head(model: nn.Module, head: list[str], folder: str | Path) -> None:
    """Raise [`HeadError`] with the tensor's name unless the folder holds every head tensor bit for bit."""
    saved = _tensors(folder, head)
    for key, parameter in head_parameters(model, head).items():
        if parameter.numel() == 0 or isinstance(parameter, DTensor):  # sharded by ZeRO-3 or FSDP: no copy to compare
            if key not in saved or saved[key].numel() == 0:
                raise HeadError(f"{folder}: the head tensor `{key}` was not saved or is empty.")
            if parameter.numel() and saved[key].shape != parameter.shape:
                raise HeadError(
                    f"{folder}: only a part of the head tensor `{key}` was saved, of shape {tuple(saved[key].shape)}."
                )
        elif key not in saved or saved[key].numel() == 0:
            raise HeadError(
                f"{folder}: the head tensor `{key}` was not saved or is empty; saved head tensors: {sorted(saved)}. "
                "The checkpoint could not be loaded again; please check free disk space and report this."
            )
        elif not torch.equal(saved[key].to(parameter.dtype), parameter.detach().cpu()):
            raise HeadError(f"{folder}: the saved head tensor `{key}` differs from the one in memory.")


# ------------------------------------------------------------------------------------------------------------ loading
def load_reward_model(
    path: str | Path,
    *,
    base_model: str | Path | None = None,
    allow_base_mismatch: bool = False,
    is_trainable: bool = False,
    revision: str | None = None,
    **load_kwargs: Any,
) -> nn.Module:
    """
    Load a reward model from its path alone: a full checkpoint or an adapter, with or without our sidecar.

    An adapter is put on the base that it was trained on, with the id, revision, quantization and dtype that the
    sidecar records. The scores of a few probes are compared with those at save time, and the change is logged.

    Args:
        path (`str` or `Path`):
            Folder or Hub id.
        base_model (`str` or `Path`, *optional*):
            Where the base of an adapter is now, if it moved: a folder or Hub id. It must hold the same weights; the
            probes check this.
        allow_base_mismatch (`bool`, *optional*, defaults to `False`):
            Load the model on another base, quantization or dtype anyway, and log how far the scores moved.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether an adapter and its head can be trained further.
        revision (`str`, *optional*):
            Revision of the Hub repository at `path`.
        **load_kwargs:
            Arguments of `from_pretrained` (`device_map`, `attn_implementation`, `trust_remote_code` ...).
            `quantization_config` and `dtype` override the recorded ones; `dtype="auto"` is the recorded one.

    Returns:
        `PreTrainedModel` or `PeftModel`, in eval mode, with an exact fp32 head and the sidecar attached.

    Raises:
        [`BaseMismatchError`]: `allow_base_mismatch` is false, and an override differs from the record, `base_model` is
            another base, or the probe scores moved by more than 0.1 of their standard deviation.
        [`HeadError`]: a head tensor is missing or empty (the message names it), or the folder holds a language model
            or its adapter.
        [`SidecarError`]: the sidecar is damaged, has a newer version, or does not describe the files of the folder.
        `ValueError`: `base_model` is given for a full checkpoint, which has no base.
    """
    folder = local_folder(path, revision)
    sidecar = read_sidecar(folder)
    is_adapter = Path(folder, "adapter_config.json").is_file()
    _check_folder(path, folder, sidecar, is_adapter)
    if base_model is not None and not is_adapter:
        raise ValueError(f"{path} is a full checkpoint and needs no base. Leave `base_model` out.")
    if "torch_dtype" in load_kwargs:  # its old name
        load_kwargs.setdefault("dtype", load_kwargs.pop("torch_dtype"))
    base = sidecar.base if sidecar is not None else _base_without_sidecar(folder, is_adapter, base_model)
    if load_kwargs.get("dtype", "auto") == "auto":  # transformers would take that of the stored base
        load_kwargs["dtype"] = base.dtype
    _check_overrides(path, sidecar, base_model, load_kwargs, allow_base_mismatch)
    load_kwargs |= _head_without_sidecar(folder, is_adapter) if sidecar is None else _head_of(sidecar)
    if is_adapter:
        model, head = _load_adapter(path, folder, base, sidecar, base_model, is_trainable, load_kwargs)
    else:
        model, head = _load_full(folder, sidecar, load_kwargs)
    make_head_exact(model, head)
    model.eval()
    if sidecar is None:
        logger.info(f"{path} has no reward_model.json. Base and dtype come from its other files and are not checked.")
    else:
        set_sidecar(model, sidecar)
        moved = base_model is not None and not same_source(base_model, base.id)
        check_probes(model, sidecar, path, allow_base_mismatch, str(base_model) if moved else None)
    return model


def local_folder(path: str | Path, revision: str | None, files: Sequence[str] = HUB_FILES) -> str:
    """The local folder of a model; if `path` is a Hub id, the files that match `files` are downloaded first."""
    if Path(path).is_dir():
        return str(path)
    if Path(path).is_absolute() or str(path).startswith("."):
        raise FileNotFoundError(f"{path} is not a folder. Needed: the folder or Hub id of a saved model.")
    try:
        return snapshot_download(str(path), revision=revision, allow_patterns=list(files))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path} is not a folder here, and no Hub repository of that name could be downloaded: {error}"
        ) from error


def check_head_in_files(model: nn.Module, head: list[str], folder: str | Path) -> dict[str, torch.Tensor]:
    """The head's saved tensors. Raises [`HeadError`] if one is missing or has another shape than in memory."""
    saved = _tensors(folder, head)
    for key, parameter in head_parameters(model, head).items():
        if key not in saved or saved[key].numel() == 0:
            raise HeadError(
                f"{folder} holds no reward head: `{key}` is missing or empty (head tensors found: "
                f"{sorted(saved) or 'none'}). It was saved without its head, e.g. by a LoRA run without "
                "`modules_to_save`; the trained head is lost and the model must be trained again."
            )
        if saved[key].shape != parameter.shape:
            raise HeadError(f"{folder}: `{key}` has shape {tuple(saved[key].shape)}, needed {tuple(parameter.shape)}.")
    return saved


def _load_adapter(
    path: str | Path,
    folder: str,
    base: BaseModel,
    sidecar: Sidecar | None,
    base_model: str | Path | None,
    is_trainable: bool,
    load_kwargs: dict[str, Any],
) -> tuple[nn.Module, list[str]]:
    """Load an adapter on its base; also return the names of the head's modules."""
    base_id = str(base_model or base.id)
    quantization = load_kwargs.pop("quantization_config", quantization_config(base.quantization))
    if base.revision is not None and base_id == base.id and not Path(base_id).is_dir():
        load_kwargs["revision"] = base.revision
    if Path(base_id).is_absolute() and not Path(base_id).is_dir():
        raise BaseMismatchError(
            f"{path} was trained on the base in {base_id}, which does not exist here. Restore that folder, or pass "
            "its new place as `base_model=`."
        )
    model, head = build_reward_model(base_id, quantization_config=quantization, **load_kwargs)
    head = sidecar.head_modules if sidecar is not None else head
    make_head_exact(model, head)  # before the adapter's own copy is made from it
    if base.vocab_size not in (None, vocab_size(model)):  # tokens were added; their embeddings are in the adapter
        model.resize_token_embeddings(base.vocab_size, mean_resizing=False)
    check_head_in_files(model, head, folder)
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=is_trainable), head
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise BaseMismatchError(
            f"The adapter in {path} does not fit the base at {base_id}: {reason} Needed: the base that it was trained "
            "on."
        ) from error


def _load_full(folder: str, sidecar: Sidecar | None, load_kwargs: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """Load a full checkpoint; also return the names of the head's modules."""
    model, _ = build_reward_model(folder, **load_kwargs)
    head = sidecar.head_modules if sidecar is not None else head_modules(model)
    make_head_exact(model, head)
    saved = check_head_in_files(model, head, folder)
    for key, parameter in head_parameters(model, head).items():  # bf16 loading rounded them
        parameter.data.copy_(saved[key])
    return model, head


# ------------------------------------------------------------------------------------------------------------- checks
def _check_folder(path: str | Path, folder: str, sidecar: Sidecar | None, is_adapter: bool) -> None:
    """If a folder holds no reward model that we can load, raise an error that says what it holds."""
    if sidecar is None:
        _refuse_value_head(path, folder)
        if is_adapter and is_language_adapter(folder):
            raise HeadError(
                f"{path} is the adapter of a language model (task type CAUSAL_LM) without a reward head. Needed: a "
                "reward model as a trainer saved it. Train one first: RewardTrainer takes this folder as `model`."
            )
        if not is_adapter:
            _refuse_language_model(path, folder)
        return
    if sidecar.is_adapter != is_adapter:
        was, now = ("an adapter", "none") if sidecar.is_adapter else ("a full model", "an adapter")
        raise SidecarError(
            f"{path}: {SIDECAR_NAME} describes {was}, but the folder holds {now}. Another model was saved over it. "
            f"Restore the folder, or delete {SIDECAR_NAME} to load the files without checks."
        )
    if sidecar.kind not in KINDS:
        raise SidecarError(
            f"{path} is a reward model of kind {sidecar.kind!r}; this version knows {', '.join(KINDS)}. Upgrade "
            "trl-ext."
        )


def _check_overrides(
    path: str | Path,
    sidecar: Sidecar | None,
    base_model: str | Path | None,
    load_kwargs: dict[str, Any],
    allow_base_mismatch: bool,
) -> None:
    """Raise [`BaseMismatchError`] for arguments that would change the scores, unless that is allowed."""
    if sidecar is None or allow_base_mismatch:
        return
    base, quantization = sidecar.base, sidecar.base.quantization
    if "quantization_config" in load_kwargs:
        quantization = as_recorded(load_kwargs["quantization_config"])
    differences = base_differences(base, load_kwargs["dtype"], quantization)
    if base_model is not None and sidecar.probes is None and not same_source(base_model, base.id):
        differences.append(
            f"base model {base.id!r}, asked for {str(base_model)!r} (without probes to compare them by)"
        )
    if differences:
        raise BaseMismatchError(
            f"{path} was trained on another base: {'; '.join(differences)}. Its scores would change. Leave the "
            "arguments out to use the recorded base, or pass allow_base_mismatch=True to load the model anyway; the "
            "log then says how far the scores moved."
        )


def _refuse_value_head(path: str | Path, folder: str) -> None:
    """Raise [`HeadError`] for the value head that LlamaFactory and TRL's old PPO saved beside a model or adapter."""
    if has_value_head(folder):
        raise HeadError(
            f"{path} holds a value head (value_head.safetensors), as LlamaFactory saves it for "
            "`AutoModelForCausalLMWithValueHead`. Neither transformers nor trl_ext can load it as a reward head. "
            "Train the reward model again with a trainer of trl_ext, on the same base and data."
        )


def has_value_head(folder: str | Path) -> bool:
    """Whether LlamaFactory saved a value head into a folder."""
    return any(Path(folder, f"value_head.{kind}").is_file() for kind in ("safetensors", "bin"))


def _refuse_language_model(path: str | Path, folder: str) -> None:
    """Raise [`HeadError`] if the config describes a language model, which has no reward head."""
    config = Path(folder, "config.json")
    names = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    for name in names or []:
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")):
            raise HeadError(
                f"{path} is a language model ({name}) without a reward head. Needed: a reward model as a trainer "
                "saved it. Train one on this model first, e.g. with `trl-ext reward --model_name_or_path`."
            )


# -------------------------------------------------------------------------------------- adapters of language models
def is_language_adapter(folder: str | Path) -> bool:
    """Whether a folder holds the adapter of a language model, e.g. of SFT: task type CAUSAL_LM and no reward head."""
    config = Path(folder, "adapter_config.json")
    if not config.is_file() or read_sidecar(folder) is not None:
        return False
    task = json.loads(config.read_text(encoding="utf-8")).get("task_type")
    return task == "CAUSAL_LM" and not _tensors(folder, ["score", "classifier"])


def merge_language_adapter(path: str | Path, **build_kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """
    Merge the adapter of a language model into its base in memory, and build a reward model with a new head on it.

    Args:
        path (`str` or `Path`): folder or Hub id of the adapter of a language model.
        **build_kwargs: for [`~trl_ext.models.build_reward_model`]. Quantization is not possible.

    Returns:
        The model and the names of its head's modules, as [`~trl_ext.models.build_reward_model`] gives them.

    Raises:
        ValueError: quantization is requested, the base is quantized already, or the adapter does not fit it.
    """
    folder = local_folder(path, build_kwargs.pop("revision", None))
    base_id = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if build_kwargs.get("quantization_config") is not None:
        raise ValueError(how_to_merge(path))
    model, head = build_reward_model(base_id, **build_kwargs)
    backbone = model.get_submodule(model.base_model_prefix)
    dtype = next(backbone.parameters()).dtype
    # only a quantized model has the field
    if getattr(model, "is_quantized", False):
        raise ValueError(how_to_merge(path))
    hub = {key: build_kwargs[key] for key in ("trust_remote_code", "token", "cache_dir") if key in build_kwargs}
    language = AutoModelForCausalLM.from_pretrained(base_id, dtype=dtype, **hub)
    language = PeftModel.from_pretrained(language, folder).merge_and_unload()
    backbone.load_state_dict(language.get_submodule(language.base_model_prefix).state_dict())
    logger.warning(
        f"{path} is the adapter of a language model. It is merged into {base_id} in memory, and the model gets a new "
        f"reward head{' (the value head beside the adapter is ignored)' if has_value_head(folder) else ''}."
    )
    return model, head


def how_to_merge(path: str | Path) -> str:
    """The advice for the adapter of a language model that cannot be merged in memory."""
    return (
        f"{path} is the adapter of a language model. A reward model's adapter on it would be saved without the merged "
        "base, and merging into a quantized base is not exact. Merge it first: "
        f"`AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained(folder)`, save "
        "the tokenizer there too, and pass the folder as `model`."
    )


# --------------------------------------------------------------------------------------------------------- the files
def _tensors(folder: str | Path, head: list[str]) -> dict[str, torch.Tensor]:
    """The head's tensors in the folder's adapter or full model, by their names in a plain checkpoint."""
    found = {}
    files = Path(folder, "adapter_model.safetensors")
    for file in [files] if files.is_file() else sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                plain = key.removeprefix("base_model.model.").removeprefix("module.")
                if any(plain.startswith(f"{name}.") for name in head):
                    found[plain] = tensors.get_tensor(key)
    return found


def _head_of(sidecar: Sidecar) -> dict[str, Any]:
    """The arguments of `build_reward_model` that describe the head."""
    return {"head": sidecar.head_class, "num_labels": sidecar.num_labels}


def _head_without_sidecar(folder: str, is_adapter: bool) -> dict[str, Any]:
    """The same for a model without a sidecar: a token classifier is found by its config; all others are scalar."""
    if is_adapter:
        adapter = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        is_token = adapter.get("task_type") == "TOKEN_CLS"
        weights = [tensor for key, tensor in _tensors(folder, ["score", "classifier"]).items() if tensor.dim() == 2]
        num_labels = len(weights[-1]) if weights else 1
    else:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        is_token = any("TokenClassification" in name for name in config.get("architectures") or [])
        num_labels = len(config.get("id2label") or range(2))  # a config with two labels does not list them
    return {"head": "token", "num_labels": num_labels} if is_token else {"head": "sequence", "num_labels": 1}


def _base_without_sidecar(folder: str, is_adapter: bool, base_model: str | Path | None) -> BaseModel:
    if not is_adapter:
        return BaseModel(id=folder, dtype="auto")
    adapter = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    base_id = base_model or adapter.get("base_model_name_or_path")
    if not base_id:
        raise BaseMismatchError(f"{folder}/adapter_config.json names no base model. Pass `base_model=`.")
    return BaseModel(id=str(base_id), dtype="auto", revision=adapter.get("revision"))
