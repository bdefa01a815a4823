"""Step aggregators: hand-computed tables, every step counts, exact 0 and 1, what length does, and errors."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_ext.scoring.aggregation import aggregators, count_correct, weighted_categories


NAMES = ["count_correct", "last", "max", "mean", "min", "prod", "sum", "sum_log"]

# Step probabilities, and by hand what each aggregator makes of them.
TABLE = [
    (
        [0.5, 0.8, 0.25],
        {"min": 0.25, "max": 0.8, "last": 0.25, "mean": 1.55 / 3, "sum": 1.55, "prod": 0.1},
        {"sum_log": -2.302585092994046, "count_correct": 1.0},
    ),
    (
        [1.0, 0.9, 1.0, 0.6],
        {"min": 0.6, "max": 1.0, "last": 0.6, "mean": 0.875, "sum": 3.5, "prod": 0.54},
        {"sum_log": -0.616186139423817, "count_correct": 4.0},
    ),
    (
        [0.0, 1.0],
        {"min": 0.0, "max": 1.0, "last": 1.0, "mean": 0.5, "sum": 1.0, "prod": 0.0},
        {"sum_log": -math.inf, "count_correct": 1.0},
    ),
    (
        [1.0, 1.0, 1.0],
        {"min": 1.0, "max": 1.0, "last": 1.0, "mean": 1.0, "sum": 3.0, "prod": 1.0},
        {"sum_log": 0.0, "count_correct": 3.0},
    ),
    (
        [0.3],
        {"min": 0.3, "max": 0.3, "last": 0.3, "mean": 0.3, "sum": 0.3, "prod": 0.3},
        {"sum_log": -1.203972804325936, "count_correct": 0.0},
    ),
]


@pytest.mark.parametrize(("scores", "plain", "logical"), TABLE)
def test_against_the_table(scores, plain, logical):
    wanted = {**plain, **logical}
    found = {name: aggregators.get(name)(scores) for name, _ in aggregators.available()}
    assert sorted(found) == NAMES
    assert found == pytest.approx(wanted, abs=1e-12)
    assert {type(value) for value in found.values()} == {float}


@pytest.mark.parametrize("name", NAMES)
def test_lists_tensors_and_generators_alike(name):
    aggregate, scores = aggregators.get(name), torch.tensor([0.5, 0.75, 0.25])
    wanted = aggregate([0.5, 0.75, 0.25])
    assert aggregate(scores) == aggregate(scores.tolist()) == aggregate(score for score in scores) == wanted
    assert aggregate(scores.bfloat16()) == wanted


def test_raw_scores():
    scores = [-2.0, 3.5, 1.0]
    found = {name: aggregators.get(name)(scores) for name in ("min", "max", "last", "mean", "sum")}
    assert found == pytest.approx({"min": -2.0, "max": 3.5, "last": 1.0, "mean": 2.5 / 3, "sum": 2.5})
    assert count_correct(scores, threshold=0.0) == 2.0


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_without_steps_has_no_score(name):
    assert aggregators.get(name)([]) is None
    assert aggregators.get(name)(torch.empty(0)) is None


@pytest.mark.parametrize("name", ["prod", "sum_log", "mean", "sum", "count_correct"])
@pytest.mark.parametrize("step", range(4))
def test_every_step_counts_zero_and_one_too(name, step):
    """Exchanging any one step of four for an exact 0 or 1 changes the result."""
    scores = [0.6, 0.7, 0.55, 0.9]
    with_zero = [*scores[:step], 0.0, *scores[step + 1 :]]
    results = [aggregators.get(name)(scores), aggregators.get(name)(with_zero)]
    assert results[1] < results[0]
    if name != "count_correct":
        assert aggregators.get(name)([*scores[:step], 1.0, *scores[step + 1 :]]) > results[0]


def test_nothing_is_added_to_a_probability():
    assert aggregators.get("prod")([0.0, 0.5]) == 0.0
    assert aggregators.get("sum_log")([0.0, 0.5]) == -math.inf
    assert aggregators.get("sum_log")([1e-30]) == math.log(1e-30)
    assert aggregators.get("sum_log")([1.0] * 1000) == 0.0
    tiny = torch.tensor(-50.0).sigmoid()
    assert aggregators.get("sum_log")(tiny[None]) == pytest.approx(-50.0, rel=1e-6)


def test_a_threshold_is_to_be_exceeded():
    assert count_correct([0.5, 0.5000001, 0.4999999]) == 1.0
    assert count_correct([0.5, 0.8], threshold=0.8) == 0.0


def test_a_sum_of_rounded_probabilities_counts_as_one():
    assert aggregators.get("prod")([1.0000002, 0.5]) == 0.5
    assert aggregators.get("sum_log")([1.0000002]) == 0.0


# Length


def test_length_changes_prod_and_sum_log_but_not_the_others():
    """Equally good steps: ten of them are worse than two by prod and sum_log, better by sum and count_correct."""
    short, long = [0.9] * 2, [0.9] * 10
    found = {name: (aggregators.get(name)(short), aggregators.get(name)(long)) for name in NAMES}
    for name in ("min", "max", "mean", "last"):
        assert found[name][0] == pytest.approx(found[name][1])
    assert found["prod"] == pytest.approx((0.81, 0.3486784401))
    assert found["sum_log"] == pytest.approx((2 * math.log(0.9), 10 * math.log(0.9)))
    assert found["sum"] == pytest.approx((1.8, 9.0))
    assert found["count_correct"] == (2.0, 10.0)


def test_prod_prefers_two_poor_steps_to_many_good_ones():
    """What a policy can exploit: 0.81 for two steps of 0.9 beats 0.74 for thirty of 0.99."""
    for name in ("prod", "sum_log"):
        assert aggregators.get(name)([0.9, 0.9]) > aggregators.get(name)([0.99] * 30)
    for name in ("min", "mean", "last"):
        assert aggregators.get(name)([0.9, 0.9]) < aggregators.get(name)([0.99] * 30)


def test_sum_log_orders_as_prod_and_does_not_underflow():
    generator = torch.Generator().manual_seed(0)
    completions = [torch.rand(n, generator=generator).tolist() for n in (1, 2, 3, 5, 8, 13)]
    by_prod = sorted(completions, key=aggregators.get("prod"))
    assert by_prod == sorted(completions, key=aggregators.get("sum_log"))
    assert aggregators.get("prod")([0.1] * 400) == 0.0
    assert aggregators.get("sum_log")([0.1] * 400) == pytest.approx(400 * math.log(0.1))


# Categories


def test_weighted_categories_by_hand():
    segments = [{"relevance": 1.0, "factuality": -1.0}, {"relevance": 0.5}, {"completeness": 0.25}]
    weights = {"relevance": 0.3, "factuality": 0.5, "completeness": 2.0, "fluency": 7.0}
    assert weighted_categories(segments, weights) == pytest.approx(0.3 * 1.5 - 0.5 * 1.0 + 2.0 * 0.25)
    assert weighted_categories(segments) == pytest.approx(1.5 - 1.0 + 0.25)
    assert weighted_categories(segments, weights, within="mean") == pytest.approx(0.3 * 0.75 - 0.5 + 0.5)
    assert weighted_categories(segments, weights, within=max) == pytest.approx(0.3 * 1.0 - 0.5 + 0.5)
    assert weighted_categories(segments[:2], {"relevance": 0.3, "factuality": 0.5}) == pytest.approx(-0.05)
    assert weighted_categories([{"relevance": 0.5}, {"relevance": -2.0}]) == aggregators.get("sum")([0.5, -2.0])


def test_weighted_categories_without_scores():
    assert weighted_categories([]) is None
    assert weighted_categories([{}, {}], {"relevance": 1.0}) is None


def test_weighted_categories_errors():
    with pytest.raises(ValueError, match=r"categories \['factuality'\], which have no weight .*\['relevance'\]"):
        weighted_categories([{"relevance": 1.0, "factuality": 0.0}], {"relevance": 1.0})
    with pytest.raises(ValueError, match="weights must be finite, found {'relevance': nan}"):
        weighted_categories([{"relevance": 1.0}], {"relevance": math.nan})
    with pytest.raises(ValueError, match="Did you mean 'mean'"):
        weighted_categories([{"relevance": 1.0}], within="maen")


# Errors


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_score_that_is_not_finite(name, score):
    with pytest.raises(ValueError, match=rf"found {score} for step 1 of 3"):
        aggregators.get(name)([0.5, score, 0.5])


@pytest.mark.parametrize("score", [-0.1, 1.1])
@pytest.mark.parametrize("name", ["prod", "sum_log"])
def test_a_score_that_is_no_probability(name, score):
    with pytest.raises(ValueError, match=rf"`{name}` needs probabilities in \[0, 1\], found {score} for step 2 of 3"):
        aggregators.get(name)([0.5, 1.0, score])


def test_the_module_needs_no_torch():
    path = importlib.util.find_spec("trl_ext.scoring.aggregation").origin
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('aggregation', {path!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
