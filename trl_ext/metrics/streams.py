"""Streamed counts for metrics over any number of labelled positions, in memory of a bounded size.

All classes take tensors batch by batch and give the same result for every batch size and every order of the rows:
counts are integers, and sums are exact until they are read. With several processes, gather each batch and add it in
every process. Scores and labels must be finite, and are rounded to fp32.

This module knows scores and labels. It knows nothing of tokens, steps, questions or models.
"""

import math
from collections.abc import Iterable
from fractions import Fraction

import torch

from trl_ext.metrics.ranking import pearson


# 65,536 counted pairs of score and label take 1 MB, and another MB while more arrive.
CAPACITY = 65_536

# Number of batches that are held before they are merged: a small tensor takes far more memory than its values.
HELD_BATCHES = 1024


class ExactSum:
    """
    A sum of floats without rounding, which is the same for every order and every batch size.

    It keeps a few non-overlapping floats whose sum is the total. See *Adaptive Precision Floating-Point Arithmetic
    and Fast Robust Geometric Predicates* by J. R. Shewchuk (https://doi.org/10.1007/PL00009321).

    Example:

    ```python
    >>> stream = ExactSum()
    >>> stream.add([1e16, 1.0, -1e16])
    >>> float(stream.value())
    1.0
    ```
    """

    def __init__(self):
        self._parts: list[float] = []

    def add(self, values: Iterable[float]) -> None:
        """Add values, which must be finite."""
        for value in values:
            kept = []
            for part in self._parts:
                total = value + part
                shift = total - value
                rest = (value - (total - shift)) + (part - shift)  # the rounding error of the total
                if rest:
                    kept.append(rest)
                value = total
            self._parts = [*kept, value]

    def value(self) -> Fraction:
        """The sum, as an exact fraction."""
        return sum(map(Fraction, self._parts), Fraction(0))


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Integers in (-2^31, 2^31) with the same order as the fp32 values; 0.0 and -0.0 get the same."""
    bits = (values.float() + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -bits - 2**31, bits)


class PairCounts:
    """
    A bounded multiset of pairs (score, label), for metrics that only need their order.

    Each distinct pair is counted, so everything is exact up to `capacity` distinct pairs. When there are more, the
    last bit of all fp32 numbers is dropped, and so on. Scores then fall into bins whose width is a fixed share of the
    score. The bins are as fine as the capacity allows and need no range. Their width depends on the pairs and not on
    their order. Labels 0 and 1 always stay distinct.

    Args:
        capacity (`int`, *optional*, defaults to `65_536`):
            Distinct pairs to keep, at least 1,024.

    Example:

    ```python
    >>> pairs = PairCounts()
    >>> pairs.add(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
    >>> pairs.auc(), pairs.auc_error()
    (0.75, 0.0)
    ```
    """

    def __init__(self, capacity: int = CAPACITY):
        if capacity < 1024:
            raise ValueError(f"capacity={capacity}; needed: at least 1024 distinct pairs.")
        self.capacity = capacity
        self._dropped_bits = 0
        self._pairs = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0, dtype=torch.int64)
        self._pending: list[torch.Tensor] = []
        self._num_pending = 0

    def add(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Add pairs.

        Args:
            scores, labels (`torch.Tensor`, both of one shape):
                Finite numbers.

        Raises:
            ValueError: the shapes differ.
        """
        if scores.shape != labels.shape:
            raise ValueError(f"Scores and labels differ in shape: {tuple(scores.shape)}, {tuple(labels.shape)}.")
        scores, labels = (_keys(values.detach().cpu().flatten()) for values in (scores, labels))
        self._pending.append(self._coarsen((scores << 32) | (labels + 2**31)))
        self._num_pending += len(scores)
        if self._num_pending > self.capacity or len(self._pending) > HELD_BATCHES:
            self._compact()

    def _coarsen(self, pairs: torch.Tensor) -> torch.Tensor:
        low = (1 << self._dropped_bits) - 1
        return pairs & ~((low << 32) | low)

    def _compact(self) -> None:
        pairs = torch.cat([self._pairs, *self._pending])
        counts = torch.cat([self._counts, torch.ones(len(pairs) - len(self._pairs), dtype=torch.int64)])
        self._pending, self._num_pending = [], 0
        pairs, counts = _merge(self._coarsen(pairs), counts)
        while len(pairs) > self.capacity:
            self._dropped_bits += 1
            pairs, counts = _merge(self._coarsen(pairs), counts)
        self._pairs, self._counts = pairs, counts

    def _read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The keys of scores and labels, and the counts."""
        self._compact()
        return self._pairs >> 32, (self._pairs & (2**32 - 1)) - 2**31, self._counts

    def _by_score(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Negatives and positives (labels above one half) in each bin, from the lowest score to the highest."""
        scores, labels, counts = self._read()
        bins, place = scores.unique(return_inverse=True)
        positive = labels > _keys(torch.tensor(0.5))
        table = torch.zeros(2, len(bins), dtype=torch.int64)
        table.index_put_((positive.long(), place), counts, accumulate=True)
        return table[0], table[1]

    def auc(self) -> float:
        """
        Area under the ROC curve: the probability that a positive (label above one half) scores above a negative. Equal
        scores count half. NaN if positives or negatives are missing.
        """
        negative, positive = self._by_score()
        total = 2 * int(negative.sum()) * int(positive.sum())
        below = negative.cumsum(0) - negative
        return int((positive * (2 * below + negative)).sum()) / total if total else math.nan

    def auc_error(self) -> float:
        """
        Bound on the error of [`auc`]: 0 while all pairs are kept, then half the share of positive-negative pairs in a
        common bin. NaN if the area is NaN.
        """
        negative, positive = self._by_score()
        total = 2 * int(negative.sum()) * int(positive.sum())
        if not total:
            return math.nan
        return int((positive * negative).sum()) / total if self._dropped_bits else 0.0

    def spearman(self) -> float:
        """
        Spearman's rank correlation of score and label; tied values get their mean rank. NaN if either does not vary.
        Once bits are dropped, numbers in a common bin are ties.
        """
        scores, labels, counts = self._read()
        x, y = (_centered_ranks(keys, counts) for keys in (scores, labels))
        weights = counts.double()
        return pearson(*(float((weights * product).sum()) for product in (x * x, y * y, x * y)))


