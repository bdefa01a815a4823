"""What every family of metrics hands to the report: numbers, and the units that each was computed from.

A `Measure` keeps what its interval needs, so that one place draws all intervals and one place compares two models. It
knows arrays of numbers, and nothing of models or texts.
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trl_ext.evaluation.statistics import Estimate, function_estimate, mean_estimate


def fewer(resamples: int) -> int:
    """Resamples for a number that is no mean: each costs a pass over the units, so a quarter, of many, is drawn."""
    return min(resamples, max(200, resamples // 4))


@dataclass
class Measure:
    """
    One number, and its units.

    Args:
        name (`str`): its key in the report.
        values (`list[float]`, *optional*): one a unit, NaN where a unit has none; the number is their mean.
        function (`Callable`, *optional*): in place of `values`: from indices of units to the number.
        size (`int`): units, where a `function` is given.
        clusters (`list[Hashable]`): of the units.
        proportion (`bool`): whether `values` are shares in [0, 1], see [`mean_estimate`].
        note (`str`, *optional*): stands in place of an interval, for a number that was chosen and not measured.
    """

    name: str
    values: Sequence[float] | None = None
    function: Callable[[np.ndarray], float] | None = None
    size: int = 0
    clusters: Sequence[Hashable] = field(default_factory=list)
    proportion: bool = True
    note: str | None = None

    def estimate(self, level: float, resamples: int, seed: int) -> Estimate:
        """The number with its interval."""
        if self.note is not None:
            return Estimate(float(self.values[0]), None, None, self.size, 0, self.note)
        if self.function is None:
            return mean_estimate(self.values, self.clusters, level, resamples, seed, self.proportion)
        return function_estimate(self.function, self.size, self.clusters, level, fewer(resamples), seed)


@dataclass
class Units:
    """
    Numbers of a growing list of units, column by column: what a family keeps of the rows it has seen.

    A column that a unit does not name is NaN there. A few floats a unit, so that 10,000 rows take about a megabyte.
    """

    columns: dict[str, list[float]] = field(default_factory=dict)
    clusters: list[Hashable] = field(default_factory=list)
    subsets: list[str | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.clusters)

    def add(self, row: int, cluster: Hashable, subset: str | None, **values: float) -> None:
        """One unit."""
        for name in values:
            if name not in self.columns:
                self.columns[name] = [math.nan] * len(self)
        for name, column in self.columns.items():
            column.append(float(values.get(name, math.nan)))
        self.rows.append(row)
        self.clusters.append(cluster)
        self.subsets.append(subset)

    def array(self, name: str) -> np.ndarray:
        """A column as fp64 `(N,)`; all NaN if no unit has it."""
        return np.asarray(self.columns.get(name, [math.nan] * len(self)), dtype=float)

    def mean(self, name: str, proportion: bool = True) -> Measure:
        """The mean of a column as a measure."""
        return Measure(name, values=self.array(name), clusters=self.clusters, proportion=proportion)

    def drift(self, values: np.ndarray) -> Measure:
        """
        `accuracy_drift`: by how much `values` change from the first to the last row of the file, on a straight line.

        Subsets are compared with themselves, since a benchmark's file has one subset after the other.
        """
        place = np.asarray(self.rows, dtype=float)
        place = (place - place.min(initial=0)) / max(1.0, np.ptp(place) if len(place) else 1.0)
        values = np.array(values, dtype=float)
        subsets = np.asarray([str(subset) for subset in self.subsets])
        there = np.isfinite(values)
        for subset in np.unique(subsets):
            rows = there & (subsets == subset)
            place[rows] -= place[rows].mean() if rows.any() else 0.0
            values[rows] -= values[rows].mean() if rows.any() else 0.0
        place, values = np.where(there, place, 0.0), np.where(there, values, 0.0)

        def slope(drawn: np.ndarray) -> float:
            square = float(place[drawn] @ place[drawn])
            return float(place[drawn] @ values[drawn]) / square if square else math.nan

        return self.computed("accuracy_drift", slope)

    def by_subset(self, name: str, key: str) -> list[Measure]:
        """`key/<subset>` for each subset, where there is more than one."""
        subsets = list(dict.fromkeys(subset for subset in self.subsets if subset is not None))
        if len(subsets) < 2:
            return []
        values, of = self.array(name), np.asarray(self.subsets, dtype=object)
        return [
            Measure(f"{key}/{subset}", values=np.where(of == subset, values, math.nan), clusters=self.clusters)
            for subset in subsets
        ]

    def computed(self, key: str, function: Callable[[np.ndarray], float]) -> Measure:
        """A number that is no mean, as a measure."""
        return Measure(key, function=function, size=len(self), clusters=self.clusters)


def part(cluster: Hashable, purpose: str = "") -> float:
    """A number in [0, 1) that a cluster has in every run and for every model: who is fitted on, and who is tested."""
    return hashlib.sha256(f"{purpose}{cluster}".encode()).digest()[0] / 256


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.where(values >= 0, 1 / (1 + np.exp(-np.abs(values))), 1 - 1 / (1 + np.exp(-np.abs(values))))


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two arrays, NaN where one of them does not vary."""
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < 3 or np.ptp(first[both]) == 0 or np.ptp(second[both]) == 0:
        return math.nan
    return float(np.corrcoef(first[both], second[both])[0, 1])


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a right unit outscores a wrong one, ties counting half; NaN where one kind is missing.

    Equals `sklearn.metrics.roc_auc_score`.
    """
    right = labels > 0.5
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return math.nan
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.r_[0, np.flatnonzero(np.diff(ordered)) + 1]
    ends = np.r_[starts[1:], len(ordered)]
    ranks = np.empty(len(scores))
    ranks[order] = np.repeat((starts + ends + 1) / 2, ends - starts)
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """
    Expected calibration error: the mean distance of confidence and share of right units, over bins of equal width.

    See *On Calibration of Modern Neural Networks* by C. Guo et al. (https://huggingface.co/papers/1706.04599),
    equation 3.
    """
    if not len(probabilities):
        return math.nan
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    sizes = np.bincount(place, minlength=bins)
    gap = np.bincount(place, probabilities - labels, bins)
    return float(np.abs(gap[sizes > 0]).sum() / len(probabilities))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """The points of a reliability diagram: mean confidence, share of right units and size of each bin that is used."""
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(probabilities[place == bin].mean()),
            "right": float(labels[place == bin].mean()),
            "size": int((place == bin).sum()),
        }
        for bin in range(bins)
        if (place == bin).any()
    ]
