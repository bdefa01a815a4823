"""Selects training data by its likelihood under a small model.

See *Foundations of Large Language Models* by T. Xiao and J. Zhu, section 10.2.5 and figure 10.5. This module knows a
language model and rows of text. It knows nothing of reward models or training.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.data.mapping import plain_rows
from trl_ext.data.offsets import encode_with_offsets
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.pipelines.generation.transformers_backend import load_policy


logger = logging.getLogger(__name__)

Keep = Literal["likely", "unlikely", "middle"]


@dataclass(frozen=True)
class LikelihoodReport:
    """
    The result of a selection, in numbers.

    Args:
        kept, cut (`int`): number of rows.
        unscorable (`int`): rows without a completion token; they are part of `cut`.
        kept_range (`tuple[float, float]`): lowest and highest mean cross-entropy (nats per token) among the kept rows.
        mean_kept, mean_cut (`float`): mean cross-entropy of both; NaN where there is none.
    """

    kept: int
    cut: int
    unscorable: int
    kept_range: tuple[float, float]
    mean_kept: float
    mean_cut: float


def completion_cross_entropies(
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 16,
    max_length: int | None = 1024,
) -> list[float]:
    """
    Compute the mean cross-entropy of each completion's tokens after its prompt, in nats per token.

    Args:
        model (`str` or `PreTrainedModel`): a language model.
        dataset (`Dataset`): columns `prompt` and `completion`, text or chat.
        processing_class (`PreTrainedTokenizerBase`, *optional*): by default the model's tokenizer.
        batch_size (`int`, *optional*, defaults to `16`): rows at a time, sorted by length.
        max_length (`int`, *optional*, defaults to `1024`): longest row in tokens; longer prompts are cut on the left.

    Returns:
        `list[float]`: one a row; NaN for a completion without a token.
    """
    if isinstance(model, str):
        processing_class = processing_class or AutoTokenizer.from_pretrained(model)
        model = load_policy(model)
    elif processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
    tokenization = TokenizationSettings.for_training(processing_class)
    rows = []
    for row in dataset:
        located = encode_with_offsets(
            processing_class, row["prompt"], row["completion"], tokenization, max_length=max_length
        )
        rows.append((located.ids, located.completion_start))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    values = [math.nan] * len(rows)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            width = max(len(rows[index][0]) for index in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.long)  # (B, T)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, -100)
            for k, index in enumerate(chosen):
                tokens, start = rows[index]
                ids[k, : len(tokens)] = torch.tensor(tokens)
                mask[k, : len(tokens)] = 1
                labels[k, start : len(tokens)] = ids[k, start : len(tokens)]
            logits = model(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
            targets = labels[:, 1:].to(logits.device)  # (B, T - 1)
            losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")  # (B, T - 1)
            counts = (targets != -100).sum(1)
            means = (losses.sum(1) / counts.clamp(min=1)).masked_fill(counts == 0, math.nan)
            for index, value in zip(chosen, means.tolist(), strict=True):
                values[index] = value
    model.train(training)
    return values


def select_by_likelihood(
    model: str | PreTrainedModel,
    dataset: Dataset,
    keep: float = 0.5,
    which: Keep = "likely",
    **kwargs: Any,
) -> tuple[Dataset, LikelihoodReport]:
    """
    Keep a share of the rows: those whose completions a small model finds most likely, least likely, or in between.

    Args:
        model (`str` or `PreTrainedModel`): the model that judges.
        dataset (`Dataset`): columns `prompt` and `completion`; kept rows stay in their order.
        keep (`float`, *optional*, defaults to `0.5`): share of the scorable rows, in (0, 1].
        which (`str`, *optional*, defaults to `"likely"`):
            `"likely"` drops rows that look like noise, `"unlikely"` rows that the model knows, `"middle"` both.
        **kwargs: arguments of [`completion_cross_entropies`].

    Returns:
        `tuple[Dataset, LikelihoodReport]`: the kept rows with a column `cross_entropy` (it replaces an earlier one),
        and the report.

    Raises:
        ValueError: `keep` or `which` is out of range, the data is a stream or lacks a column, or no row can be judged.
    """
    check_choice(keep, which)  # before the model runs
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Found a {type(dataset).__name__}. Needed: a `Dataset`, because `keep` is a share of all rows."
        )
    dataset = plain_rows(dataset)
    missing = [name for name in ("prompt", "completion") if name not in dataset.column_names]
    if missing:
        raise ValueError(f"The data set has no column {missing}. Needed: `prompt` and `completion`.")
    if "cross_entropy" in dataset.column_names:  # from an earlier selection
        dataset = dataset.remove_columns("cross_entropy")
    values = np.array(completion_cross_entropies(model, dataset, **kwargs))
    kept = choose_by_value(values, keep, which)
    cut = np.setdiff1d(np.flatnonzero(~np.isnan(values)), kept)
    report = LikelihoodReport(
        kept=len(kept),
        cut=len(values) - len(kept),
        unscorable=int(np.isnan(values).sum()),
        kept_range=(float(values[kept].min()), float(values[kept].max())),
        mean_kept=float(values[kept].mean()),
        mean_cut=float(values[cut].mean()) if len(cut) else math.nan,
    )
    logger.info(f"Kept {report.kept} of {len(values)} rows ({which}); {report.unscorable} had no completion token.")
    return dataset.select(kept.tolist()).add_column("cross_entropy", values[kept].tolist()), report


def choose_by_value(values: Sequence[float], keep: float, which: Keep) -> np.ndarray:
    """
    The places of the rows to keep, in order: a share of the values that are not NaN, at least one.

    Among equal values the earlier row comes first.
    """
    check_choice(keep, which)
    values = np.asarray(values, dtype=float)
    order = np.argsort(values, kind="stable")[: int((~np.isnan(values)).sum())]  # low cross-entropy first, NaN last
    if not len(order):
        raise ValueError("No row has a completion token, so no likelihood can be computed. Give other rows.")
    count = max(1, round(keep * len(order)))
    first = {"likely": 0, "unlikely": len(order) - count, "middle": (len(order) - count) // 2}[which]
    return np.sort(order[first : first + count])


def check_choice(keep: float, which: Keep) -> None:
    """Raise `ValueError` for a share out of (0, 1] or an unknown `which`."""
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep} is not a share. Needed: above 0 and up to 1.")
    if which not in ("likely", "unlikely", "middle"):
        raise ValueError(f"which={which!r} is not known. Needed: 'likely', 'unlikely' or 'middle'.")