def _merge(pairs: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct pairs in order, with their summed counts."""
    pairs, place = pairs.unique(return_inverse=True)
    return pairs, torch.zeros(len(pairs), dtype=torch.int64).index_add_(0, place, counts)


def _centered_ranks(keys: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The mean rank of each key among all counted ones, minus the mean of all ranks."""
    bins, place = keys.unique(return_inverse=True)
    sizes = torch.zeros(len(bins), dtype=torch.int64).index_add_(0, place, counts)
    ranks = sizes.cumsum(0).double() - (sizes - 1).double() / 2
    return (ranks - (counts.sum().double() + 1) / 2)[place]


class ClassCounts:
    """
    A confusion matrix, and precision, recall and F1 of each class.

    Args:
        names (`list[str]`):
            Names of the classes, for the keys of the summary.

    Example:

    ```python
    >>> counts = ClassCounts(["wrong", "right"])
    >>> counts.add(torch.tensor([1, 1, 0, 1]), torch.tensor([1, 0, 0, 1]))
    >>> counts.summary()["right_precision"], counts.summary()["balanced_accuracy"]
    (0.6666666666666666, 0.75)
    ```
    """

    def __init__(self, names: list[str]):
        self.names = names
        self._table = torch.zeros(len(names), len(names), dtype=torch.int64)  # [label, prediction]

    def add(self, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Add positions.

        Args:
            predictions, labels (`torch.Tensor`, both of one shape):
                Class numbers from 0, or bool.

        Raises:
            ValueError: the shapes differ, or a number is not a class.
        """
        if predictions.shape != labels.shape:
            raise ValueError(f"Predictions and labels differ in shape: {predictions.shape}, {labels.shape}.")
        predictions, labels = (values.detach().cpu().flatten().long() for values in (predictions, labels))
        for name, values in {"predictions": predictions, "labels": labels}.items():
            wrong = values[(values < 0) | (values >= len(self.names))]
            if len(wrong):
                raise ValueError(
                    f"The {name} must be class numbers from 0 to {len(self.names) - 1}, found {wrong[0]}."
                )
        self._table.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)

    def summary(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`, with NaN for a metric whose denominator is 0: `accuracy`; `balanced_accuracy`, the mean
            recall of the classes that occur; for each class `<name>_rate` (its share of the labels),
            `<name>_precision`, `<name>_recall` and `<name>_f1`.
        """
        total, hits = int(self._table.sum()), self._table.diag()
        found, wanted = self._table.sum(0), self._table.sum(1)
        recalls = [int(hit) / int(count) for hit, count in zip(hits, wanted, strict=True) if count]
        result = {
            "accuracy": _ratio(hits.sum(), total),
            "balanced_accuracy": math.fsum(recalls) / len(recalls) if recalls else math.nan,
        }
        for index, name in enumerate(self.names):
            result[f"{name}_rate"] = _ratio(wanted[index], total)
            result[f"{name}_precision"] = _ratio(hits[index], found[index])
            result[f"{name}_recall"] = _ratio(hits[index], wanted[index])
            result[f"{name}_f1"] = _ratio(2 * hits[index], found[index] + wanted[index])
        return result


def _ratio(part: torch.Tensor | int, whole: torch.Tensor | int) -> float:
    return int(part) / int(whole) if whole else math.nan


class Calibration:
    r"""
    Brier score and expected calibration error of the probability of one outcome.

    $$
    Brier = \frac{1}{N} \sum_i (p_i - q_i)^2, \qquad ECE = \sum_b \frac{n_b}{N} |\bar{p}_b - \bar{q}_b|
    $$

    See *Verification of Forecasts Expressed in Terms of Probability* by G. W. Brier and *On Calibration of Modern
    Neural Networks* by C. Guo et al. (https://huggingface.co/papers/1706.04599). The paper defines the error for the
    likeliest class of many; here it is for the probability of one outcome, over bins of equal width that include their
    lower edge. Differences are summed in steps of 2^-32, so the result does not depend on the order.

    Args:
        bins (`int`, *optional*, defaults to `15`):
            Number of bins of the calibration error; 15 as in the paper.
    """

    def __init__(self, bins: int = 15):
        self._squares, self._count = 0, 0
        self._gaps = torch.zeros(bins, dtype=torch.int64)

    def add(self, probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Add positions.

        Args:
            probabilities, labels (`torch.Tensor`, both of one shape):
                Predicted probability and outcome (or its probability), in [0, 1].

        Raises:
            ValueError: the shapes differ, or a number is outside [0, 1].
        """
        if probabilities.shape != labels.shape:
            raise ValueError(f"Probabilities and labels differ in shape: {probabilities.shape}, {labels.shape}.")
        probabilities, labels = (values.detach().cpu().flatten().double() for values in (probabilities, labels))
        for name, values in {"probabilities": probabilities, "labels": labels}.items():
            wrong = values[~((values >= 0) & (values <= 1))]
            if len(wrong):
                raise ValueError(f"The {name} must be in [0, 1], found {wrong[0].item()}.")
        gaps = probabilities - labels
        place = (probabilities * len(self._gaps)).long().clamp(max=len(self._gaps) - 1)
        self._gaps.index_add_(0, place, _fixed(gaps))
        self._squares += int(_fixed(gaps.square()).sum())
        self._count += len(gaps)

    def summary(self) -> dict[str, float]:
        """`brier` and `ece`, both in [0, 1], lower is better; NaN if there is no position."""
        if not self._count:
            return {"brier": math.nan, "ece": math.nan}
        scale = self._count * 2**32
        return {"brier": self._squares / scale, "ece": int(self._gaps.abs().sum()) / scale}


def _fixed(values: torch.Tensor) -> torch.Tensor:
    """Numbers in [-1, 1] as whole multiples of 2^-32, whose sum is exact."""
    return (values * 2**32).round().long()
