"""Saving and loading a reward model so that its scores survive.

Knows folders, safetensors, PEFT adapters and the sidecar. Knows nothing of text, datasets or training.
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
from transformers import BitsAndBytesConfig

from trl_ext.models.building import as_dtype, build_reward_model
from trl_ext.models.heads import HeadError, head_modules, head_parameters, make_head_exact, unwrap
from trl_ext.models.sidecar import (
    KINDS,
    SIDECAR_NAME,
    BaseModel,
    Sidecar,
    SidecarError,
    probe_drift,
    read_sidecar,
    set_sidecar,
    vocab_size,
)


logger = logging.getLogger(__name__)

# What is downloaded of a Hub repository.
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt", "*.py")

# Probe scores may move by this share of their standard deviation (kernels, device); another base moves 0.12 to 0.54.
MAX_PROBE_DRIFT = 0.1


class BaseMismatchError(ValueError):
    """The model is being loaded on something else than what it was trained on."""


def describe_base(model: nn.Module) -> BaseModel:
    """Id, revision, dtype and quantization of the backbone of a model in memory."""
    base = unwrap(model)
    quantization = base.config.__dict__.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    floating = (p.dtype for p in base.get_submodule(base.base_model_prefix).parameters() if p.is_floating_point())
    source = base.config._name_or_path
    return BaseModel(
        id=str(Path(source).resolve()) if source and Path(source).is_dir() else source,
        revision=base.config.__dict__.get("_commit_hash"),
        dtype=str(next(floating)).removeprefix("torch."),
        quantization=None if quantization is None else _plain(quantization),
        vocab_size=vocab_size(base),
    )


def save_sidecar(model: nn.Module, sidecar: Sidecar, folder: str | Path) -> None:
    """Write the sidecar beside a model that was just saved, after checking that the whole head is in its files."""
    check_saved_head(model, sidecar.head_modules, folder)
    sidecar.save(folder)
    set_sidecar(model, sidecar)


def check_saved_head(model: nn.Module, head: list[str], folder: str | Path) -> None:
    """Raise [`HeadError`], naming the key, unless every head tensor in memory is in the folder's files bit for bit."""
    saved = _tensors(folder, head)
    for key, parameter in head_parameters(model, head).items():
        if parameter.numel() == 0 or isinstance(parameter, DTensor):  # sharded by ZeRO-3 or FSDP: no copy to compare
            if key not in saved or saved[key].numel() == 0:
                raise HeadError(f"{folder}: the head tensor `{key}` was not saved or is empty.")
            if parameter.numel() and saved[key].shape != parameter.shape:
                raise HeadError(f"{folder}: the head tensor `{key}` was saved as a part, {tuple(saved[key].shape)}.")
        elif key not in saved or saved[key].numel() == 0:
            raise HeadError(
                f"{folder}: the head tensor `{key}` was not saved or is empty; saved head tensors: {sorted(saved)}. "
                "The checkpoint could not be loaded again; please check free disk space and report this."
            )
        elif not torch.equal(saved[key].to(parameter.dtype), parameter.detach().cpu()):
            raise HeadError(f"{folder}: the saved head tensor `{key}` differs from the one in memory.")


