"""Intervals, paired tests and detectable effects, against theory and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from trl_ext.evaluation.statistics import (
    adjust,
    detectable_effect,
    function_estimate,
    mean_estimate,
    paired_test,
    sign_flip_p_value,
)


def test_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(1.0, 2.0, size=2_000)
    estimate = mean_estimate(values)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.interval == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.01)
    assert estimate.detectable == pytest.approx(2.8016 * error, rel=0.05)


def test_what_shares_a_cluster_widens_the_interval():
    once = np.random.default_rng(0).normal(size=100)
    values, clusters = np.repeat(once, 25), np.repeat(np.arange(100), 25)
    width = lambda estimate: np.ptp(estimate.interval)  # noqa: E731
    assert width(mean_estimate(values, clusters)) == pytest.approx(width(mean_estimate(once)), rel=0.15)
    assert width(mean_estimate(values)) < width(mean_estimate(values, clusters)) / 3


def test_coverage_of_the_interval_of_a_share():
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        low, high = mean_estimate((generator.random(150) < 0.7).astype(float), resamples=400).interval
        inside += low <= 0.7 <= high
    assert 0.9 <= inside / 200 <= 0.99


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_gets_wilsons_interval(value):
    estimate = mean_estimate([value] * 20)
    wanted = stats.binomtest(int(20 * value), 20).proportion_ci(method="wilson")
    assert estimate.interval == pytest.approx((wanted.low, wanted.high))


@pytest.mark.parametrize(
    ("values", "clusters", "reason"),
    [
        ([], None, "no unit has a value"),
        ([math.nan, math.nan], None, "no unit has a value"),
        ([0.3], None, "at least two independent prompts"),
        ([0.3, 0.4], ["a", "a"], "at least two independent prompts"),
        ([0.3, 0.3], None, "all 2 values are 0.3"),
    ],
)
def test_where_there_is_no_interval_it_says_why(values, clusters, reason):
    estimate = mean_estimate(values, clusters)
    assert estimate.interval is None
    assert reason in estimate.reason


def test_a_function_of_units_has_the_interval_of_its_mean():
    values = np.random.default_rng(0).random(300)
    by_function = function_estimate(lambda units: values[units].mean(), 300, resamples=2_000)
    assert by_function.value == pytest.approx(values.mean())
    assert by_function.interval == pytest.approx(mean_estimate(values).interval, abs=0.005)
    undefined = function_estimate(lambda units: math.nan, 5)
    assert math.isnan(undefined.value)
    assert "not defined" in undefined.reason


def test_paired_test_agrees_with_the_t_test_and_pairs_rows():
    generator = np.random.default_rng(0)
    common = generator.normal(0, 5, size=400)
    first, second = common + generator.normal(0.12, 1, size=400), common + generator.normal(0, 1, size=400)
    test = paired_test(first, second)
    assert test.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.02)
    assert paired_test(first, first).p_value == 1.0
    assert math.isnan(paired_test([1.0], [0.0]).p_value)
    with pytest.raises(ValueError, match="found 2 and 1 values"):
        paired_test([1.0, 2.0], [1.0])


def test_paired_test_flips_whole_clusters():
    # one prompt with 50 equal differences is one observation
    assert paired_test([1.0] * 50 + [0.0], [0.0] * 51, ["a"] * 50 + ["b"]).p_value == 1.0


@pytest.mark.parametrize("count", [2, 10, 40])
def test_sign_flips_equal_scipys(count):
    sums = np.random.default_rng(count).normal(0.3, 1, size=count)
    theirs = stats.permutation_test(
        (sums,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", vectorized=True, rng=1
    )
    assert sign_flip_p_value(sums) == pytest.approx(theirs.pvalue, abs=1e-9 if count <= 12 else 0.015)


def test_detectable_effect_is_found_with_the_power_that_it_claims():
    generator = np.random.default_rng(2)
    error = 1 / math.sqrt(100)
    effect = detectable_effect(error)
    found = [abs(generator.normal(effect, 1, size=100).mean()) > 1.96 * error for _ in range(2_000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_adjusted_p_values():
    assert adjust([0.01, 0.02, 0.5], "holm") == pytest.approx([0.03, 0.04, 0.5])
    assert adjust([0.5, 0.01, math.nan, 0.02], "holm")[:2] == pytest.approx([0.5, 0.03])
    assert math.isnan(adjust([0.5, math.nan])[1])
    given = [0.001, 0.02, 0.03, 0.9]
    assert adjust(given) == pytest.approx(stats.false_discovery_control(given, method="by"))
    with pytest.raises(ValueError, match="holm"):
        adjust([0.1], "bonferroni")
