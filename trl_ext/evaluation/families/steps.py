"""Metrics of stepwise rows: does a process model find the first wrong step?

A unit is a solution. ProcessBench's F1 needs a threshold on P(correct). `f1` chooses it on a validation part of the
prompts and counts the rest; public code that chooses it on the test file itself gets a higher number. `f1_at_half`
takes 0.5 for all rows, as ProcessBench's script for models of `TokenClassification` does. Scores that are margins and
no probabilities have the threshold 0 and no calibration error. This module knows scores and labels of steps, and
nothing of texts.
"""

import math
from collections.abc import Iterator

import numpy as np

from trl_ext.evaluation.items import Item
from trl_ext.evaluation.measures import Measure, Units, auc, calibration_error, part, reliability
from trl_ext.evaluation.statistics import Lists
from trl_ext.metrics.token import harmonic_mean


# The part of the prompts on which the threshold is chosen: our choice.
VALIDATION = 0.3
NEVER = -1


class Steps:
    """
    Collects P(correct) of the steps of solutions whose steps are labelled.

    Args:
        probabilities (`bool`): whether scores are that, and not margins that are above 0 where a step is called right.
    """

    def __init__(self, probabilities: bool = True):
        self.units = Units()
        self._are_probabilities, self._half = probabilities, 0.5 if probabilities else 0.0
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []
        self._known: dict[tuple[bool, int], tuple[np.ndarray, np.ndarray, Lists]] = {}

    def add(self, item: Item, scores: list[float]) -> float:
        """Take one scored row; returns how sure the model is on the wrong side, negative, of its worst step."""
        probabilities, labels = np.asarray(scores, dtype=float), np.asarray(item.ratings, dtype=float)
        wrong = np.flatnonzero(labels < 0.5)
        self.units.add(
            item.row,
            item.cluster,
            item.subset,
            first=float(wrong[0]) if len(wrong) else NEVER,
            monotone=float(not len(wrong) or not np.any(labels[wrong[0] :] > 0.5)),
        )
        self._steps.append((probabilities, labels))
        labelled = np.isfinite(labels)
        sure = np.where(labels > 0.5, probabilities - self._half, self._half - probabilities)
        return float(sure[labelled].min(initial=0.5))

    def measures(self) -> Iterator[Measure]:
        """Every number of these rows, with what its interval is drawn from."""
        units = self.units
        if not len(units):
            return
        held = np.array([part(cluster) < VALIDATION for cluster in units.clusters])
        tested = np.flatnonzero(~held)
        clusters = [units.clusters[unit] for unit in tested]
        threshold = self.best_threshold(np.flatnonzero(held))
        note = "chosen on other prompts than those of the F1"
        yield Measure("threshold", values=[threshold], size=int(held.sum()), note=note)
        first = units.array("first")
        found = self.first_below(threshold)
        hit = (found == first).astype(float)
        is_wrong = first != NEVER

        def f1(rows: np.ndarray, right: np.ndarray) -> float:
            parts = [right[rows][side] for side in (is_wrong[rows], ~is_wrong[rows])]
            return harmonic_mean(*(float(part.mean()) for part in parts)) if all(map(len, parts)) else math.nan

        yield Measure("accuracy", values=hit[tested], clusters=clusters)
        yield Measure("f1", function=lambda drawn: f1(tested[drawn], hit), size=len(tested), clusters=clusters)
        at_half = (self.first_below(self._half) == first).astype(float)
        yield units.computed("f1_at_half", lambda drawn: f1(drawn, at_half))
        for name, side in (("first_error_accuracy", is_wrong), ("no_error_accuracy", ~is_wrong)):
            yield Measure(name, values=np.where(side, hit, math.nan)[tested], clusters=clusters)
        yield units.computed("step_auc", lambda drawn: auc(*self.labelled(drawn, until_first=True)))
        if self._are_probabilities:
            yield units.computed("ece", lambda drawn: calibration_error(*self.labelled(drawn)))
        yield units.drift(np.where(held, math.nan, hit))
        if not units.array("monotone").all():  # PRMBench
            yield units.computed("prm_score", lambda drawn: prm_score(*self.labelled(drawn), self._half))

    def labelled(self, units: np.ndarray, until_first: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """
        Probabilities and labels of the labelled steps of these units, `(S,)` each.

        Args:
            units (`np.ndarray`): indices of solutions.
            until_first (`bool`, *optional*, defaults to `False`):
                Only steps up to the first wrong one. What follows an error is labelled by convention, and its place
                alone gives it away.
        """
        probabilities, labels, steps = self._flat(until_first)
        places = steps.places(units)
        return probabilities[places], labels[places]

    def _flat(self, until_first: bool) -> tuple[np.ndarray, np.ndarray, Lists]:
        """Probabilities and labels of all steps that count, one after the other, and how many each unit has."""
        known = self._known.get((until_first, len(self._steps)))
        if known is not None:
            return known
        probabilities, labels = [np.empty(0)], [np.empty(0)]
        for chances, given in self._steps:
            use = np.isfinite(given) & np.isfinite(chances)
            wrong = np.flatnonzero(given < 0.5)
            if until_first and len(wrong):
                use[wrong[0] + 1 :] = False
            probabilities.append(chances[use])
            labels.append(given[use])
        sizes = np.array([len(given) for given in labels[1:]], dtype=int)
        flat = (np.concatenate(probabilities), np.concatenate(labels), Lists(sizes))
        self._known[until_first, len(self._steps)] = flat
        return flat

    def first_below(self, threshold: float) -> np.ndarray:
        """Index of the first step with P(correct) < threshold in each solution, `-1` for none, `(N,)`."""
        below = [np.flatnonzero(chances < threshold) for chances, _ in self._steps]
        return np.array([found[0] if len(found) else NEVER for found in below], dtype=float)

    def best_threshold(self, units: np.ndarray) -> float:
        """The threshold with the highest F1 on these units; that of `f1_at_half` if all or none of them are wrong."""
        first = self.units.array("first")[units]
        if not len(units) or (first == NEVER).all() or not (first == NEVER).any():
            return self._half
        values = np.unique(np.concatenate([self._steps[unit][0] for unit in units]))
        candidates = np.unique(np.quantile(values, np.linspace(0.005, 0.995, 199)))
        scores = []
        for threshold in candidates:
            hit = self.first_below(threshold)[units] == first
            scores.append(harmonic_mean(float(hit[first != NEVER].mean()), float(hit[first == NEVER].mean())))
        return float(candidates[int(np.argmax(scores))])

    def reliability(self) -> list[dict[str, float]]:
        """Points of the reliability diagram of P(correct)."""
        probabilities, labels = self.labelled(np.arange(len(self.units)))
        return reliability(probabilities, labels) if len(labels) and self._are_probabilities else []


def prm_score(probabilities: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> float:
    """
    PRMBench's score: the mean of the F1 of right steps and the F1 of wrong steps.

    Labels need not be monotone: a step after a wrong one may be right. See *PRMBench* by M. Song et al.
    (https://huggingface.co/papers/2501.03124), section 3.3.

    Args:
        probabilities (`np.ndarray` of shape `(S,)`): P(correct) of steps.
        labels (`np.ndarray` of shape `(S,)`): 1 right, 0 wrong.
    """
    called, right = probabilities >= threshold, labels > 0.5
    scores = []
    for side in (True, False):
        both = ((called == side) & (right == side)).sum()
        whole = (called == side).sum() + (right == side).sum()
        scores.append(2 * both / whole if whole else 0.0)
    return float(np.mean(scores))
