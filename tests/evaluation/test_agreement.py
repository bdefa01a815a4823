"""Agreement of a judge with people: kappa against scikit-learn, and numbers worked by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from trl_ext.evaluation.agreement import Agreement, cohens_kappa, preference_kappa


@pytest.mark.parametrize("categories", [2, 3, 5])
def test_kappa_is_that_of_scikit_learn(categories):
    draw = np.random.default_rng(categories)
    first = draw.integers(categories, size=200)
    second = np.where(draw.random(200) < 0.6, first, draw.integers(categories, size=200))
    assert cohens_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))


def test_kappa_without_units_or_variety_is_undefined():
    assert math.isnan(cohens_kappa([], [])) and math.isnan(cohens_kappa(["a", "a"], ["a", "a"]))
    assert cohens_kappa(["a", "b"], ["b", "a"]) == -1.0


def test_the_kappa_of_preferences_counts_pairs_in_both_orders():
    right = np.array([1.0, 1.0, 1.0, 0.0])
    assert preference_kappa(right) == pytest.approx(2 * right.mean() - 1)
    # one tie of four: observed 1/2, by chance (3/4) / 2
    assert preference_kappa(np.array([1.0, 1.0, 0.0, 0.5])) == pytest.approx((0.5 - 0.375) / (1 - 0.375))


def test_measures_by_hand():
    agreement = Agreement()
    for row, (chance, orders) in enumerate(
        [(0.9, (0.95, 0.8)), (0.8, (0.9, 0.4)), (0.3, (0.6, 0.1)), (0.5, (0.7, 0.3))]
    ):
        agreement.add(row, row, chance - 0.5, chance, orders)
    found = {one.name: one.estimate(0.95, 200, 0).value for one in agreement.measures()}
    assert found["accuracy"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["accuracy_one_order"] == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    assert found["brier"] == pytest.approx((0.01 + 0.04 + 0.49 + 0.25) / 4)
    assert found["ece"] == pytest.approx((abs(0.9 - 1) + abs(0.8 - 1) + abs(0.7 - 0) + abs(0.5 - 0.5)) / 4)
    assert [(one["confidence"], one["right"]) for one in agreement.by_confidence()][0] == (0.5, 0.5)


def test_without_probabilities_there_is_no_calibration():
    agreement = Agreement()
    agreement.add(0, 0, 1.0)
    agreement.add(1, 1, -2.0)
    found = list(agreement.measures())
    assert [one.name for one in found] == ["accuracy", "kappa"]
    assert found[1].estimate(0.95, 100, 0).value == 0.0 == preference_kappa(np.array([1.0, 0.0]))
    assert agreement.by_confidence() == [] == Agreement().by_confidence() and not list(Agreement().measures())
