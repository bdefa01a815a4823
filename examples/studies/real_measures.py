"""How well scores agree with what people said, with intervals over groups, for `real_data.py`.

Knows numbers and groups, and no model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ext.metrics.bootstrap import bootstrap_draws, group_numbers


RESAMPLES = 2000


@dataclass
class Judged:
    """
    The tested rows of a data set, of all folds.

    Args:
        labels (`list[list[float]]`): of each row's items.
        groups (`list[str]`): of each row.
        strata (`list[str]`): of each row; AUC compares items of one stratum of one fold.
        measure (`str`): `"order"` or `"auc"`.
    """

    labels: list[list[float]]
    groups: list[str]
    strata: list[str]
    measure: str

    def __post_init__(self) -> None:
        self._numbers, self._count = group_numbers(self.groups)
        drawn = [draw.numpy() for draw in bootstrap_draws(self._count, RESAMPLES, seed=0)]
        self._weights = np.stack([np.bincount(d, minlength=self._count) for block in drawn for d in block])  # (R, G)

    def values(self, scores: Sequence[Sequence[float]]) -> np.ndarray:
        """The measure of a method's scores: first of the rows themselves, then of each resample, (1 + R,)."""
        weights = np.concatenate([np.ones((1, self._count)), self._weights])
        if self.measure == "order":
            shares = np.array([in_order(own, known) for own, known in zip(scores, self.labels, strict=True)])
            of_rows = weights[:, self._numbers]  # (1 + R, N)
            return of_rows @ shares / of_rows.sum(1)
        found = []
        for stratum in sorted(set(self.strata)):
            inside = [n for n, own in enumerate(self.strata) if own == stratum]
            values = np.array([score for n in inside for score in scores[n]])
            labels = np.array([label for n in inside for label in self.labels[n]])
            owners = np.array([self._numbers[n].item() for n in inside for _ in self.labels[n]])
            if 0 < labels.sum() < len(labels):
                found.append(weighted_auc(values, labels > 0.5, weights[:, owners]))
        return np.nanmean(found, axis=0)  # a resample may hold no wrong item of a small stratum


def in_order(scores: Sequence[float], labels: Sequence[float]) -> float:
    """The share of a row's decided pairs whose scores are in the order of the labels; equal scores count half."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    better = labels[:, None] > labels[None]
    gap = np.sign(scores[:, None] - scores[None])
    return float(((gap[better] + 1) / 2).mean())


def weighted_auc(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The AUC of right items against wrong ones, for each row of weights (R, N); equal scores count half."""
    _, place = np.unique(scores, return_inverse=True)
    levels = place.max() + 1
    mass = [np.zeros((len(weights), levels)) for _ in range(2)]
    for side, total in zip((~right, right), mass, strict=True):
        np.add.at(total.T, place[side], weights[:, side].T)
    below = mass[0].cumsum(1) - mass[0] / 2
    with np.errstate(invalid="ignore"):
        return (mass[1] * below).sum(1) / (mass[0].sum(1) * mass[1].sum(1))


def interval(values: np.ndarray) -> dict[str, float]:
    """The value, and a 95 % interval of the percentiles of its resamples."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def compared(values: dict[str, np.ndarray], name: str, others: Sequence[str]) -> dict[str, Any]:
    """
    A method beside others on the same resamples.

    Returns:
        `dict`: `over`, the best of the others; `gain` over it with its interval; `gains` over each of them; and `beats
            all`: whether the intervals of all of these lie above 0.
    """
    gains = {other: interval(values[name] - values[other]) for other in others}
    best = max(others, key=lambda other: values[other][0])
    low = min((gain["low"] for gain in gains.values()), default=-math.inf)
    return {"over": best, "gain": gains[best], "gains": gains, "beats all": bool(low > 0)}
