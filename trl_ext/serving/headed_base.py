"""A base with the heads of token-level adapters in it, which is how vLLM can serve them.

vLLM takes the head of an adapter for whole texts only. A base whose own head is that of all adapters, one below the
other, gives the outputs of all heads at each token, and `RewardScorer` finds by the probes which are its model's.
This module reads and writes files. It runs no model.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trl_ext.models.loading import local_folder
from trl_ext.serving.server_pool import ServerError


_HEADS = ("score", "classifier")
# What a base has beside weights and config.
_OTHER_FILES = ("*.jinja", "*.txt", "*.model", "*.tiktoken", "*token*.json", "vocab*.json", "*.py")


def write_headed_base(
    base: str, adapters: Sequence[Path], architecture: str, output: Path, revision: str | None = None
) -> list[Path]:
    """
    Write `output / "base"` with all heads, and the adapters without theirs into `output / "adapters"`.

    Args:
        base (`str`): folder or Hub id of the base of all adapters.
        adapters (sequence of `Path`): folders of token-level adapters; several may have the same name.
        architecture (`str`): the class of transformers for the base with a head, e.g.
            `"LlamaForSequenceClassification"`.
        output (`Path`): a folder, which may have these files already.
        revision (`str`, *optional*): of a base on the Hub.

    Returns:
        `list[Path]`: the folders of the adapters, in order, to be passed to the server.

    Raises:
        [`ServerError`]: an adapter has no head of one matrix, or resized embeddings.
    """
    source, target = Path(local_folder(base, revision)), output / "base"
    target.mkdir(parents=True, exist_ok=True)
    heads, places = [], []
    for number, adapter in enumerate(adapters):
        weights = load_file(adapter / "adapter_model.safetensors")
        heads.append(_head_of(weights, adapter))
        place = output / "adapters" / f"{number}-{adapter.name}"
        place.mkdir(parents=True, exist_ok=True)
        without = {name: value for name, value in weights.items() if "lora_" in name}
        save_file(without, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config = _read(adapter / "adapter_config.json")
        # with a task type, PEFT would look for a head
        config |= {"modules_to_save": None, "task_type": None, "base_model_name_or_path": str(target.resolve())}
        _write(place / "adapter_config.json", config)
        places.append(place)
    stacked = torch.cat(heads)  # (all labels, hidden)
    _copy_weights(source, target, stacked)
    labels = {str(place): f"LABEL_{place}" for place in range(len(stacked))}
    config = _read(source / "config.json")
    config |= {"architectures": [architecture], "problem_type": "regression", "num_labels": len(stacked)}
    config |= {"id2label": labels, "label2id": {name: int(place) for place, name in labels.items()}}
    _write(target / "config.json", config)
    for pattern in _OTHER_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copy2(file, target / file.name)
    return places


def _head_of(weights: dict[str, torch.Tensor], adapter: Path) -> torch.Tensor:
    """The weight of an adapter's head, (labels, hidden)."""
    others = [name for name in weights if "lora_" not in name]
    if len(others) != 1 or not any(f".{head}." in f".{others[0]}" for head in _HEADS):
        raise ServerError(
            f"{adapter} has {', '.join(others) or 'no tensor'} beside its LoRA weights; needed: one matrix that "
            "is its head. Merge it with `trl-ext merge` and serve the merged folder."
        )
    return weights[others[0]].float()


def _copy_weights(source: Path, target: Path, head: torch.Tensor) -> None:
    """The base's weights without the head of a language model, file by file, and the stacked head in the first."""
    written: dict[str, str] = {}
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ServerError(f"The base at {source} has no safetensors. Save it again with transformers.")
    for number, file in enumerate(files):
        with safe_open(file, "pt") as content:
            # any name of a head goes: that of a language model, or one that was there before
            kept = {
                name: content.get_tensor(name)
                for name in content.keys()  # noqa: SIM118 - it is no dict
                if not name.startswith(("lm_head.", *(f"{head}." for head in _HEADS)))
            }
        if number == 0:
            kept["score.weight"] = head
        save_file(kept, target / file.name, metadata={"format": "pt"})
        written |= dict.fromkeys(kept, file.name)
    if len(files) > 1:
        _write(target / "model.safetensors.index.json", {"metadata": {}, "weight_map": written})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
