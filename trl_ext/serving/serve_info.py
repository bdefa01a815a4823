"""Which command of vLLM serves a reward model so that it gives the model's scores: `trl-ext serve-info`.

Adapters of one base and the members of an ensemble share a server. Other models get one each. This module reads
folders and writes what a server needs beside them (a score template; a base with heads for token-level adapters). It
starts nothing.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models.ensemble.ensemble_files import member_folders, read_ensemble
from trl_ext.models.loading import local_folder
from trl_ext.models.sidecar import Sidecar, read_sidecar
from trl_ext.serving.headed_base import write_headed_base
from trl_ext.serving.score_template import chat_template, text_template
from trl_ext.serving.server_pool import ServerError


# The values that vLLM takes for --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Settings of a LoRA adapter with which vLLM does not give its outputs, and the value that they must have.
PLAIN = {"use_dora": False, "bias": "none", "layer_replication": None, "trainable_token_indices": None}

MERGE = "Merge it with `trl-ext merge` and serve the merged folder."


@dataclass
class ServerCommand:
    """
    How to start one server.

    Args:
        arguments (`list[str]`): those of `vllm serve`.
        models (`dict[str, str]`): the name on the server of each folder.
        notes (`list[str]`): what else there is to know, a sentence each.
    """

    arguments: list[str]
    models: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The command for a shell, an option a line, and how to use it."""
        lines, options = ["vllm serve " + shlex.quote(self.arguments[0])], self.arguments[1:]
        for argument in options:
            if argument.startswith("--"):
                lines.append(f"    {argument}")
            else:
                lines[-1] += f" {shlex.quote(argument)}"
        return " \\\n".join(lines)


class _Model(NamedTuple):
    """A folder to be served, its name on the server, and what it is."""

    folder: Path
    name: str
    sidecar: Sidecar | None
    adapter: dict[str, Any] | None

    @property
    def by_token(self) -> bool:
        return self.sidecar is not None and self.sidecar.kind != "scalar"

    @property
    def base(self) -> str:
        return self.adapter["base_model_name_or_path"] if self.sidecar is None else self.sidecar.base.id


def server_commands(folders: Sequence[str | Path], output_dir: str | Path, port: int = 8000) -> list[ServerCommand]:
    """
    The commands that serve reward models.

    Args:
        folders (sequence of `str` or `Path`): folders or Hub ids of reward models (full or adapters) and ensembles.
        output_dir (`str` or `Path`): where score templates and bases with heads are written.
        port (`int`, *optional*, defaults to `8000`): of the first server; the others get the next ones.

    Returns:
        `list[ServerCommand]`: one for each server.

    Raises:
        `FileNotFoundError`: there is no such folder.
        [`ServerError`]: vLLM cannot serve a model as it is; says what to do.
    """
    models = _find(folders)
    groups: dict[tuple, list[_Model]] = {}
    for model in models:
        _check(model)
        shared = (model.base, model.sidecar and model.sidecar.base.dtype) if model.adapter else (str(model.folder),)
        groups.setdefault((*shared, model.by_token), []).append(model)
    commands = []
    for number, group in enumerate(groups.values()):
        place = Path(output_dir) if len(groups) == 1 else Path(output_dir, f"server-{number}")
        commands.append(_command(group, place, port + number))
    return commands


def _find(folders: Sequence[str | Path]) -> list[_Model]:
    """The models in all folders, ensembles taken apart; each has a name of its own."""
    places: list[Path] = []
    for given in folders:
        folder = Path(local_folder(given, None))
        ensemble = read_ensemble(folder)
        places += [folder] if ensemble is None else member_folders(folder, ensemble)
    seen: dict[Path, Path] = {}
    for place in places:  # a member of an ensemble may also be given alone
        seen.setdefault(place.resolve(), place)
    places = list(seen.values())
    names = [place.name for place in places]
    return [
        _Model(
            place,
            place.name if names.count(place.name) == 1 else str(place.resolve()),
            read_sidecar(place),
            _read(place / "adapter_config.json") if (place / "adapter_config.json").is_file() else None,
        )
        for place in places
    ]