def load_reward_model(
    path: str | Path,
    *,
    allow_base_mismatch: bool = False,
    is_trainable: bool = False,
    revision: str | None = None,
    **load_kwargs: Any,
) -> nn.Module:
    """
    Load a reward model from nothing but its path: a full checkpoint or an adapter, with or without our sidecar.

    An adapter is put on the base it was trained on: same id, revision, quantization and dtype, as the sidecar records.
    The scores of a few probes are compared with those at save time and the change is logged.

    Args:
        path (`str` or `Path`):
            Folder or Hub id.
        allow_base_mismatch (`bool`, *optional*, defaults to `False`):
            Load on another base, quantization or dtype all the same, and log by how much the scores moved.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether an adapter and its head can be trained further.
        revision (`str`, *optional*):
            Revision of the Hub repository at `path`.
        **load_kwargs:
            For `from_pretrained` (`device_map`, `attn_implementation`, `trust_remote_code` ...). `base_model`,
            `quantization_config` and `dtype` override what was recorded.

    Returns:
        `PreTrainedModel` or `PeftModel`, in eval mode, with an exact fp32 head and the sidecar attached.

    Raises:
        [`BaseMismatchError`]: an override differs from the record, or the probe scores moved by more than 0.1 of their
            standard deviation, and `allow_base_mismatch` is false.
        [`HeadError`]: a head tensor is missing or empty; the message names it.
        [`SidecarError`]: the sidecar is damaged, of a newer version, or describes something else than the folder
            holds.
    """
    folder = local_folder(path, revision)
    sidecar = read_sidecar(folder)
    if "torch_dtype" in load_kwargs:  # its old name
        load_kwargs.setdefault("dtype", load_kwargs.pop("torch_dtype"))
    overrides = {
        key: load_kwargs.pop(key) for key in ("base_model", "quantization_config", "dtype") if key in load_kwargs
    }
    is_adapter = Path(folder, "adapter_config.json").is_file()
    if sidecar is None and not is_adapter:
        _refuse_language_model(path, folder)
    if sidecar is not None and sidecar.is_adapter != is_adapter:
        was, now = ("an adapter", "none") if sidecar.is_adapter else ("a full model", "an adapter")
        raise SidecarError(
            f"{path}: {SIDECAR_NAME} describes {was}, but the folder holds {now}. Something else was saved over it. "
            f"Restore the folder, or delete {SIDECAR_NAME} to load what is there unchecked."
        )
    if sidecar is not None and sidecar.kind not in KINDS:
        raise SidecarError(
            f"{path} is a reward model of kind {sidecar.kind!r}; this version knows {', '.join(KINDS)}. Upgrade "
            "trl-ext."
        )
    base = sidecar.base if sidecar is not None else _base_without_sidecar(folder, is_adapter)
    differences = _differences(base, overrides) if sidecar is not None else []
    if differences and not allow_base_mismatch:
        raise BaseMismatchError(
            f"{path} was trained on another base: {'; '.join(differences)}. Its scores would change. Leave the "
            "arguments out to load what was recorded, or pass allow_base_mismatch=True to load it all the same and be "
            "told by how much."
        )

    load_kwargs["dtype"] = overrides.get("dtype", base.dtype)
    load_kwargs |= _head_without_sidecar(folder, is_adapter) if sidecar is None else _head_of(sidecar)
    if is_adapter:
        base_id = overrides.get("base_model", base.id)
        quantization = overrides.get("quantization_config", _quantization_config(base.quantization))
        if base.revision is not None and base_id == base.id and not Path(base_id).is_dir():
            load_kwargs["revision"] = base.revision
        if Path(base_id).is_absolute() and not Path(base_id).is_dir():
            raise BaseMismatchError(
                f"{path} was trained on the base in {base_id}, which is not there. Restore that folder, or pass "
                "`base_model=` with its new place and allow_base_mismatch=True, and be told by how much the scores "
                "moved."
            )
        model, head = build_reward_model(base_id, quantization_config=quantization, **load_kwargs)
        head = sidecar.head_modules if sidecar is not None else head
        make_head_exact(model, head)  # before the adapter's own copy is made from it
        if base.vocab_size not in (None, vocab_size(model)):  # tokens were added; their embeddings are in the adapter
            model.resize_token_embeddings(base.vocab_size, mean_resizing=False)
        check_head_in_files(model, head, folder)
        model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    else:
        model, _ = build_reward_model(folder, quantization_config=overrides.get("quantization_config"), **load_kwargs)
        head = sidecar.head_modules if sidecar is not None else head_modules(model)
        make_head_exact(model, head)
        saved = check_head_in_files(model, head, folder)
        for key, parameter in head_parameters(model, head).items():  # bf16 loading rounded them
            parameter.data.copy_(saved[key])
    make_head_exact(model, head)
    model.eval()
    if sidecar is None:
        logger.info(f"{path} has no reward_model.json: base and dtype are taken from its other files, unchecked.")
    else:
        set_sidecar(model, sidecar)
        check_probes(model, sidecar, path, allow_base_mismatch)
    return model


def local_folder(path: str | Path, revision: str | None, files: Sequence[str] = HUB_FILES) -> str:
    """The local folder, downloading a Hub repository's model files (or those of other names) if `path` is none."""
    if Path(path).is_dir():
        return str(path)
    if Path(path).is_absolute() or str(path).startswith("."):
        raise FileNotFoundError(f"{path} is not a folder. Needed: the folder or Hub id of a saved model.")
    try:
        return snapshot_download(str(path), revision=revision, allow_patterns=list(files))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path} is not a folder here, and could not be had from the Hub as a repository of that name: {error}"
        ) from error


def _tensors(folder: str | Path, head: list[str]) -> dict[str, torch.Tensor]:
    """The head's tensors in the folder's adapter, else in its full model, by their name in a plain checkpoint."""
    found = {}
    files = Path(folder, "adapter_model.safetensors")
    for file in [files] if files.is_file() else sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                plain = key.removeprefix("base_model.model.").removeprefix("module.")
                if any(plain.startswith(f"{name}.") for name in head):
                    found[plain] = tensors.get_tensor(key)
    return found


def _refuse_language_model(path: str | Path, folder: str) -> None:
    """Raise [`HeadError`] if the config says that this is a language model, which has no head to score with."""
    config = Path(folder, "config.json")
    names = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    for name in names or []:
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")):
            raise HeadError(
                f"{path} is a language model ({name}) without a reward head. Needed: a reward model as a trainer "
                "saved it. Train one on this model first, e.g. with `trl-ext reward --model_name_or_path`."
            )


