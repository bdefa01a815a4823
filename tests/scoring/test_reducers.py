"""Reducers and learned weights against numbers worked by hand, an independent reference, and invariances."""

import builtins
import math
import statistics

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_expit

from trl_ext.scoring.fusion import fit_fusion_weights
from trl_ext.scoring.reducers import combine, disagreement, reducers, takes_weights


SCORES = torch.tensor([[1.0, 3.0, 8.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
# deviations from 3: -2, 0, 5, -3; population variance 38 / 4
BY_HAND = {
    "mean": [3.0, 2.0],
    "min": [0.0, 2.0],
    "median": [2.0, 2.0],
    "mean_minus_std": [3.0 - math.sqrt(9.5), 2.0],
    "mean_minus_var": [3.0 - 0.5 * 9.5, 2.0],
}
NAMES = sorted(name for name, origin in reducers.available() if origin.startswith("trl_ext"))


def arguments(name, size):
    return {"weights": torch.arange(1.0, size + 1, dtype=torch.float64)} if takes_weights(reducers.get(name)) else {}


def test_the_names():
    assert set(NAMES) == {*BY_HAND, "weighted", "fusion"}
    assert [name for name in NAMES if takes_weights(reducers.get(name))] == ["fusion", "weighted"]


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    assert reducers.get(name)(SCORES).tolist() == pytest.approx(BY_HAND[name])


@pytest.mark.parametrize("name", ["weighted", "fusion"])
def test_weights_are_used_as_they_are(name):
    weights = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    assert reducers.get(name)(SCORES, weights=weights).tolist() == pytest.approx([-2.5, 3.0])


def test_variance_and_deviation_are_those_of_the_population():
    values = [0.3, 1.7, -2.0]
    scores = torch.tensor([values], dtype=torch.float64)
    assert disagreement(scores).item() == pytest.approx(statistics.pstdev(values))
    mean = statistics.fmean(values)
    for coefficient in (0.0, 0.1, 2.0):
        found = reducers.get("mean_minus_var")(scores, coefficient=coefficient).item()
        assert found == pytest.approx(mean - coefficient * statistics.pvariance(values))
        found = reducers.get("mean_minus_std")(scores, coefficient=coefficient).item()
        assert found == pytest.approx(mean - coefficient * statistics.pstdev(values))


@pytest.mark.parametrize("name", NAMES)
def test_order_of_rows_and_members_does_not_matter(name):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    options = arguments(name, 5)
    want = reducers.get(name)(scores, **options)
    rows, members = torch.randperm(7, generator=generator), torch.randperm(5, generator=generator)
    moved = {key: value[members] for key, value in options.items()}
    torch.testing.assert_close(reducers.get(name)(scores[rows][:, members], **moved), want[rows])
    one_by_one = torch.cat([reducers.get(name)(row[None], **options) for row in scores])
    torch.testing.assert_close(one_by_one, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_member_and_large_numbers(name):
    options = arguments(name, 1)
    assert reducers.get(name)(torch.tensor([[4.5]], dtype=torch.float64), **options).item() == 4.5
    large = torch.tensor([[1e4, -1e4], [1e4, 1e4]], dtype=torch.float64)
    assert reducers.get(name)(large, **arguments(name, 2)).isfinite().all()


@pytest.mark.parametrize("name", ["mean_minus_std", "mean_minus_var"])
@pytest.mark.parametrize("coefficient", [-0.1, math.nan])
def test_a_negative_penalty_is_refused(name, coefficient):
    with pytest.raises(ValueError, match="coefficient"):
        reducers.get(name)(SCORES, coefficient=coefficient)


def test_rows_without_a_member_are_reduced_over_the_others():
    scores = torch.tensor([[1.0, 3.0], [torch.nan, 3.0], [torch.nan, torch.nan]], dtype=torch.float64)
    for name, want in {"mean": [2.0, 3.0], "min": [1.0, 3.0], "mean_minus_std": [1.0, 3.0]}.items():
        found = combine(scores, reducers.get(name))
        assert found[:2].tolist() == pytest.approx(want)
        assert found[2].isnan()
    found = combine(scores, reducers.get("weighted"), [2.0, 0.5])
    assert found[:2].tolist() == [3.5, 1.5]  # a missing member adds nothing, as in TRL
    assert combine(scores, disagreement)[:2].tolist() == [1.0, 0.0]


def test_wrong_results_of_a_reducer_are_named():
    def bad(scores):
        return scores

    with pytest.raises(ValueError, match="bad returned the shape"):
        combine(SCORES, bad)

    def endless(scores):
        return scores[:, 0] * math.inf

    with pytest.raises(ValueError, match="not finite"):
        combine(SCORES, endless)


# ------------------------------------------------------------------------------------------------------------- fusion
@pytest.fixture
def differences():
    """Member 0 is good, member 1 half as good, member 2 says nothing."""
    rng = np.random.default_rng(0)
    truth = rng.logistic(size=400) + 1.0
    return np.stack([truth, truth / 2 + rng.normal(size=400), rng.normal(size=400)], axis=1)


def penalised(weights, differences, l2):
    return -log_expit(differences @ weights).sum() + l2 / 2 * weights @ weights


@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_logistic_is_the_minimum_of_its_formula(differences, l2):
    want = minimize(penalised, np.zeros(3), args=(differences, l2), tol=1e-10).x
    assert fit_fusion_weights(differences, l2=l2) == pytest.approx(want, abs=1e-3)
    assert abs(want[2]) < 0.2 < want[0]


def test_the_side_of_a_pair_does_not_matter(differences):
    """Both sides of each pair are seen: flipping rows flips nothing but the label, which a sign of the row is."""
    flipped = differences * np.where(np.arange(len(differences)) % 2, 1.0, -1.0)[:, None]
    assert fit_fusion_weights(flipped[1::2]) == pytest.approx(fit_fusion_weights(differences[1::2]))


def test_bma_finds_the_best_member_whatever_its_scale(differences):
    weights = fit_fusion_weights(differences, "bma")
    (alone,) = fit_fusion_weights(differences[:, :1])
    assert weights == pytest.approx([alone, 0.0, 0.0], abs=1e-6)
    scaled = fit_fusion_weights(differences * [100.0, 1.0, 1.0], "bma")
    assert scaled[0] == pytest.approx(alone / 100, rel=0.02)  # the penalty is not quite free of scale


def test_bma_by_hand():
    differences = np.array([[1.0, -1.0], [2.0, 1.0], [0.5, 2.0]])
    scales = [fit_fusion_weights(differences[:, [m]])[0] for m in range(2)]
    likelihood = [math.exp(log_expit(a * differences[:, m]).sum()) for m, a in enumerate(scales)]
    want = [a * p / sum(likelihood) for a, p in zip(scales, likelihood, strict=True)]
    assert fit_fusion_weights(differences, "bma") == pytest.approx(want)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (dict(differences=np.ones((1, 2))), "2 pairs or more"),
        (dict(differences=np.ones(4)), "needed: .pairs, members"),
        (dict(differences=np.full((4, 2), np.nan)), "not finite"),
        (dict(differences=np.ones((4, 2)), l2=0.0), "above 0"),
        (dict(differences=np.ones((4, 2)), method="tree"), "'logistic' or 'bma'"),
    ],
)
def test_what_cannot_be_fitted(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit_fusion_weights(**arguments)


def test_without_scikit_learn_the_extra_is_named(differences, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"trl-ext\[fusion\]"):
        fit_fusion_weights(differences)
