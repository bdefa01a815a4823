"""Numbers of ranked, outcome, best-of-n and sample rows, against scikit-learn, scipy and arithmetic by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tests.evaluation.rows import by_text
from trl_ext.evaluation import evaluate_reward_model
from trl_ext.evaluation.families.best_of_n import best_of_each, predicted_n
from trl_ext.evaluation.families.comparisons import length_controlled_accuracy
from trl_ext.evaluation.measures import auc, calibration_error
from trl_ext.metrics.ranking import pair_accuracy
from trl_ext.metrics.voting import best_of_k


def evaluate(rows, model=by_text, **kwargs):
    return evaluate_reward_model(model, rows, **({"probes": False, "resamples": 100} | kwargs))


def test_ranked_rows_equal_scipy_and_scikit_learn():
    metrics_of = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    rows, taus, gains, tops, shares = [], [], [], [], []
    for number in range(60):
        size = int(generator.integers(2, 7))
        ratings, scores = generator.integers(0, 4, size).astype(float), generator.normal(size=size).round(2)
        rows.append({"prompt": f"p{number}", "completions": [f"{s} x" for s in scores], "ratings": ratings.tolist()})
        if len(set(ratings)) > 1:
            taus.append(stats.kendalltau(scores, ratings).statistic)
            gains.append(metrics_of.ndcg_score([ratings], [scores]))
            tops.append(ratings[scores.argmax()] == ratings.max())
            group = (torch.tensor(scores)[None], torch.tensor(ratings)[None], torch.ones(1, size, dtype=torch.bool))
            shares.append(pair_accuracy(*group).item())
    metrics = evaluate(rows).metrics
    assert metrics["kendall_tau"] == pytest.approx(np.mean(taus), abs=1e-6)
    assert metrics["ndcg"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert metrics["top1"] == pytest.approx(np.mean(tops))
    assert metrics["pair_accuracy"] == pytest.approx(np.mean(shares))


def test_ranks_are_turned_round_and_all_ties_are_told():
    rows = [
        {"prompt": "a", "completions": ["2", "1"], "ranks": [0, 1]},
        {"prompt": "b", "completions": ["1", "2"], "ranks": [0, 1]},
    ]
    assert evaluate(rows).metrics["accuracy"] == 0.5
    tied = [{"prompt": str(n), "completions": ["2", "1"], "ratings": [1, 1]} for n in range(3)]
    report = evaluate(tied)
    assert math.isnan(report.metrics["accuracy"])
    assert report.reasons["accuracy"] == "no unit has a value"


def test_outcomes_equal_scikit_learn():
    metrics_of = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300)
    chances = np.clip(generator.normal(0.4 + 0.2 * labels, 0.2), 0.01, 0.99).round(2)
    rows = [
        {"prompt": f"p{n // 3}", "completion": f"{c} text", "label": bool(label)}
        for n, (c, label) in enumerate(zip(chances, labels, strict=True))
    ]
    metrics = evaluate(rows).metrics
    assert metrics["auc"] == pytest.approx(metrics_of.roc_auc_score(labels, chances))
    assert metrics["brier"] == pytest.approx(metrics_of.brier_score_loss(labels, chances))
    assert metrics["base_rate"] == pytest.approx(labels.mean())
    within = [
        metrics_of.roc_auc_score(labels[s : s + 3], chances[s : s + 3])
        for s in range(0, 300, 3)
        if 0 < labels[s : s + 3].sum() < 3
    ]
    assert metrics["within_prompt_auc"] == pytest.approx(np.mean(within))


def test_mistakes_of_outcomes_are_ranked_as_their_scores_are_read():
    scores = {n: 0.8 if n % 2 == 0 else 0.1 for n in range(40)} | {0: 0.02}  # even rows are right solutions

    def mistakes():
        rows = [{"prompt": f"p{n}", "completion": f"{scores[n]} x", "label": n % 2 == 0} for n in range(40)]
        report = evaluate(rows)
        return report.metrics["accuracy"], {mistake.row: mistake.margin for mistake in report.mistakes}

    # all scores are in [0, 1]: probabilities
    assert mistakes() == (0.975, {0: pytest.approx(-0.48)})
    # the last score alone says that they are log-odds, and every wrong solution is above 0
    scores[39] = 1.5
    accuracy, found = mistakes()
    assert accuracy == 0.5 and list(found) == [39, *range(1, 39, 2)]
    assert found[39] == pytest.approx(0.5 - 1 / (1 + math.exp(-1.5)))
    assert found[1] == pytest.approx(0.5 - 1 / (1 + math.exp(-0.1)))


def test_calibration_error_by_hand():
    chances, labels = np.array([0.95, 0.95, 0.15, 0.15]), np.array([1.0, 0.0, 0.0, 0.0])
    assert calibration_error(chances, labels, bins=10) == pytest.approx((2 * 0.45 + 2 * 0.15) / 4)
    assert math.isnan(auc(np.array([1.0, 2.0]), np.array([1.0, 1.0])))


def test_the_length_controlled_accuracy_of_a_length_model_is_chance():
    generator = np.random.default_rng(0)
    longer = generator.normal(0.5, 1.0, size=4_000)  # chosen completions are longer
    assert (longer > 0).mean() > 0.65
    noise = generator.normal(scale=1e-3, size=4_000)
    assert length_controlled_accuracy(2 * longer + noise, longer) == pytest.approx(0.5, abs=0.03)
    good = generator.normal(1.0, 1.0, size=4_000)
    assert length_controlled_accuracy(good, generator.normal(size=4_000)) == pytest.approx((good > 0).mean(), abs=0.01)


def test_a_model_of_length_is_called_one():
    generator = np.random.default_rng(0)
    rows = []
    for number in range(300):
        chosen = "word " * int(generator.integers(8, 30))
        rejected = "word " * int(generator.integers(4, 22))
        rows.append({"prompt": f"p{number}", "chosen": chosen, "rejected": rejected})
    report = evaluate(rows, lambda prompts, completions, **columns: [float(len(c)) for c in completions])
    assert "not_better_than_length" in report.flags
    assert "length_bias" in report.flags
    assert report.metrics["accuracy"] == pytest.approx(report.metrics["length_accuracy"])


def test_pairs_of_one_length_are_no_gain_of_length():
    rows = [{"prompt": f"p{n}", "chosen": f"{n % 10} x", "rejected": f"{8 * (n % 10 == 0)} x"} for n in range(200)]
    report = evaluate(rows)
    assert report.metrics["accuracy"] == 0.9
    assert report.metrics["length_accuracy"] == report.metrics["shorter_accuracy"] == 0.0
    assert "not_better_than_length" not in report.flags


def samples_with_hacking(prompts, n, peak, seed):
    """Gold reward that rises with the score's quantile up to `peak` and falls behind it."""
    generator = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        scores = generator.random(n)
        gold = 1 - np.abs(scores - peak) + generator.normal(scale=0.05, size=n)
        rows.append({"prompt": f"p{prompt}", "completions": [f"{s:.6f} x" for s in scores], "gold": gold.tolist()})
    return rows