def check_head_in_files(model: nn.Module, head: list[str], folder: str | Path) -> dict[str, torch.Tensor]:
    """The head's saved tensors. Raises [`HeadError`] unless there is one of the right shape for each in memory."""
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


def _head_of(sidecar: Sidecar) -> dict[str, Any]:
    """The arguments of `build_reward_model` that say what the head is."""
    return {"head": sidecar.head_class, "num_labels": sidecar.num_labels}


def _head_without_sidecar(folder: str, is_adapter: bool) -> dict[str, Any]:
    """The same for a model of somebody else: a token-classification model says so, all others are scalar."""
    if is_adapter:
        adapter = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        is_token = adapter.get("task_type") == "TOKEN_CLS"
        weights = [tensor for key, tensor in _tensors(folder, ["score", "classifier"]).items() if tensor.dim() == 2]
        num_labels = len(weights[-1]) if weights else 1
    else:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        is_token = any("TokenClassification" in name for name in config.get("architectures") or [])
        num_labels = len(config.get("id2label") or range(2))  # two are not written
    return {"head": "token", "num_labels": num_labels} if is_token else {"head": "sequence", "num_labels": 1}


def _base_without_sidecar(folder: str, is_adapter: bool) -> BaseModel:
    if not is_adapter:
        return BaseModel(id=folder, dtype="auto")
    adapter = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    base_id = adapter.get("base_model_name_or_path")
    if not base_id:
        raise BaseMismatchError(f"{folder}/adapter_config.json names no base model. Pass `base_model=`.")
    return BaseModel(id=base_id, dtype="auto", revision=adapter.get("revision"))


def _differences(base: BaseModel, overrides: dict[str, Any]) -> list[str]:
    """What the overrides would change, in words."""
    found = []
    if not _same_source(overrides.get("base_model", base.id), base.id):
        found.append(f"base model {base.id!r}, asked for {overrides['base_model']!r}")
    if "dtype" in overrides and as_dtype(overrides["dtype"]) not in ("auto", as_dtype(base.dtype)):
        found.append(f"dtype {base.dtype}, asked for {overrides['dtype']}")
    if "quantization_config" in overrides:
        asked = overrides["quantization_config"]
        was, asked = _essence(base.quantization), _essence(None if asked is None else _plain(asked.to_dict()))
        if was != asked:
            found.append(f"quantization {was}, asked for {asked}")
    return found


def _same_source(one: str | Path, other: str) -> bool:
    return str(one) == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def _essence(quantization: dict[str, Any] | None) -> dict[str, Any] | None:
    """The fields of a bitsandbytes config that change the weights."""
    if quantization is None:
        return None
    if quantization.get("load_in_8bit"):
        return {"load_in_8bit": True}
    keys = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    return {key: quantization.get(key) for key in keys}


def _quantization_config(quantization: dict[str, Any] | None) -> BitsAndBytesConfig | None:
    if quantization is None or quantization.get("quant_method") != "bitsandbytes":
        return None  # another method is baked into the base checkpoint, which brings its own config
    return BitsAndBytesConfig.from_dict(dict(quantization))


def _plain(value: Any) -> Any:
    """JSON-ready copy: dtypes and enums as strings, sets as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def check_same_base(model: nn.Module, sidecar: Sidecar, path: str | Path) -> None:
    """Raise [`BaseMismatchError`] if a model in memory says of itself that it is not the recorded base."""
    here = describe_base(model)
    differences = _differences(
        sidecar.base,
        {
            "base_model": here.id,
            "dtype": here.dtype,
            "quantization_config": _quantization_config(here.quantization),
        },
    )
    if sidecar.base.vocab_size not in (None, here.vocab_size):
        differences.append(f"{sidecar.base.vocab_size} token embeddings, found {here.vocab_size}")
    if differences:
        raise BaseMismatchError(
            f"{path} was trained on another base than the model in memory: {'; '.join(differences)}. Its scores would "
            "change. Load that model as the reward model's base was loaded."
        )


def check_probes(model: nn.Module, sidecar: Sidecar, path: str | Path, allow_base_mismatch: bool) -> None:
    """
    Log by how much the scores of the probes moved since the model was saved.

    Raises [`BaseMismatchError`] if that is more than rounding, unless `allow_base_mismatch`.
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
    if drift["relative"] <= MAX_PROBE_DRIFT or drift["max"] <= (1e-4 if exact else 2e-2) * size:
        logger.info(f"{report}.")
    elif allow_base_mismatch:
        logger.warning(f"{report}; loaded all the same because of allow_base_mismatch=True.")
    else:
        raise BaseMismatchError(
            f"{report}. The base at {sidecar.base.id!r} is not the one it was trained on (other weights, quantization "
            "or dtype). Restore that base, or pass allow_base_mismatch=True to use the changed scores."
        )
