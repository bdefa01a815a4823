"""Merges the adapter of a reward model into its base, and checks that the full checkpoint gives the same scores.

It knows models, the sidecar and token ids. It knows nothing of text or training.
"""

import dataclasses
import gc
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoTokenizer

from trl_ext.metrics.ranking import spearman
from trl_ext.models.bases import describe_base
from trl_ext.models.building import as_dtype, is_quantized
from trl_ext.models.heads import head_parameters, make_head_exact
from trl_ext.models.loading import load_reward_model, local_folder, save_sidecar
from trl_ext.models.sidecar import POSTERIOR_FILE, Sidecar, get_sidecar, make_probes, probe_scores


REPORT_NAME = "merge_report.json"


class MergeError(RuntimeError):
    """The merged model's scores differ too much from the adapter's."""


def merge_reward_model(
    path: str | Path,
    output_dir: str | Path,
    dtype: str | torch.dtype | None = None,
    *,
    base_model: str | Path | None = None,
    calibration_ids: list[list[int]] | None = None,
    tolerance: float = 0.05,
    **load_kwargs: Any,
) -> dict[str, Any]:
    """
    Merge the adapter of a reward model into its base, and check that the merged model gives the same scores.

    A quantized base is dequantized first, the adapter is merged in fp32, and the result is stored in `dtype`. (The
    adapter was trained on the quantized weights, so merging into the original ones would move the scores.) The merged
    model is then loaded from disk, and its scores of a calibration set are compared with the adapter's.

    Args:
        path (`str` or `Path`):
            Folder or Hub id of an adapter reward model.
        output_dir (`str` or `Path`):
            An empty or new folder for the full checkpoint, its tokenizer, `reward_model.json` and
            `merge_report.json`. It is written only if the scores agree.
        dtype (`str` or `torch.dtype`, *optional*):
            Storage dtype; defaults to the dtype the base had in training. The head stays fp32.
        base_model (`str` or `Path`, *optional*):
            Where the base is now, if it moved (see [`load_reward_model`]).
        calibration_ids (`list[list[int]]`, *optional*):
            Token ids to compare the scores on; defaults to 64 random sequences of 4 to 32 tokens.
        tolerance (`float`, *optional*, defaults to `0.05`):
            Largest change of a score, in standard deviations of the scores.
        **load_kwargs:
            For [`load_reward_model`], e.g. `device_map` or `trust_remote_code`.

    Returns:
        `dict`: the report: `max_change`, `mean_change`, `score_std`, `relative_change`, `spearman`, `num_sequences`,
        `dtype`, `tolerance`.

    Raises:
        `ValueError`: the model is not an adapter, or `output_dir` is not empty.
        [`MergeError`]: PEFT cannot merge this kind of adapter (`lora_bias` on layers without a bias), or a score moved
            by more than `tolerance` standard deviations; nothing is written.
    """
    output = Path(output_dir)
    check_empty(output)
    model = load_reward_model(path, base_model=base_model, **load_kwargs)
    if not isinstance(model, PeftModel):
        raise ValueError(f"{path} is a full checkpoint already: there is no adapter to merge.")
    sidecar = get_sidecar(model)
    if sidecar is None:
        raise ValueError(
            f"{path} has no reward_model.json, so its exact base is unknown. Train the adapter with trl_ext."
        )
    target = as_dtype(dtype) or as_dtype(sidecar.base.dtype)
    if not isinstance(target, torch.dtype):
        raise ValueError(f"dtype={dtype!r} cannot be stored. Needed: 'float32', 'bfloat16' or 'float16'.")
    ids = calibration_ids or make_probes(model, number=64, seed=1)
    before = torch.tensor(probe_scores(model, ids), dtype=torch.float64)
    prequantized = is_quantized(model) and model.get_base_model().hf_quantizer.pre_quantized
    try:
        merged = _merge(model, local_folder(path, load_kwargs.get("revision")), sidecar.head_modules)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:  # whatever PEFT raises
        raise MergeError(
            f"PEFT cannot merge this adapter into its base: {error} Nothing was written. Keep using the adapter, "
            "which RewardScorer and load_reward_model load by its path, or train one with plain LoRA."
        ) from error
    head = {
        name: parameter.detach().clone() for name, parameter in head_parameters(merged, sidecar.head_modules).items()
    }
    merged.to(target)
    make_head_exact(merged, sidecar.head_modules)
    for name, parameter in head_parameters(merged, sidecar.head_modules).items():
        parameter.data.copy_(head[name])  # `to` above rounded the head
    merged.config.dtype = target

    with new_folder(output) as staging:
        _save(merged, staging, path, sidecar, prequantized, load_kwargs)
        del model, merged, head  # so that the merged model and the loaded one are not in memory together
        gc.collect()
        return _compare(staging, path, sidecar, ids, before, tolerance, load_kwargs)