def test_the_predicted_n_is_near_the_measured_one():
    report = evaluate(samples_with_hacking(300, 64, peak=0.9, seed=0))
    # the exact optimum of n -> E[1 - |u - 0.9|], u ~ Beta(n, 1)
    n = np.arange(1, 65)
    exact = 1 - (0.9 - n / (n + 1) + 2 * (n / (n + 1) - 0.9 + 0.9 ** (n + 1) / (n + 1)))
    for name in ("predicted_n", "best_n"):  # the curve is flat at its top: 12 to 19 are within 0.001 of the best
        assert report.metrics[name] == pytest.approx(n[exact.argmax()], abs=3)
        assert exact[round(report.metrics[name]) - 1] > exact.max() - 0.001
    assert "over_optimisation" in report.flags


def test_all_n_at_once_equal_the_formula_for_one():
    generator = np.random.default_rng(0)
    values, scores = generator.normal(size=9), generator.integers(0, 4, size=9).astype(float)
    wanted = [best_of_k(values.tolist(), scores.tolist(), k) for k in range(1, 10)]
    assert best_of_each(values, scores) == pytest.approx(np.array(wanted))


def test_an_honest_score_is_not_hacked():
    report = evaluate(samples_with_hacking(100, 16, peak=1.0, seed=1))
    assert report.metrics["predicted_n"] == pytest.approx(16, abs=1)
    assert "over_optimisation" not in report.flags
    assert [point["n"] for point in report.curves["best_of_n"]] == [1, 2, 4, 8, 16]
    assert report.metrics["gold_at_16"] > report.metrics["gold_at_1"]
    assert math.isnan(predicted_n([], 4))
    six = evaluate(samples_with_hacking(20, 6, peak=1.0, seed=2))
    assert [point["n"] for point in six.curves["best_of_n"]] == [1, 2, 4, 6]
    assert six.metrics["gain"] == pytest.approx(six.metrics["gold_at_6"] - six.metrics["gold_at_1"])


