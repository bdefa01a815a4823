"""Metrics of outcome rows: does the score tell right from wrong solutions, over all prompts and within each?

A unit is a solution. It knows scores and labels. Scores in [0, 1] are read as probabilities, others as log-odds.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from trl_ext.evaluation.families.calibration import Calibrations
from trl_ext.evaluation.items import Item, text_of
from trl_ext.evaluation.measures import Measure, Units, auc, calibration_error, correlation, reliability, sigmoid
from trl_ext.scoring.calibration import as_log_odds


class Outcomes:
    """Collects the scores of solutions that are right or wrong."""

    def __init__(self):
        self.units = Units()

    def add(self, item: Item, scores: list[float]) -> float:
        """Take one scored row; returns its score in the direction of its label. See `margin` for how wrong it is."""
        label = item.ratings[0]
        self.units.add(
            item.row,
            item.cluster,
            item.subset,
            score=scores[0],
            label=label,
            length=math.log1p(len(text_of(item.completions[0]))),
        )
        return scores[0] if label > 0.5 else -scores[0]

    def margin(self, item: Item, scores: list[float]) -> float:
        """How far P(right) is on the side of the row's label, in [-0.5, 0.5]; final after the last row."""
        score = np.array(scores[0], dtype=float)
        chance = float(score if self._are_probabilities() else sigmoid(score))
        return chance - 0.5 if item.ratings[0] > 0.5 else 0.5 - chance

    def probabilities(self) -> np.ndarray:
        """P(right) of every unit, `(N,)`."""
        scores = self.units.array("score")
        return scores if self._are_probabilities() else sigmoid(scores)

    def _are_probabilities(self) -> bool:
        scores = self.units.array("score")
        return bool(len(scores) and scores.min() >= 0 and scores.max() <= 1)

    def calibrations(self) -> dict[str, Any]:
        """Calibrations of scores by method, fitted on one half of the prompts."""
        return self._calibrations().found

    def _calibrations(self) -> Calibrations:
        scores, given = self.units.array("score"), self._are_probabilities()
        margins = as_log_odds(scores) if given else scores
        return Calibrations(margins, self.units.array("label"), self.units.clusters, probabilities=given)

    def measures(self) -> Iterator[Measure]:
        """Every number of these rows, with what its interval is drawn from."""
        units = self.units
        if not len(units):
            return
        scores, labels, lengths = (units.array(name) for name in ("score", "label", "length"))
        probabilities = self.probabilities()
        codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(units.clusters))}
        prompts = np.array([codes[cluster] for cluster in units.clusters])
        yield Measure("base_rate", values=labels, clusters=units.clusters)
        right = ((probabilities > 0.5) == (labels > 0.5)).astype(float)
        yield Measure("accuracy", values=right, clusters=units.clusters)
        yield units.computed("auc", lambda drawn: auc(scores[drawn], labels[drawn]))
        yield units.computed("length_auc", lambda drawn: auc(lengths[drawn], labels[drawn]))
        wins = within_prompt_wins(scores, labels, prompts)
        there = sorted(wins)
        names = list(codes)
        yield Measure(
            "within_prompt_auc", values=[wins[code] for code in there], clusters=[names[code] for code in there]
        )
        yield units.computed("ece", lambda drawn: calibration_error(probabilities[drawn], labels[drawn]))
        yield Measure("brier", values=(probabilities - labels) ** 2, clusters=units.clusters)
        yield units.computed("length_correlation", lambda drawn: correlation(scores[drawn], lengths[drawn]))
        yield units.drift(right)
        yield from self._calibrations().measures()

    def reliability(self) -> list[dict[str, float]]:
        """Points of the reliability diagram."""
        return reliability(self.probabilities(), self.units.array("label")) if len(self.units) else []


def within_prompt_wins(scores: np.ndarray, labels: np.ndarray, prompts: np.ndarray) -> dict[int, float]:
    """
    For each prompt with right and wrong solutions: the AUC within it.

    Args:
        scores, labels, prompts (`np.ndarray` of shape `(N,)`): of each solution its score, label and prompt number.

    Returns:
        `dict[int, float]`: by prompt number, in [0, 1]; prompts whose solutions are all right or all wrong are absent.
    """
    order = np.argsort(prompts, kind="stable")
    edges = np.flatnonzero(np.diff(prompts[order])) + 1
    found = {int(prompts[part[0]]): auc(scores[part], labels[part]) for part in np.split(order, edges) if len(part)}
    return {prompt: value for prompt, value in found.items() if math.isfinite(value)}
