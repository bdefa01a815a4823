"""Metrics of preference and ranked rows: who is ordered right, beside what length alone would order right.

A unit is a row: one prompt with its candidates. It knows scores, ratings and lengths of candidates, and nothing of the
models that gave them.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trl_ext.evaluation.families.benchmarks import (
    REWARDBENCH_2,
    is_rewardbench,
    rewardbench_sections,
    style_scores,
    tie_margins,
    ties_score,
)
from trl_ext.evaluation.families.calibration import Calibrations
from trl_ext.evaluation.families.places import Places
from trl_ext.evaluation.items import Item, text_of
from trl_ext.evaluation.measures import Measure, Units, calibration_error, reliability, sigmoid
from trl_ext.evaluation.statistics import Lists
from trl_ext.metrics.ranking import kendall_tau, ndcg, top1_agreement


# Two candidates count as equally long up to this ratio of their numbers of characters: our choice.
MATCHED = 1.1


class Comparisons:
    """
    Collects the scores of candidates whose order is known.

    Args:
        ranked (`bool`): whether rows are rankings (else one or more chosen against one or more rejected completions).
    """

    def __init__(self, ranked: bool):
        self.ranked = ranked
        self.units = Units()
        # RewardBench 2's subset Ties: by kind and prompt, the unit and its margins
        self._ties: dict[str, dict[str, tuple[int, dict[str, float]]]] = {"tied": {}, "ref": {}}
        # of every decided pair: score difference, difference of log lengths, unit
        self._pairs: list[tuple[float, float, int]] = []
        self._places = Places()

    def add(self, item: Item, scores: list[float]) -> float:
        """Take one scored row; returns its margin, which is below 0 where the row is ordered wrong."""
        scores_, ratings = np.asarray(scores), np.asarray(item.ratings)
        lengths = np.array([len(text_of(completion)) for completion in item.completions], dtype=float)
        better, worse = np.nonzero(ratings[:, None] > ratings[None, :])
        number = len(self.units)
        values: dict[str, float] = {}
        margin = math.nan
        if len(better):
            differences = scores_[better] - scores_[worse]
            margin = float(differences.mean()) if self.ranked else float(differences.min())
            longer = np.log1p(lengths[better]) - np.log1p(lengths[worse])
            self._pairs += [(d, x, number) for d, x in zip(differences.tolist(), longer.tolist(), strict=True)]
            matched = np.abs(longer) <= math.log(MATCHED)
            right = float((differences > 0).mean())
            values = self._styles(item, scores_, ratings) | {
                "accuracy": right if self.ranked else self._won(item, scores_, ratings),
                "pair_accuracy": right,
                "length_accuracy": float((longer > 0).mean()),
                "shorter_accuracy": float((longer < 0).mean()),
                "matched_length_accuracy": float((differences[matched] > 0).mean()) if matched.any() else math.nan,
                "tied_scores": float((differences == 0).mean()),
                "margin": float(differences.mean()),
            }
        if self.ranked:
            values |= _rank_metrics(scores_, ratings)
            self._places.add(scores_, ratings)
        self.units.add(item.row, item.cluster, item.subset, **values)
        return margin

    def _won(self, item: Item, scores: np.ndarray, ratings: np.ndarray) -> float:
        """1 where every chosen completion beats every rejected one; RewardBench 2 shares the credit of a tie."""
        chosen, rejected = scores[ratings > 0.5], scores[ratings <= 0.5]
        if item.subset is not None and item.subset.lower() == "ties":
            kind, _, prompt = str(item.columns.get("id", "")).partition(":")
            margins = tie_margins(chosen.tolist(), rejected.tolist())
            if kind in self._ties:
                self._ties[kind][prompt] = (len(self.units), margins)
            return margins["accurate"]
        if _is_style_matrix(item, ratings):
            return float((chosen[:, None] > rejected[None, :]).mean())
        if item.subset in REWARDBENCH_2 and len(chosen) == 1 and len(rejected) > 1:
            best = scores == scores.max()
            return float(best[0] / best.sum())
        return float(chosen.min() > rejected.max())

    def _styles(self, item: Item, scores: np.ndarray, ratings: np.ndarray) -> dict[str, float]:
        if not _is_style_matrix(item, ratings):
            return {}
        styles = style_scores(scores[:3, None] > scores[None, 3:])
        return {f"rm_bench/{name}": value for name, value in styles.items()}

    def measures(self) -> Iterator[Measure]:
        """Every number of these rows, with what its interval is drawn from."""
        units = self.units
        yield units.mean("accuracy")
        names = ["pair_accuracy", "length_accuracy", "shorter_accuracy", "matched_length_accuracy"]
        names += ["tied_scores", "margin"]
        names = (["kendall_tau", "ndcg", "top1"] if self.ranked else []) + names
        yield from (units.mean(name, proportion=name not in ("kendall_tau", "margin")) for name in names)
        yield from units.by_subset("accuracy", "accuracy")
        if not self._pairs:
            return
        differences, longer, unit = (np.asarray(column) for column in zip(*self._pairs, strict=True))
        pairs = Lists(np.bincount(unit, minlength=len(units)))

        def of_pairs(function, *columns):
            """A number of the drawn units' pairs, computed from these columns of all pairs."""

            def read(drawn: np.ndarray) -> float:
                places = pairs.places(drawn)
                return function(*(column[places] for column in columns))

            return read

        yield units.drift(units.array("accuracy"))
        if self.ranked:
            yield units.computed("position_correlation", self._places.correlation)
        yield units.computed("length_correlation", of_pairs(_symmetric_correlation, differences, longer))
        controlled = of_pairs(length_controlled_accuracy, differences, longer)
        yield units.computed("length_controlled_accuracy", controlled)
        if not self.ranked:
            confidence, right = sigmoid(np.abs(differences)), (differences > 0).astype(float)
            yield units.computed("ece", of_pairs(calibration_error, confidence, right))
            yield units.computed("brier", of_pairs(np.mean, (1 - sigmoid(differences)) ** 2))
            yield from self._calibrations().measures()
            yield from self._benchmark_measures()

    def calibrations(self) -> dict[str, Any]:
        """Calibrations of score differences by method, fitted on one half of the prompts."""
        return {} if self.ranked or not self._pairs else self._calibrations().found

    def _calibrations(self) -> Calibrations:
        margins = np.array([pair[0] for pair in self._pairs])
        return Calibrations(margins, None, [self.units.clusters[pair[2]] for pair in self._pairs])

    def _benchmark_measures(self) -> Iterator[Measure]:
        units = self.units
        subsets = [subset for subset in dict.fromkeys(units.subsets) if subset is not None]
        place, accuracy = {subset: code for code, subset in enumerate(subsets)}, units.array("accuracy")
        codes = np.array([place.get(subset, -1) for subset in units.subsets])
        counts = (codes >= 0) & np.isfinite(accuracy)

        def means(drawn: np.ndarray) -> dict[str, float]:
            """The accuracy of every subset that has a row among the drawn ones."""
            rows = drawn[counts[drawn]]
            sizes = np.bincount(codes[rows], minlength=len(subsets))
            sums = np.bincount(codes[rows], accuracy[rows], len(subsets))
            return {subset: sums[code] / sizes[code] for subset, code in place.items() if sizes[code]}

        if is_rewardbench(subsets):
            for name in rewardbench_sections(dict.fromkeys(subsets, 0.0)):
                yield units.computed(
                    f"section/{name}", lambda drawn, name=name: rewardbench_sections(means(drawn)).get(name, math.nan)
                )
        yield from (units.mean(name) for name in units.columns if name.startswith("rm_bench/"))
        # the units of tied prompts whose reference prompt is there
        tied = {unit: prompt for prompt, (unit, _) in self._ties["tied"].items() if prompt in self._ties["ref"]}
        if not tied:
            return

        def ties(drawn: np.ndarray) -> float:
            prompts = [tied[unit] for unit in drawn.tolist() if unit in tied]
            return ties_score(*([self._ties[kind][prompt][1] for prompt in prompts] for kind in ("tied", "ref")))

        yield units.computed("ties_score", ties)
        if set(subsets) == set(REWARDBENCH_2):

            def overall(drawn: np.ndarray) -> float:
                scores = means(drawn) | {"Ties": ties(drawn)}
                return sum(scores.values()) / len(scores) if len(scores) == len(REWARDBENCH_2) else math.nan

            yield units.computed("section/rewardbench_2", overall)

    def reliability(self) -> list[dict[str, float]]:
        """Points of the reliability diagram of sigmoid(score difference)."""
        differences = np.array([pair[0] for pair in self._pairs])
        return reliability(sigmoid(np.abs(differences)), (differences > 0).astype(float)) if len(differences) else []