def test_samples_without_spread_teach_nothing():
    rows = [{"prompt": f"p{n}", "completions": [f"{n} a", f"{n} b", f"{n} c"]} for n in range(20)]
    report = evaluate(rows)
    assert report.metrics["prompts_without_signal"] == 1.0
    assert report.metrics["within_prompt_variance_share"] == pytest.approx(0.0)
    assert report.metrics["at_ceiling"] == 1.0
    assert {"no_signal", "low_reward_variance"} <= set(report.flags)
    lively = [{"prompt": f"p{n}", "completions": ["1 a", "2 b", "3 c"]} for n in range(20)]
    metrics = evaluate(lively).metrics
    assert metrics["within_prompt_variance_share"] == pytest.approx(1.0)
    assert metrics["at_ceiling"] == 0.0
    half = [{"prompt": f"p{n}", "completions": ["1 a", "3 b", "3 c"]} for n in range(20)]
    assert evaluate(half).metrics["at_ceiling"] == 0.5


def test_samples_are_compared_with_the_data():
    pairs = [{"prompt": f"p{n}", "chosen": "2 alpha beta", "rejected": "1 alpha gamma"} for n in range(10)]
    same = [{"prompt": f"p{n}", "completions": ["2 alpha beta", "1 alpha gamma"]} for n in range(10)]
    other = [{"prompt": f"p{n}", "completions": ["3 delta epsilon zeta", "4 eta theta iota kappa"]} for n in range(10)]
    report = evaluate({"pairs": pairs, "same": same, "other": other})
    assert report.metrics["same/word_distance_to_pairs"] == pytest.approx(0.0)
    assert report.metrics["other/word_distance_to_pairs"] == pytest.approx(1.0)
    assert report.metrics["other/length_gap_to_pairs"] > 1
    assert report.metrics["pairs/accuracy"] == 1.0


def test_the_calibration_error_of_other_rows_falls():
    generator = np.random.default_rng(0)
    rows = []
    for number in range(1_200):
        margin = abs(generator.normal(scale=3.0))
        right = generator.random() < 1 / (1 + math.exp(-margin / 3))  # three times as sure as it may be
        rows.append({"prompt": f"p{number}", "chosen": f"{margin if right else -margin} x", "rejected": "0 y"})
    report = evaluate(rows)
    assert report.metrics["temperature"] == pytest.approx(3.0, rel=0.2)
    assert report.metrics["ece_before_calibration"] > 0.12
    for method in ("temperature", "isotonic"):
        assert report.metrics[f"ece_after_{method}"] < 0.06
        assert report.calibrations[method]["of"] == "pairs"
    assert "miscalibrated" in report.flags
    outcomes = [{"prompt": f"p{n}", "completion": row["chosen"], "label": n % 3 > 0} for n, row in enumerate(rows)]
    assert evaluate(outcomes).calibrations["isotonic"]["of"] == "outcomes"


@pytest.mark.parametrize("changed", [{"calibrated": True}, {"reference": 0.0}, {"std_coefficient": 0.5}])
def test_scores_that_are_not_the_models_own_give_no_calibration_to_store(changed):
    rows = [{"prompt": f"p{n}", "chosen": f"{n % 5} x", "rejected": "1 y"} for n in range(200)]

    class Scorer:
        def __call__(self, prompts, completions, **columns):
            return by_text(prompts, completions)

    scorer = Scorer()
    assert set(evaluate(rows, scorer).calibrations) == {"temperature", "isotonic"}
    vars(scorer).update(changed)
    assert evaluate(rows, scorer).calibrations == {}
