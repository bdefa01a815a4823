"""`reward_model.json`: describes a saved reward model, so that a later program needs only its path.

This module knows the fields of the file, and the probes that show whether a loaded model gives the scores that it had
when it was saved. It knows nothing of how models are built, trained or tokenized.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trl_ext.models.heads import token_logits_at_last, unwrap


logger = logging.getLogger(__name__)

SIDECAR_NAME = "reward_model.json"
# The posterior of the last layer, where one was fitted. A folder of its own: servers read every *.safetensors file
# beside a model as weights.
POSTERIOR_FILE = "uncertainty/last_layer.safetensors"
SCHEMA_VERSION = 1
KINDS = ("scalar", "outcome", "process", "segment")
_ATTRIBUTE = "_trl_ext_sidecar"


class SidecarError(ValueError):
    """The sidecar is unreadable, of a newer schema, or contradicts what is being loaded."""


@dataclass
class BaseModel:
    """The base an adapter was trained on, or where a full checkpoint came from.

    Args:
        id (`str`): Hub id or folder.
        revision (`str`, *optional*): commit hash of the base on the Hub.
        dtype (`str`): dtype of the backbone in training, e.g. `"bfloat16"`.
        quantization (`dict`, *optional*): the quantization config of the backbone in training.
        vocab_size (`int`, *optional*): rows of the embeddings in training (a chat template may have added tokens).
    """

    id: str
    dtype: str
    revision: str | None = None
    quantization: dict[str, Any] | None = None
    vocab_size: int | None = None


@dataclass
class Sidecar:
    """
    Description of a saved reward model.

    Args:
        base ([`BaseModel`]): what it was trained on.
        is_adapter (`bool`): whether the folder holds an adapter (else a full model).
        head_modules (`list[str]`): names of the head's modules, e.g. `["score"]`.
        token_policy (`dict`): how text becomes token ids (see `trl_ext.data.tokenization.TokenizationSettings`).
        kind (`str`): kind of reward model: `"scalar"` (one score per candidate), or `"outcome"`, `"process"` or
            `"segment"` (token rewards).
        label_meaning (`str`): what a larger score means, or what the classes are.
        head_class (`str`): `"sequence"` or `"token"`: the class of transformers that holds the head.
        num_labels (`int`): total number of outputs of the head: G categories of C outputs each.
        outputs_per_category (`int`): C. With 3, class index = label + 1.
        categories (`list[str]`, *optional*): names of the G categories, in the order of the outputs; `None` for one
            category without a name.
        loss_type (`str`, *optional*): the loss. For a token-level model it tells what an output means: log-odds of
            *right* (`"bce"`, sigmoid gives the probability), class logits (`"ce"`, softmax), a number on the labels'
            scale (`"mse"`), or a score whose sign decides (`"hinge"`).
        label_placement (`str`, *optional*): the token whose output is a span's score: the `"last"` of the span,
            `"all"` of them, or the one `"before"` it (see `trl_ext.data.spans`).
        step_separator (`str`, *optional*): text after each step, part of the step's span.
        max_length (`int`, *optional*): longest candidate in training, in tokens.
        pad_is_eos (`bool`): whether the pad token is EOS. Plain transformers then ignores a final EOS, so its scores
            differ from ours.
        normalizer (`dict`, *optional*): `{"mean": float, "std": float}` of the scores on a calibration set.
        calibration (`dict`, *optional*): from scores to probabilities, see `trl_ext.scoring.calibration`.
        probes (`dict`, *optional*): `{"input_ids": [[int]], "scores": [float]}`, the scores at save time.
        schema_version (`int`): version of this file.
    """

    base: BaseModel
    is_adapter: bool
    head_modules: list[str]
    token_policy: dict[str, Any]
    kind: str = "scalar"
    label_meaning: str = "higher is better"
    head_class: Literal["sequence", "token"] = "sequence"
    num_labels: int = 1
    outputs_per_category: int = 1
    categories: list[str] | None = None
    loss_type: str | None = None
    label_placement: str | None = None
    step_separator: str | None = None
    max_length: int | None = None
    pad_is_eos: bool = False
    normalizer: dict[str, float] | None = None
    calibration: dict[str, Any] | None = None
    probes: dict[str, list] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: str | Path) -> None:
        """Write `reward_model.json` into the folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        Path(folder, SIDECAR_NAME).write_text(text + "\n", encoding="utf-8")


