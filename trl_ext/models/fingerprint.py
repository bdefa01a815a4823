"""The identity of a model by its content: a hash of all that its outputs depend on.

Knows folders and tensors. A model that was moved is still the same model; one that was trained on is another.
"""

import hashlib
import json
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_ext.models.ensemble.ensemble_files import member_folders, read_ensemble
from trl_ext.models.loading import local_folder
from trl_ext.models.sidecar import read_sidecar


# Other files of a model's folder (reports, trainer state) may change.
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "reward_model.json", "*.py")
MODEL_FILES += ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
MODEL_FILES += ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
MODEL_FILES += ("*.jinja", "additional_chat_templates/*.jinja")


def model_identity(model: str | Path | nn.Module, revision: str | None = None) -> str:
    """
    What a model's outputs depend on, the same for two models that give the same: what stored results are kept under.

    Args:
        model (`str`, `Path` or `nn.Module`):
            Folder (its content counts, wherever it lies), Hub id (its name and the commit) or model in memory (its
            tensors; it is not taken for the folder that it came from).
        revision (`str`, *optional*): of a Hub id.
    """
    if isinstance(model, nn.Module):
        return fingerprint_in_memory(model)
    if Path(model).is_dir():
        return fingerprint(Path(model))
    return f"{model}@{Path(local_folder(model, revision, ['*config.json'])).name}"


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and the chat template of a tokenizer in memory."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def path_identity(path: str | Path) -> str:
    """Of a file or folder its content; anything else is a name and stays one."""
    if Path(path).is_file():
        return _hash_of_file(Path(path))
    return fingerprint(Path(path)) if Path(path).is_dir() else str(path)


def fingerprint(folder: Path) -> str:
    """
    Hash of a folder's weights, configs, tokenizer, chat templates, own code and normaliser; of an adapter also those
    of its base, if that is a folder; of an ensemble also those of its members.
    """
    digest = hashlib.sha256()
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder).as_posix()} {_hash_of_file(file)}\n".encode())
    for base in _local_bases(folder):
        digest.update(f"base {fingerprint(base)}\n".encode())
    ensemble = read_ensemble(folder)
    if ensemble is not None:
        digest.update(repr(ensemble).encode())
        for member in member_folders(folder, ensemble):
            digest.update(fingerprint(member).encode())
    return digest.hexdigest()


def fingerprint_in_memory(model: nn.Module) -> str:
    """Hash of the tensors of a model in memory, and of how LoRA is applied. Not that of the folder it came from."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            digest.update(f"{name} {module.disable_adapters} {module.active_adapters} {module.scaling}\n".encode())
    return digest.hexdigest()


def _local_bases(folder: Path) -> list[Path]:
    """The folders that an adapter is loaded on: that which PEFT's file names, and that which the sidecar names."""
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