def _is_style_matrix(item: Item, ratings: np.ndarray) -> bool:
    """RM-Bench: three styles of the chosen and three of the rejected answer."""
    return "domain" in item.columns and len(ratings) == 6 and ratings.sum() == 3


def length_controlled_accuracy(differences: np.ndarray, longer: np.ndarray) -> float:
    r"""
    Pair accuracy of what is left of the score when its linear dependence on length is taken out.

    The slope \\( b = \sum d x / \sum x^2 \\) is that of score differences d on differences of log length x over the
    pairs, in both orders, so that it does not depend on which completion was preferred; a pair counts as right where
    \\( d - b x > 0 \\). A model whose accuracy is the length's own falls to about one half.

    Args:
        differences (`np.ndarray` of shape `(P,)`): score of the better less that of the worse completion.
        longer (`np.ndarray` of shape `(P,)`): log length of the better less that of the worse completion.
    """
    square = float((longer**2).sum())
    slope = float((differences * longer).sum()) / square if square else 0.0
    return float((differences - slope * longer > 0).mean()) if len(differences) else math.nan


def _symmetric_correlation(differences: np.ndarray, longer: np.ndarray) -> float:
    """Correlation of score and log length within pairs; each pair counts in both orders, so both means are 0."""
    spread = math.sqrt(float(differences @ differences) * float(longer @ longer))
    return float(differences @ longer) / spread if len(differences) > 1 and spread else math.nan


def _rank_metrics(scores: np.ndarray, ratings: np.ndarray) -> dict[str, float]:
    group = (torch.tensor(scores)[None], torch.tensor(ratings)[None], torch.ones(1, len(scores), dtype=torch.bool))
    functions = {"kendall_tau": kendall_tau, "ndcg": ndcg, "top1": top1_agreement}
    return {name: function(*group).item() for name, function in functions.items()}