def read_sidecar(folder: str | Path) -> Sidecar | None:
    """
    Read `reward_model.json` from a local folder; `None` where there is none.

    Unknown keys (of a newer minor version) are ignored with a warning. Raises [`SidecarError`] if the file is not
    JSON, lacks a field or has a newer schema version.
    """
    path = Path(folder, SIDECAR_NAME)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SidecarError(
            f"{path} is not valid JSON ({error}). Restore it from a checkpoint of the same run."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("base", {}), dict):
        raise SidecarError(
            f"{path} does not hold a description of a reward model. Restore it from a checkpoint of the same run."
        )
    version = content.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise SidecarError(
            f"{path} has schema version {version!r}; this trl_ext reads up to {SCHEMA_VERSION}. Upgrade trl-ext."
        )
    content = known_fields(Sidecar, content, path)
    try:
        content["base"] = BaseModel(**known_fields(BaseModel, content["base"], path))
        return Sidecar(**content)
    except (KeyError, TypeError) as error:
        raise SidecarError(f"{path} lacks a field: {error}. Restore it from a checkpoint of the same run.") from error


def get_sidecar(model: nn.Module) -> Sidecar | None:
    """The sidecar of an in-memory model that was trained or loaded by trl_ext, else `None`."""
    return getattr(unwrap(model), _ATTRIBUTE, None)  # only a model of ours has it


def set_sidecar(model: nn.Module, sidecar: Sidecar) -> None:
    """Attach the sidecar to the in-memory model."""
    setattr(unwrap(model), _ATTRIBUTE, sidecar)


def vocab_size(model: nn.Module) -> int:
    """Number of token ids the backbone knows."""
    return unwrap(model).config.get_text_config().vocab_size


def make_probes(model: nn.Module | int, number: int = 8, seed: int = 0) -> list[list[int]]:
    """
    Short sequences of random token ids, 4 to 32 long: no text of the user's data ends up in the file.

    Encoder-decoders (T5, BART) read the score at EOS, so their sequences end in EOS and hold no other.

    Args:
        model (`nn.Module` or `int`): the model, or its number of token ids.
        number (`int`, *optional*, defaults to `8`): how many sequences.
        seed (`int`, *optional*, defaults to `0`): seed of the random ids.
    """
    size = model if isinstance(model, int) else vocab_size(model)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 33, (number,), generator=generator).tolist()
    probes = [torch.randint(0, size, (n,), generator=generator).tolist() for n in lengths]
    config = None if isinstance(model, int) else unwrap(model).config
    if config is None or not config.is_encoder_decoder or config.eos_token_id is None:
        return probes
    eos = config.eos_token_id
    return [[*((token + 1) % size if token == eos else token for token in ids[:-1]), eos] for ids in probes]


@torch.no_grad()
def probe_scores(model: nn.Module, probes: list[list[int]]) -> list[float]:
    """
    Scores of the probes in eval mode, one sequence at a time, outside autocast. The model's mode is restored.

    A head of C outputs gives C numbers for each probe, one after the other: the outputs at its last token. A stacked
    model gives those of each member, member by member.

    A trainer replaces the `forward` of the instance by one with autocast; the `forward` of the class has none.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    device = next(model.parameters()).device
    scores = []
    try:
        for ids in probes:
            input_ids = torch.tensor([ids], device=device)
            logits = token_logits_at_last(model, input_ids, torch.ones_like(input_ids), call=_plain_call(model))
            scores.extend(logits.flatten().tolist())
    finally:
        for module in training:
            module.training = True
    return scores


def probe_drift(model: nn.Module, sidecar: Sidecar) -> dict[str, float] | None:
    """
    How far the probe scores of a loaded model are from those at save time.

    Returns:
        `dict` with `max` and `mean` (absolute change) and `relative` (max change over the probes' standard deviation),
        or `None` if the sidecar holds no probes.
    """
    if sidecar.probes is None:
        return None
    saved = torch.tensor(sidecar.probes["scores"], dtype=torch.float64)
    now = torch.tensor(probe_scores(model, sidecar.probes["input_ids"]), dtype=torch.float64)
    change = (now - saved).abs()
    return {
        "max": change.max().item(),
        "mean": change.mean().item(),
        "relative": (change.max() / saved.std().clamp_min(1e-6)).item(),
    }


def _plain_call(model: nn.Module) -> Callable:
    return lambda **inputs: type(model).forward(model, **inputs)


def known_fields(cls: type, content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The entries of a JSON object that are fields of a dataclass; others are ignored with a warning."""
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(content) - names)
    if unknown:
        logger.warning(f"{path}: ignored unknown keys {unknown} (written by a newer trl_ext?).")
    return {key: value for key, value in content.items() if key in names}
