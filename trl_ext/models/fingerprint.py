"""The identity of a model by its content: a hash of all that its outputs depend on.

Knows folders and tensors. A model that was moved is still the same model; one that was trained on is another.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from .ensemble_files import member_folders, read_ensemble


# Other files of a model's folder (reports, trainer state) may change.
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "reward_model.json", "*.safetensors")
MODEL_FILES += ("*token*.json", "vocab*", "merges.txt", "*.model", "*.jinja")


def fingerprint(folder: Path) -> str:
    """Hash of a folder's weights, configs, tokenizer, normaliser; of an ensemble also those of its members."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)}):
        with open(file, "rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    ensemble = read_ensemble(folder)
    if ensemble is not None:
        digest.update(repr(ensemble).encode())
        for member in member_folders(folder, ensemble):
            digest.update(fingerprint(member).encode())
    return digest.hexdigest()


def fingerprint_in_memory(model: nn.Module) -> str:
    """Hash of the tensors of a model in memory. It is not that of the folder it came from."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