def _check(model: _Model) -> None:
    """Raise [`ServerError`] for a model that vLLM cannot serve as it is."""
    folder, adapter, sidecar = model.folder, model.adapter, model.sidecar
    if adapter is None:
        if not (folder / "config.json").is_file():
            raise ServerError(f"{folder} holds no model: neither config.json nor adapter_config.json is there.")
        return
    if sidecar is not None and sidecar.base.quantization is not None:
        raise ServerError(
            f"{folder} was trained on a quantized base, which vLLM would round otherwise. {MERGE} It holds the "
            "dequantized base, so that its scores are those of the adapter."
        )
    if adapter.get("peft_type") != "LORA":
        raise ServerError(f"{folder} is an adapter of type {adapter.get('peft_type')}; vLLM serves LoRA. {MERGE}")
    other = {
        name: adapter[name] for name, value in PLAIN.items() if adapter.get(name, value) not in (value, [], False)
    }
    if other:
        raise ServerError(f"{folder} has {other} in its adapter_config.json, which vLLM does not know. {MERGE}")
    if sidecar is not None and sidecar.head_modules != ["score"]:
        raise ServerError(f"{folder} has the head {sidecar.head_modules}; vLLM serves adapters with `score`. {MERGE}")
    base = _config(model.base)
    if sidecar is not None and sidecar.base.vocab_size not in (None, base.get_text_config().vocab_size):
        raise ServerError(
            f"{folder} has {sidecar.base.vocab_size} token embeddings and its base "
            f"{base.get_text_config().vocab_size}. {MERGE}"
        )


def _command(group: list[_Model], place: Path, port: int) -> ServerCommand:
    """The command for one server, after what it reads was written."""
    first, notes = group[0], []
    arguments = ["--runner", "pooling", "--convert", "classify"]
    dtype = first.sidecar.base.dtype if first.sidecar is not None else None
    if dtype is not None:
        arguments += ["--dtype", dtype]
    lengths = [model.sidecar.max_length for model in group if model.sidecar is not None and model.sidecar.max_length]
    if lengths:
        arguments += ["--max-model-len", str(max(lengths))]
        notes.append(f"It refuses texts of more than {max(lengths)} tokens, the longest in training.")
    if first.by_token:
        arguments += ["--pooler-config", json.dumps({"task": "token_classify"})]
    if first.adapter is None:
        what = str(first.folder)
        arguments += ["--served-model-name", first.name]
        if _read(first.folder / "config.json").get("problem_type") != "regression":  # else /classify has a sigmoid
            arguments += ["--hf-overrides", json.dumps({"problem_type": "regression"})]
    else:
        what, served = first.base, [str(model.folder.resolve()) for model in group]
        revision = None if first.sidecar is None or Path(what).is_dir() else first.sidecar.base.revision
        if first.by_token:
            architecture = _class_with_head(first.base)
            folders = [model.folder for model in group]
            served = list(map(str, write_headed_base(first.base, folders, architecture, place, revision)))
            what = str(place / "base")
        else:
            arguments += [] if revision is None else ["--revision", revision]
            arguments += ["--hf-overrides", json.dumps({"num_labels": 1, "problem_type": "regression"})]
        ranks = [max([m.adapter["r"], *(m.adapter.get("rank_pattern") or {}).values()]) for m in group]
        rank = next((known for known in RANKS if known >= max(ranks)), None)
        if rank is None:
            raise ServerError(f"{first.folder} has rank {max(ranks)}; vLLM serves up to {RANKS[-1]}. {MERGE}")
        arguments += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(group))]
        arguments += ["--lora-modules", *(f"{m.name}={at}" for m, at in zip(group, served, strict=True))]
    if not first.by_token:
        template = _write_templates(group, place)
        if template is not None:
            arguments += ["--chat-template", str(template)]
            notes.append(
                "The template makes /score see a prompt with its completion as training did; RewardScorer needs none. "
                'Send "use_activation": false with it.'
            )
    if port != 8000:
        arguments += ["--port", str(port)]
    return ServerCommand([what, *arguments], {str(model.folder): model.name for model in group}, notes)


def _write_templates(group: list[_Model], place: Path) -> Path | None:
    """The template for texts, which all models of a server share, else `None`; that for chats lies beside it."""
    if any(model.sidecar is None for model in group):
        return None
    texts = set()
    for model in group:
        tokenizer = AutoTokenizer.from_pretrained(model.folder)
        settings = TokenizationSettings.from_dict(model.sidecar.token_policy)
        texts.add((text_template(tokenizer, settings), chat_template(tokenizer)))
    if len(texts) > 1:
        return None
    text, chat = texts.pop()
    place.mkdir(parents=True, exist_ok=True)
    (place / "score_template.jinja").write_text(text, encoding="utf-8")
    if chat is not None:
        (place / "score_template_chat.jinja").write_text(chat, encoding="utf-8")
    return place / "score_template.jinja"


def _class_with_head(base: str) -> str:
    """The class of transformers that puts a `score` head on a base."""
    names = _config(base).architectures or []
    stems = [name.split("For")[0].removesuffix("LMHeadModel") for name in names]
    if not stems:
        raise ServerError(f"The config of {base} names no architecture. {MERGE}")
    return f"{stems[0]}ForSequenceClassification"


def _config(base: str) -> Any:
    return AutoConfig.from_pretrained(base)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
