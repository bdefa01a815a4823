"""How well a judge agrees with people: accuracy, Cohen's kappa and calibration on pairs that people decided.

It knows probabilities and orders of pairs. It knows nothing of judges, texts or data sets.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import logit

from trl_ext.evaluation.families.calibration import Calibrations
from trl_ext.evaluation.measures import Measure, Units, calibration_error, reliability


_SMALLEST = 1e-12  # a probability nearer to 0 or 1 has the log-odds of this one


class Agreement:
    """
    Collects pairs that a person and a judge decided.

    Every probability is that of the completion which the person prefers, so the judge is right above 1/2. A tie of the
    judge counts half in the accuracy.
    """

    def __init__(self) -> None:
        self._units = Units()

    def __len__(self) -> int:
        return len(self._units)

    def add(
        self,
        row: int,
        cluster: Hashable,
        preference: float,
        probability: float | None = None,
        orders: Sequence[float] = (),
    ) -> None:
        """
        Add one pair.

        Args:
            row (`int`): index of its row.
            cluster (`Hashable`): pairs of one cluster are not independent, e.g. those of one prompt.
            preference (`float`): above 0 if the judge prefers the same completion, 0 for a tie, else below 0.
            probability (`float`, *optional*): that the person's completion is better, in [0, 1]; `None` if unknown.
            orders (sequence of `float`, *optional*): the probabilities in each order that was asked, before averaging.
        """
        right = 0.5 + 0.5 * np.sign(preference)
        alone = np.mean([0.5 + 0.5 * np.sign(one - 0.5) for one in orders]) if len(orders) == 2 else math.nan
        chance = math.nan if probability is None else probability
        self._units.add(row, cluster, None, accuracy=right, accuracy_one_order=alone, probability=chance)

    def measures(self) -> Iterator[Measure]:
        """
        `accuracy`, `kappa`, and, if they are known, `accuracy_one_order`, `ece`, `brier` and calibrations.

        `accuracy_one_order` is the accuracy of a judge that is asked in only one order, drawn at random. `ece`
        compares the confidence max(p, 1 - p) with the share of right pairs.
        """
        if not len(self):
            return
        right, chances = self._units.array("accuracy"), self._units.array("probability")
        yield self._units.mean("accuracy")
        if np.isin(right, (0.0, 1.0)).all():  # without ties it is a mean, whose interval is computed quickly
            yield Measure("kappa", values=2 * right - 1, clusters=self._units.clusters, proportion=False)
        else:
            yield self._units.computed("kappa", lambda drawn: preference_kappa(right[drawn]))
        if np.isfinite(self._units.array("accuracy_one_order")).any():
            yield self._units.mean("accuracy_one_order")
        if not np.isfinite(chances).all():
            return
        sure = np.maximum(chances, 1 - chances)
        yield self._units.computed("ece", lambda drawn: calibration_error(sure[drawn], right[drawn]))
        yield Measure("brier", values=(1 - chances) ** 2, clusters=self._units.clusters)
        margins = logit(np.clip(chances, _SMALLEST, 1 - _SMALLEST))
        yield from Calibrations(margins, None, self._units.clusters).measures()

    def by_confidence(self) -> list[dict[str, float]]:
        """Accuracy in each tenth of the confidence max(p, 1 - p); empty where the judge gives no probabilities."""
        right, chances = self._units.array("accuracy"), self._units.array("probability")
        if not len(self) or not np.isfinite(chances).all():
            return []
        return reliability(np.maximum(chances, 1 - chances), right)


def cohens_kappa(first: Sequence[Any], second: Sequence[Any]) -> float:
    r"""
    Agreement of two raters beyond chance: \\( (p_o - p_e) / (1 - p_e) \\).

    See *A Coefficient of Agreement for Nominal Scales* by J. Cohen (https://doi.org/10.1177/001316446002000104).

    Args:
        first, second (sequences of length `N`): the category that each rater gives to each unit.

    Returns:
        `float`: 1 for full agreement, 0 for as much as chance gives; NaN if there is no unit, or both raters give all
        units one and the same category.

    Example:

    >>> cohens_kappa(["a", "a", "b", "b"], ["a", "a", "b", "a"])
    0.5
    """
    _, codes = np.unique(np.concatenate([np.asarray(first), np.asarray(second)]), return_inverse=True)
    one, other = np.split(codes, 2)
    if not len(one):
        return math.nan
    size = codes.max() + 1
    by_chance = float(np.bincount(one, minlength=size) @ np.bincount(other, minlength=size)) / len(one) ** 2
    return math.nan if by_chance == 1 else float((np.mean(one == other) - by_chance) / (1 - by_chance))


def preference_kappa(right: np.ndarray) -> float:
    """
    Cohen's kappa of preferences. Pairs have no order of their own, so each counts in both orders.

    Args:
        right (`np.ndarray` of shape `(N,)`): 1 where both prefer the same completion, 0 where not, 1/2 for a tie of
            the judge.

    Returns:
        `float`: 2 * accuracy - 1 if the judge has no ties.
    """
    verdicts = np.sign(right - 0.5)
    people = np.ones(len(verdicts))
    return cohens_kappa(np.concatenate([people, -people]), np.concatenate([verdicts, -verdicts]))