def check_empty(output: Path) -> None:
    """Raise `ValueError` if a folder holds files already."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} already holds files. Choose an empty or new folder for the merged model.")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that takes the place of `output` when the block ends. After an error nothing of it is left."""
    made = [folder for folder in (output.parent, *output.parent.parents) if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}-{secrets.token_hex(4)}"
    try:
        staging.mkdir()
        yield staging
        if output.exists():
            output.rmdir()
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            folder.rmdir()
        raise


def _merge(model: PeftModel, folder: str, head: list[str]) -> nn.Module:
    """Merge the adapter in fp32 into the base that it was trained on; a quantized base is dequantized first."""
    if is_quantized(model):
        base = model.unload().dequantize(dtype=torch.float32).float()
        make_head_exact(base, head)
        model = PeftModel.from_pretrained(base, folder)
    merged = model.float().merge_and_unload()
    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # some tuners leave them in
            merged.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    return merged


def _save(
    merged: nn.Module,
    folder: Path,
    path: str | Path,
    sidecar: Sidecar,
    prequantized: bool,
    load_kwargs: dict[str, Any],
) -> None:
    """Save the merged model with its tokenizer and everything that is stored beside the adapter at `path`."""
    source = local_folder(path, load_kwargs.get("revision"))
    # transformers cannot restore the original format of weights that were 4-bit on disk, and they do not need it
    merged.save_pretrained(folder, save_original_format=not prequantized)
    AutoTokenizer.from_pretrained(
        source, trust_remote_code=load_kwargs.get("trust_remote_code", False)
    ).save_pretrained(folder)
    # the recorded base stays the model that the adapter was trained on, although this folder now holds all weights
    described = dataclasses.replace(
        describe_base(merged), id=sidecar.base.id, revision=sidecar.base.revision, quantization=None
    )
    save_sidecar(merged, dataclasses.replace(sidecar, base=described, is_adapter=False, probes=None), folder)
    if Path(source, POSTERIOR_FILE).is_file():  # the head is the same, so the posterior is too
        Path(folder, POSTERIOR_FILE).parent.mkdir()
        shutil.copy(Path(source, POSTERIOR_FILE), Path(folder, POSTERIOR_FILE))


def _compare(
    folder: Path,
    path: str | Path,
    adapter: Sidecar,
    ids: list[list[int]],
    before: torch.Tensor,
    tolerance: float,
    load_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Load the merged model as a new process would, and compare its scores with the adapter's at `path`."""
    kept = {
        key: load_kwargs[key]
        for key in ("device_map", "attn_implementation", "trust_remote_code")
        if key in load_kwargs
    }
    loaded = load_reward_model(folder, **kept)
    sidecar = get_sidecar(loaded)
    after = torch.tensor(probe_scores(loaded, ids), dtype=torch.float64)
    change, std = (after - before).abs(), before.std().item()
    report = {
        "max_change": change.max().item(),
        "mean_change": change.mean().item(),
        "score_std": std,
        "relative_change": change.max().item() / max(std, 1e-12),
        "spearman": spearman(before, after),
        "num_sequences": len(ids),
        "dtype": sidecar.base.dtype,
        "tolerance": tolerance,
        "source": str(path),
    }
    if not report["relative_change"] <= tolerance:  # also when NaN
        rounding = (
            " An int8 base also rounds activations to 8 bits in every pass, and a merged model does not. Allow this "
            "with a larger `tolerance`."
            if (adapter.base.quantization or {}).get("load_in_8bit")
            else ""
        )
        raise MergeError(
            f"Merging {path} in {sidecar.base.dtype} moves a score by {report['max_change']:.3g}, which is "
            f"{report['relative_change']:.1%} of the scores' standard deviation {std:.3g}; at most {tolerance:.1%} is "
            "allowed. Nothing was written. Store it in float32, calibrate on real texts (`calibration_ids`), or keep "
            f"using the adapter.{rounding}"
        )
    probes = make_probes(loaded)
    save_sidecar(
        loaded,
        dataclasses.replace(sidecar, probes={"input_ids": probes, "scores": probe_scores(loaded, probes)}),
        folder,
    )
    Path(folder, REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
