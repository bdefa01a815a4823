"""Where a row or a candidate stands in the file, and what that has to do with its score."""

import math

import numpy as np
import pytest

from tests.evaluation.rows import by_text
from trl_ext.evaluation import evaluate_reward_model
from trl_ext.evaluation.families.places import Places


def groups(push, seed=0, number=150, size=5):
    """Scores that follow the ratings with noise, and the place by `push`."""
    generator = np.random.default_rng(seed)
    for _ in range(number):
        ratings = generator.permutation(size).astype(float)
        yield ratings + push * np.arange(size) + generator.normal(size=size), ratings


def test_the_partial_correlation_is_that_of_residuals():
    places, residuals = Places(), []
    for scores, ratings in groups(0.4):
        places.add(scores, ratings)
        residuals.append([values - values.mean() for values in (scores, ratings, np.arange(len(scores)))])
    score, rating, place = (np.concatenate(column) for column in zip(*residuals, strict=True))
    left = [values - rating * (values @ rating) / (rating @ rating) for values in (score, place)]
    assert places.correlation(np.arange(150)) == pytest.approx(np.corrcoef(*left)[0, 1])


@pytest.mark.parametrize("push", [0.0, 0.5])
def test_a_score_that_follows_the_place_is_flagged(push):
    rows = [
        {"prompt": f"p{n}", "completions": [f"{score} x" for score in scores], "ratings": ratings.tolist()}
        for n, (scores, ratings) in enumerate(groups(push))
    ]
    report = evaluate_reward_model(by_text, rows, probes=False, resamples=200)
    low, high = report.intervals["position_correlation"]
    assert ("position_bias" in report.flags) == (push > 0)
    assert low > 0.3 if push else low < 0 < high


def test_where_the_file_is_in_the_order_of_the_ratings_nothing_can_be_said():
    rows = [{"prompt": f"p{n}", "completions": [f"{3 - n % 2} x", "1 y", "0 z"], "ranks": [0, 1, 2]} for n in range(8)]
    report = evaluate_reward_model(by_text, rows, probes=False, resamples=50)
    assert math.isnan(report.metrics["position_correlation"])
    assert "not defined" in report.reasons["position_correlation"]


def test_samples_of_a_policy_have_places_too():
    rows = [{"prompt": f"p{n}", "completions": [f"{k + n % 3} x" for k in range(4)]} for n in range(20)]
    assert evaluate_reward_model(by_text, rows, probes=False, resamples=50).metrics[
        "position_correlation"
    ] == pytest.approx(1.0)


def pairs(accuracy, number=400, subset=None):
    generator = np.random.default_rng(0)
    rows = []
    for n in range(number):
        right = generator.random() < accuracy(n / number)
        row = {"prompt": f"p{n}", "chosen": "1 x" if right else "0 x", "rejected": "0.5 y"}
        rows.append(row if subset is None else row | {"subset": subset(n)})
    return rows


def test_accuracy_that_falls_along_the_file_is_flagged():
    report = evaluate_reward_model(by_text, pairs(lambda place: 0.9 - 0.4 * place), probes=False, resamples=200)
    low, high = report.intervals["accuracy_drift"]
    assert low < -0.4 < high < 0
    assert "accuracy_drift" in report.flags
    report = evaluate_reward_model(by_text, pairs(lambda place: 0.7), probes=False, resamples=200)
    assert "accuracy_drift" not in report.flags


def test_subsets_of_other_difficulty_are_no_drift():
    rows = pairs(lambda place: 0.95 if place < 0.5 else 0.55, subset=lambda n: "easy" if n < 200 else "hard")
    report = evaluate_reward_model(by_text, rows, probes=False, resamples=200)
    assert abs(report.metrics["accuracy_drift"]) < 0.2
    assert "accuracy_drift" not in report.flags
