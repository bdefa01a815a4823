"""Cache keys of models: a hash of everything that a model's outputs depend on.

It knows folders and tensors. A model keeps its key when it moves, and gets a new one when it is trained further.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_ext.models.ensemble.ensemble_files import member_folders, read_ensemble
from trl_ext.models.loading import local_folder
from trl_ext.models.sidecar import read_sidecar


TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
TOKENIZER_FILES += ("*.jinja", "additional_chat_templates/*.jinja")
# Other files of a model's folder (reports, trainer state) may change.
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "reward_model.json", "*.py")
MODEL_FILES += ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", *TOKENIZER_FILES)

# Values of a config that change no output, and `dtype`, which the tensors have. Names with an underscore are places
# and settings of the process.
_WITHOUT_EFFECT = ("transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id", "architectures")


def model_identity(model: str | Path | nn.Module, revision: str | None = None) -> str:
    """
    The cache key of a model: equal for two models that give the same outputs.

    Args:
        model (`str`, `Path` or `nn.Module`):
            The key of a folder covers its content and not its place, that of a Hub id its name and commit, and that
            of a model in memory its tensors, its config and its end tokens, and not the folder that it was loaded
            from. The tokenizer has a key of its own, see [`tokenizer_identity`].
        revision (`str`, *optional*): revision of a Hub id.
    """
    if isinstance(model, nn.Module):
        return fingerprint_in_memory(model)
    if Path(model).is_dir():
        return fingerprint(Path(model))
    return f"{model}@{Path(local_folder(model, revision, ['*config.json'])).name}"


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Hash of what decides the token ids that a tokenizer in memory makes, and where a text ends.

    It covers the vocabulary, the chat template, the special tokens, and how texts are cut into tokens and framed by
    special ones. The pad token does not count, because padding is masked and trainers set it, and neither does how the
    last call padded or truncated.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, special]
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none
    if backend is not None:
        content.append(json.loads(backend.to_str()) | {"padding": None, "truncation": None})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def path_identity(path: str | Path) -> str:
    """The cache key of a file or of a model's folder: a hash of its content. Any other name is returned as it is."""
    if Path(path).is_file():
        return _hash_of_file(Path(path))
    return fingerprint(Path(path)) if Path(path).is_dir() else str(path)


def fingerprint(folder: Path, base_model: str | Path | None = None) -> str:
    """
    The cache key of a local model covers its weights, configs, tokenizer, chat templates, custom code and normaliser.

    The key of an adapter covers its base too, if that is a folder, and the key of an ensemble its members.

    Args:
        folder (`Path`): the model's.
        base_model (`str` or `Path`, *optional*): where the base of an adapter is now, if it moved.
    """
    digest = hashlib.sha256()
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder).as_posix()} {_hash_of_file(file)}\n".encode())
    moved = [Path(base_model)] if base_model is not None and Path(base_model).is_dir() else []
    for base in moved or _local_bases(folder):
        digest.update(f"base {fingerprint(base)}\n".encode())
    ensemble = read_ensemble(folder)
    if ensemble is not None:
        digest.update(repr(ensemble).encode())
        for member in member_folders(folder, ensemble):
            digest.update(fingerprint(member, base_model).encode())
    return digest.hexdigest()


def add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Let a hash of `hashlib` cover a named tensor: its dtype, shape and content."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def fingerprint_in_memory(model: nn.Module) -> str:
    """
    The cache key of a model in memory: a hash of its tensors, LoRA state, config and end tokens. It differs from its
    folder's key.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    config = getattr(model, "config", None)  # a plain module has none
    if hasattr(config, "to_dict"):
        digest.update(json.dumps(_that_count(config.to_dict()), sort_keys=True, default=str).encode())
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # a reward model has none
    digest.update(f"{ends}\n".encode())
    # PEFT keeps the base's head beside the trained one. It is not used, and random in every process.
    unused = tuple(
        f"{name}.original_module."
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters and not module.disable_adapters
    )
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor) and not name.startswith(unused):
            add_tensor(digest, name, tensor)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            digest.update(f"{name} {module.disable_adapters} {module.active_adapters} {module.scaling}\n".encode())
    return digest.hexdigest()


def _that_count(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a config, and of the configs in it, that change outputs."""
    return {
        name: _that_count(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _WITHOUT_EFFECT and not str(name).startswith("_")
    }


def _local_bases(folder: Path) -> list[Path]:
    """The local bases that an adapter's PEFT config and sidecar name."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return []
    sidecar = read_sidecar(folder)
    named = {json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")}
    named |= set() if sidecar is None else {sidecar.base.id}
    return sorted({Path(name).resolve() for name in named if name and Path(name).is_dir()})


def _hash_of_file(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
