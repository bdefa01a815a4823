"""Averages reward models that were fine-tuned from one base into a single model: weights, heads and LoRA deltas.

It knows the files of checkpoints: safetensors, PEFT's adapter config, and the sidecar. It loads no member.
"""

import dataclasses
import gc
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from trl_ext.metrics.ranking import spearman
from trl_ext.models.bases import same_source
from trl_ext.models.fingerprint import MODEL_FILES, tokenizer_identity
from trl_ext.models.loading import load_reward_model, local_folder, save_sidecar
from trl_ext.models.merging import REPORT_NAME, check_empty, new_folder
from trl_ext.models.sidecar import SIDECAR_NAME, Sidecar, get_sidecar, make_probes, probe_scores, read_sidecar


logger = logging.getLogger(__name__)

ADAPTER = "adapter_model.safetensors"
# What must be the same in all members, because an average would mean nothing otherwise.
SAME = ("is_adapter", "kind", "head_modules", "head_class", "num_labels", "outputs_per_category", "categories")
SAME += ("token_policy", "label_placement", "step_separator", "pad_is_eos")
LORA_A, LORA_B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")


class AveragingError(ValueError):
    """The members cannot be averaged. The message says what differs."""


def merge_reward_models(
    paths: Sequence[str | Path],
    output_dir: str | Path,
    weights: Sequence[float] | None = None,
    **load_kwargs: Any,
) -> dict[str, Any]:
    r"""
    Average reward models into one: the weighted mean of their weights, at the price of a single model.

    See *WARM: On the Benefits of Weight Averaged Reward Models* by A. Rame et al.
    (https://huggingface.co/papers/2401.12187). Members must be fine-tuned from the same base, and best from the same
    head too (the same `seed` of the trainer, with other data or learning rates): weights of models that started apart
    do not average well, which the report's `agreement` shows.

    Of LoRA adapters the *deltas* are averaged, exactly: \\( \sum_m w_m s_m B_m A_m \\) is one adapter whose A and B
    hold those of the members side by side, so its rank is the sum of theirs. Ranks, alphas and target modules may
    differ. The result is an adapter on the same base; `merge_reward_model` makes a full model of it. Of full models
    the weights are averaged, tensor by tensor. Heads are averaged in both cases. Stored normalisers and calibrations
    do not hold for the average and are left out.

    Args:
        paths (sequence of `str` or `Path`):
            Two or more folders or Hub ids of reward models that trl_ext saved, all adapters or all full models.
        output_dir (`str` or `Path`):
            An empty or new folder for the model, its tokenizer, `reward_model.json` and `merge_report.json`.
        weights (`Sequence[float]`, *optional*):
            One weight per model; they sum to 1. All equal by default.
        **load_kwargs:
            For [`load_reward_model`], which loads the result to record its probe scores.

    Returns:
        `dict`: the report: `members`, `weights`, `agreement` (Spearman correlation of the scores of probe texts with
        the weighted mean of the members' scores; `None` where the members stored none) and `rank` (of adapters).

    Raises:
        [`AveragingError`]: the models differ in base, kind, head, tokenizer or tokenization settings, are adapters of
            a kind that cannot be averaged exactly (DoRA, or other than LoRA), or the weights do not fit.
        `ValueError`: `output_dir` is not empty.
    """
    output = Path(output_dir)
    check_empty(output)
    shares = _shares(weights, len(paths))
    folders = [Path(local_folder(path, load_kwargs.get("revision"))) for path in paths]
    sidecars = [read_sidecar(folder) for folder in folders]
    _check_members(paths, folders, sidecars)
    with new_folder(output) as staging:
        report = {"members": list(map(str, paths)), "weights": shares}
        _copy_files(folders[0], staging)
        if sidecars[0].is_adapter:
            report["rank"] = _average_adapters(folders, shares, staging)
        else:
            _average_weights(folders, shares, staging)
        report["agreement"] = _finish(staging, sidecars, shares, load_kwargs)
        Path(staging, REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _shares(weights: Sequence[float] | None, members: int) -> list[float]:
    """The weight of each member."""
    if members < 2:
        raise AveragingError(f"Found {members} model(s); needed: two or more to average.")
    shares = [1 / members] * members if weights is None else [float(weight) for weight in weights]
    if len(shares) != members or not all(map(math.isfinite, shares)) or abs(sum(shares) - 1) > 1e-6:
        raise AveragingError(f"weights={shares}; needed: {members} finite numbers that sum to 1, one for each model.")
    return shares


def _check_members(paths: Sequence[Any], folders: Sequence[Path], sidecars: Sequence[Sidecar | None]) -> None:
    """Raise [`AveragingError`] unless all members can be averaged."""
    for path, sidecar in zip(paths, sidecars, strict=True):
        if sidecar is None:
            raise AveragingError(
                f"{path} has no {SIDECAR_NAME}, so its base and head are unknown. Train it with trl_ext."
            )
    names = (*SAME, "loss_type") if sidecars[0].kind != "scalar" else SAME  # losses of tokens say what an output means
    for path, sidecar in zip(paths[1:], sidecars[1:], strict=True):
        for name in names:
            _must_equal(name, getattr(sidecars[0], name), getattr(sidecar, name), paths[0], path)
        if not same_source(sidecar.base.id, sidecars[0].base.id):
            _must_equal("base", sidecars[0].base.id, sidecar.base.id, paths[0], path)
        for field in dataclasses.fields(sidecar.base)[1:]:  # the first is the id
            mine, theirs = getattr(sidecars[0].base, field.name), getattr(sidecar.base, field.name)
            _must_equal(f"base {field.name}", mine, theirs, paths[0], path)
    tokenizers = [tokenizer_identity(AutoTokenizer.from_pretrained(folder)) for folder in folders]
    for path, tokenizer in zip(paths[1:], tokenizers[1:], strict=True):
        if tokenizer != tokenizers[0]:
            raise AveragingError(
                f"The tokenizers of {paths[0]} and {path} differ in vocabulary, special tokens, splitting or chat "
                "template, so their weights saw other token ids. Needed: members that were trained with one tokenizer."
            )


def _must_equal(what: str, mine: Any, theirs: Any, one: Any, other: Any) -> None:
    if mine != theirs:
        raise AveragingError(
            f"The {what.replace('_', ' ')} of {one} is {mine!r}, and that of {other} is {theirs!r}. Needed: members "
            "that were fine-tuned from one base in one way."
        )


def _copy_files(source: Path, target: Path) -> None:
    """Copy everything that belongs to a model except its weights."""
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            if file.suffix not in (".safetensors", ".bin") and file.name != SIDECAR_NAME:
                Path(target, file.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copy(file, Path(target, file.relative_to(source)))


# ------------------------------------------------------------------------------------------------------------ adapters
def _average_adapters(folders: Sequence[Path], shares: Sequence[float], target: Path) -> int:
    """Write one adapter whose delta is the mean of the members'; returns its largest rank."""
    configs = [PeftConfig.from_pretrained(folder) for folder in folders]
    tensors = [load_file(folder / ADAPTER) for folder in folders]
    for folder, config, own in zip(folders, configs, tensors, strict=True):
        _check_lora(folder, config, own)
        for field in ("bias", "fan_in_fan_out", "trainable_token_indices"):
            theirs, mine = (getattr(one, field, None) for one in (configs[0], config))
            if theirs != mine:
                raise AveragingError(
                    f"{folder} was trained with {field}={mine!r}, and {folders[0]} with {field}={theirs!r}. Train all "
                    "members with the same value."
                )
    averaged: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for key in dict.fromkeys(key for own in tensors for key in own):
        module, name = _split(key)
        having = [number for number, own in enumerate(tensors) if key in own]
        parts = [tensors[number][key].float() for number in having]
        scales = [shares[number] * _scaling(configs[number], module, tensors[number]) for number in having]
        if name in LORA_A:
            averaged[key] = torch.cat(parts, dim=0)
            ranks[module] = len(averaged[key])
        elif name in LORA_B:
            averaged[key] = torch.cat([scale * part for scale, part in zip(scales, parts, strict=True)], dim=1)
        elif name == "lora_B.bias":
            averaged[key] = sum(scale * part for scale, part in zip(scales, parts, strict=True))
        elif len(having) < len(folders):
            missing = next(folder for folder, own in zip(folders, tensors, strict=True) if key not in own)
            raise AveragingError(
                f"{missing} has no tensor {key}, which another member trains. Train the same modules."
            )
        else:
            averaged[key] = _mean(parts, shares).to(tensors[0][key].dtype)
    averaged = {key: tensor.contiguous() for key, tensor in averaged.items()}
    save_file(averaged, target / ADAPTER, metadata={"format": "pt"})

    rank = max(ranks.values())
    others = {module: size for module, size in ranks.items() if size != rank}
    config = configs[0]
    config.r = config.lora_alpha = rank  # a scaling of 1: the members' are in B
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    config.use_rslora = False
    config.lora_bias = any(key.endswith("lora_B.bias") for key in averaged)
    config.target_modules = set(ranks)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.save_pretrained(target)
    return rank


def _check_lora(folder: Path, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Raise [`AveragingError`] for an adapter whose delta is not the product of A and B."""
    lora = isinstance(config, LoraConfig)
    kind = "DoRA" if lora and config.use_dora else getattr(config.peft_type, "value", config.peft_type)
    known = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias")
    other = next((key for key in tensors if "lora_" in key and not key.endswith(known)), None)
    if not lora or kind == "DoRA" or other or config.target_parameters:
        raise AveragingError(
            f"{folder} is an adapter of the kind {kind}"
            f"{f' with the tensor {other}' if other else ''}, whose delta is not a product of two matrices. Needed: "
            "plain LoRA. Or merge each member into its base (merge_reward_model) and average the full models."
        )


def _split(key: str) -> tuple[str, str]:
    """The module that a tensor of an adapter belongs to, and the rest of its name."""
    plain = key.removeprefix("base_model.model.")
    module, found, rest = plain.partition(".lora_")
    return (module, f"lora_{rest}") if found else ("", plain)


def _scaling(config: LoraConfig, module: str, tensors: dict[str, torch.Tensor]) -> float:
    """What PEFT multiplies the product of B and A of a module by; 1 for other tensors."""
    if not module:
        return 1.0
    prefix = f"base_model.model.{module}."
    rank = next(len(tensors[prefix + name]) for name in LORA_A if prefix + name in tensors)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


# --------------------------------------------------------------------------------------------------------- full models
def _average_weights(folders: Sequence[Path], shares: Sequence[float], target: Path) -> None:
    """Write the mean of the members' weights, file by file as the first member has them."""
    places = [_places(folder) for folder in folders]
    for folder, own in zip(folders[1:], places[1:], strict=True):
        if set(own) != set(places[0]):
            name = sorted(set(own) ^ set(places[0]))[0]
            raise AveragingError(f"{folders[0]} and {folder} do not hold the same weights: only one has {name}.")
    for file in sorted({place.name for place in places[0].values()}):
        averaged = {}
        for name in [name for name, place in places[0].items() if place.name == file]:
            parts = [tensor for own in places for tensor in _tensor(own[name], name)]
            if any(part.shape != parts[0].shape for part in parts):
                raise AveragingError(f"{name} has the shapes {[tuple(part.shape) for part in parts]}; needed: one.")
            exact = not parts[0].is_floating_point()
            if exact and any(not torch.equal(part, parts[0]) for part in parts):
                raise AveragingError(
                    f"{name} holds {parts[0].dtype} values that differ between members; such weights have no mean."
                )
            averaged[name] = parts[0] if exact else _mean(parts, shares).to(parts[0].dtype)
        save_file(averaged, target / file, metadata={"format": "pt"})
    for index in folders[0].glob("*.safetensors.index.json"):
        shutil.copy(index, target / index.name)


def _places(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a full checkpoint."""
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    return places


def _tensor(file: Path, name: str) -> Iterator[torch.Tensor]:
    with safe_open(file, framework="pt") as tensors:
        yield tensors.get_tensor(name)


def _mean(parts: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    return sum(share * part.float() for share, part in zip(shares, parts, strict=True))


# ---------------------------------------------------------------------------------------------------------- the result
def _finish(
    folder: Path, sidecars: Sequence[Sidecar], shares: Sequence[float], load_kwargs: dict[str, Any]
) -> float | None:
    """Load the average, store what it is with its probe scores, and return how well it agrees with its members."""
    described = dataclasses.replace(sidecars[0], normalizer=None, calibration=None, probes=None)
    described.save(folder)
    if any(sidecar.normalizer or sidecar.calibration for sidecar in sidecars):
        logger.warning(
            "Normalisers and calibrations of the members do not hold for their average and are left out. Fit them "
            "again: `scorer.fit_normalizer(...)`, `scorer.fit_calibration(...)`."
        )
    model = load_reward_model(folder, **load_kwargs)
    probes = make_probes(model)
    scores = probe_scores(model, probes)
    full = dataclasses.replace(get_sidecar(model), probes={"input_ids": probes, "scores": scores})
    save_sidecar(model, full, folder)
    del model
    gc.collect()
    stored = [sidecar.probes for sidecar in sidecars]
    if any(own is None or own["input_ids"] != probes for own in stored):
        return None
    mean = _mean([torch.tensor(own["scores"]) for own in stored], shares)
    return spearman(torch.tensor(scores, dtype=torch.float64), mean.double())
