r"""Metrics of best-of-n sets: what the best of n by this model is worth in gold reward, and when more stops paying.

A unit is a prompt with its samples, each with the model's score and a gold reward. Curves are unbiased: for every n up
to the number of samples they average over all subsets (see [`~trl_ext.metrics.voting.best_of_k`]).

**The predicted n.** Picking the best of n moves the quantile u of the score to the density \(n u^{n-1}\), so the
expected gold reward is \(f(n) = \int_0^1 r(u)\, n u^{n-1} du\) with \(r(u)\) the mean gold reward at score quantile u.
`HedgeTune` of *Inference-Time Reward Hacking in Large Language Models* by H. Khalaf et al.
(https://huggingface.co/papers/2506.19248) finds the n with \(f'(n) = 0\). It is computed here on one half of the
prompts and stands beside the best n of the curve of the other half. It knows numbers, and nothing of texts.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln

from trl_ext.evaluation.families.places import Places
from trl_ext.evaluation.items import Item
from trl_ext.evaluation.measures import Measure, Units, part
from trl_ext.metrics.voting import kl_bound


class BestOfN:
    """Collects the scores of samples whose gold reward is known."""

    def __init__(self):
        self.units = Units()
        self._places = Places()
        self._ordered: list[np.ndarray] = []  # gold rewards of each prompt, the lowest score first
        self._curves: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # gold, oracle, proxy for n = 1, 2, 3 ...

    def add(self, item: Item, scores: list[float]) -> float:
        """Take one scored row; returns what the pick falls short of the best sample by, as a negative number."""
        scores_, gold = np.asarray(scores, dtype=float), np.asarray(item.ratings, dtype=float)
        self.units.add(item.row, item.cluster, item.subset)
        self._places.add(scores_, gold)
        self._ordered.append(gold[np.argsort(scores_, kind="stable")])
        self._curves.append((best_of_each(gold, scores_), best_of_each(gold, gold), best_of_each(scores_, scores_)))
        return float(gold[int(scores_.argmax())] - gold.max())

    @property
    def most(self) -> int:
        """Samples of the prompt with the fewest: the largest n of the curve."""
        return min(map(len, self._ordered), default=0)

    def measures(self) -> Iterator[Measure]:
        """Every number of these rows, with what its interval is drawn from."""
        if self.most < 1:
            return
        clusters = self.units.clusters
        table = {n: self._gold_at(n) for n in _counts(self.most)}
        for n, values in table.items():
            yield Measure(f"gold_at_{n}", values=values, clusters=clusters, proportion=False)
        first, last = table[1], table[max(table)]
        yield Measure("gain", values=last - first, clusters=clusters, proportion=False)
        oracle = self._gold_at(max(table), oracle=True)
        yield Measure("oracle", values=oracle, clusters=clusters, proportion=False)
        yield self.units.computed("position_correlation", self._places.correlation)
        if self.most < 4:
            return
        everything = np.array([curves[0][: self.most] for curves in self._curves]).T  # (n, N)
        fitted = np.array([part(cluster, "calibration ") < 0.5 for cluster in clusters])
        tested, calibration = np.flatnonzero(~fitted), np.flatnonzero(fitted)
        names = [clusters[unit] for unit in tested]
        yield Measure(
            "best_n",
            function=lambda drawn: float(everything[:, tested[drawn]].mean(1).argmax() + 1),
            size=len(tested),
            clusters=names,
        )
        yield Measure(
            "predicted_n",
            function=lambda drawn: predicted_n([self._ordered[calibration[unit]] for unit in drawn], limit=self.most),
            size=len(calibration),
            clusters=[clusters[unit] for unit in calibration],
        )
        best = everything.max(0) if len(tested) == 0 else everything[int(everything.mean(1).argmax())]
        yield Measure("loss_at_largest_n", values=everything[-1] - best, clusters=clusters, proportion=False)

    def curve(self) -> list[dict[str, float]]:
        """
        What the pick is worth for n = 1, 2, 4 ... and the largest n: `n`, `kl` (nats, an upper bound), `proxy`, `gold`
        and `oracle`.
        """
        return [
            {
                "n": n,
                "kl": kl_bound(n),
                "proxy": float(np.mean([proxy[n - 1] for _, _, proxy in self._curves])),
                "gold": float(self._gold_at(n).mean()),
                "oracle": float(self._gold_at(n, oracle=True).mean()),
            }
            for n in _counts(self.most)
        ]

    def _gold_at(self, n: int, oracle: bool = False) -> np.ndarray:
        """Expected gold reward of the best of n by score (or by gold) for every prompt, `(N,)`."""
        return np.array([curves[int(oracle)][n - 1] for curves in self._curves])


def best_of_each(values: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """
    [`~trl_ext.metrics.voting.best_of_k`] for every k from 1 to N at once, `(N,)`.

    Args:
        values (`np.ndarray` of shape `(N,)`): what each sample is worth.
        scores (`np.ndarray` of shape `(N,)`): what it is picked by; equal scores share their ranks' weights.
    """
    order = np.argsort(-scores, kind="stable")
    _, group = np.unique(-scores[order], return_inverse=True)
    shared = np.bincount(group, values[order]) / np.bincount(group)
    return _rank_weights(len(scores)) @ shared[group]


@lru_cache(maxsize=8)
def _rank_weights(size: int) -> np.ndarray:
    """Row k - 1, column r: the chance that the sample of rank r (0 = best) is the best of k drawn from `size`."""
    k, rank = np.arange(1, size + 1)[:, None], np.arange(size)[None, :]
    left = size - 1 - rank  # samples that rank behind
    possible = left >= k - 1
    log = gammaln(left + 1) - gammaln(k) - gammaln(np.where(possible, left - k + 2, 1))
    log = log - gammaln(size + 1) + gammaln(k + 1) + gammaln(size - k + 1)
    return np.where(possible, np.exp(log), 0.0)


def predicted_n(ordered: Sequence[np.ndarray], limit: int) -> float:
    """
    The n at which the expected gold reward of best-of-n is highest, by the root of its derivative (see above).

    Args:
        ordered (`Sequence[np.ndarray]`): for each prompt the gold rewards of its samples, the lowest score first.
        limit (`int`): the largest n to consider; where the gold reward still rises there, it is the result.

    Returns:
        `float`: from 1 to `limit`, NaN without samples.
    """
    if not len(ordered):
        return math.nan
    weights, ends, starts_at = [], [], []
    for size in sorted({len(gold) for gold in ordered}):  # prompts with equally many samples share their quantiles
        weights.append(np.sum([gold for gold in ordered if len(gold) == size], axis=0) / len(ordered))
        ends.append(np.log(np.arange(1, size + 1) / size))
        starts_at.append(np.r_[-math.inf, ends[-1][:-1]])
    weight, log, before = (np.concatenate(parts) for parts in (weights, ends, starts_at))
    starts = ~np.isfinite(before)  # the quantile 0, whose powers are 0

    def value(n: float) -> float:
        return float((weight * (np.exp(n * log) - np.where(starts, 0.0, np.exp(n * before)))).sum())

    def slope(n: float) -> float:
        back = np.where(starts, 0.0, np.exp(n * before) * np.where(starts, 0.0, before))
        return float((weight * (np.exp(n * log) * log - back)).sum())

    grid = np.geomspace(1, max(limit, 1), 64)
    best = int(np.argmax([value(n) for n in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    if slope(low) > 0 > slope(high):
        return float(brentq(slope, low, high))
    return float(grid[best])


def _counts(most: int) -> list[int]:
    """1, 2, 4 ... and the largest n itself."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
