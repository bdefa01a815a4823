"""Calibrations against theory and scikit-learn, and scores that a scorer calibrates or shapes."""

import math

import numpy as np
import pytest

from tests.scoring.conftest import save_reward_model
from trl_ext import RewardScorer
from trl_ext.models.sidecar import read_sidecar
from trl_ext.scoring.calibration import calibrated_margins, fit_calibration, preference_probabilities


def drawn(temperature, number=4_000, seed=0):
    """Margins of pairs that are right as often as sigmoid(margin / temperature) says."""
    generator = np.random.default_rng(seed)
    margins = np.abs(generator.normal(scale=3.0, size=number))
    right = generator.random(number) < 1 / (1 + np.exp(-margins / temperature))
    return np.where(right, margins, -margins)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_is_found(temperature):
    assert fit_calibration(drawn(temperature))["temperature"] == pytest.approx(temperature, rel=0.1)


def test_the_temperature_of_one_margin_by_hand():
    calibration = fit_calibration([2.0, 2.0, 2.0, -2.0] * 10)  # log(3) log-odds for 2
    assert calibration["temperature"] == pytest.approx(2 / math.log(3), rel=1e-4)
    assert preference_probabilities([2.0, -2.0], calibration) == pytest.approx([0.75, 0.25], abs=1e-4)


def test_the_isotonic_map_is_that_of_scikit_learn():
    isotonic = pytest.importorskip("sklearn.isotonic")
    generator = np.random.default_rng(0)
    scores = generator.normal(size=300).round(1)  # with ties
    labels = (generator.random(300) < 1 / (1 + np.exp(-2 * scores))).astype(float)
    calibration = fit_calibration(scores, labels, "isotonic")
    wanted = isotonic.IsotonicRegression(y_min=1e-3, y_max=1 - 1e-3, out_of_bounds="clip").fit(scores, labels)
    where = np.linspace(-4, 4, 200)
    found = 1 / (1 + np.exp(-calibrated_margins(where, calibration)))
    assert found == pytest.approx(wanted.predict(where), abs=1e-6)
    assert len(calibration["x"]) < 60


def test_a_map_of_pairs_is_symmetric_and_keeps_the_order():
    calibration = fit_calibration(drawn(3.0, 500), method="isotonic")
    where = np.linspace(-5, 5, 41)
    chances = np.array(preference_probabilities(where, calibration))
    assert chances + chances[::-1] == pytest.approx(np.ones(41))
    assert (np.diff(chances) >= 0).all()


@pytest.mark.parametrize(
    ("margins", "method", "message"),
    [
        ([1.0] * 20, "temperature", "100% of the 20 rows"),
        ([-1.0] * 20, "temperature", "0% of the 20 rows"),
        ([1.0, -1.0], "temperature", "2 rows"),
        ([1.0, -1.0] * 9, "platt", "'platt'"),
    ],
)
def test_what_determines_no_calibration_is_refused(margins, method, message):
    with pytest.raises(ValueError, match=message):
        fit_calibration(margins, method=method)


PROMPTS = [f"What is {n} and {n}?" for n in range(24)]
CHOSEN = [f" It is {2 * n}. So it is." for n in range(24)]
REJECTED = [f" I do not know {n}. Who does?" for n in range(24)]


def test_a_calibration_is_stored_with_the_model_and_applied_where_that_is_asked_for(tmp_path):
    path = save_reward_model(tmp_path)
    scorer = RewardScorer(path, device="cpu")
    with pytest.raises(ValueError, match="none is stored"):
        RewardScorer(path, device="cpu", calibrated=True)
    better = [c > r for c, r in zip(scorer(PROMPTS, CHOSEN), scorer(PROMPTS, REJECTED), strict=True)]
    # two of three are ordered right, whatever this random model prefers
    both = enumerate(zip(CHOSEN, REJECTED, better, strict=True))
    pairs = [(c, r) if b == (n % 3 > 0) else (r, c) for n, (c, r, b) in both]
    chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
    found = scorer.fit_calibration(PROMPTS, chosen, rejected)
    assert read_sidecar(path).calibration == found
    plain = RewardScorer(path, device="cpu")
    calibrated = RewardScorer(path, device="cpu", calibrated=True)
    raw = plain(PROMPTS, chosen)
    assert raw == pytest.approx(scorer(PROMPTS, chosen), abs=1e-6)
    assert calibrated(PROMPTS, chosen) == pytest.approx([score / found["temperature"] for score in raw], rel=1e-5)
    margins = [c - r for c, r in zip(raw, plain(PROMPTS, rejected), strict=True)]
    wanted = [1 / (1 + math.exp(-margin / found["temperature"])) for margin in margins]
    assert plain.preference_probabilities(PROMPTS, chosen, rejected) == pytest.approx(wanted, abs=1e-4)

    plain.fit_normalizer(PROMPTS, chosen)  # the calibration was fitted on other numbers
    with pytest.raises(ValueError, match="another normaliser"):
        plain.preference_probabilities(PROMPTS, chosen, rejected)
    with pytest.raises(ValueError, match="another normaliser"):
        RewardScorer(path, device="cpu", calibrated=True)
    scorer.fit_calibration(PROMPTS, chosen, rejected, method="isotonic")
    with pytest.raises(ValueError, match="preference_probabilities"):
        RewardScorer(path, device="cpu", calibrated=True)


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_calibration_of_outcomes_is_applied_to_each_score_of_a_pair(reward_path, probabilities):
    scorer = RewardScorer(reward_path("llama"), device="cpu")
    generator = np.random.default_rng(0)
    scores, labels = generator.uniform(0.05, 0.95, size=(2, 300))
    margins = np.log(scores / (1 - scores)) if probabilities else scores
    scorer.calibration = fit_calibration(margins, labels, "isotonic", probabilities=probabilities)
    scorer.raw.scores = lambda prompts, completions, columns: [float(text) for text in completions]
    same = scorer.preference_probabilities(None, ["0.2", "0.7"], ["0.2", "0.7"])
    assert same == pytest.approx([0.5, 0.5])
    scorer.calibration = scorer.calibration | {"method": "temperature", "temperature": 2.0}
    odds = math.log(0.9 / 0.1) - math.log(0.2 / 0.8) if probabilities else 0.7
    wanted = 1 / (1 + math.exp(-odds / 2))
    assert scorer.preference_probabilities(None, ["0.9"], ["0.2"]) == pytest.approx([wanted])


def test_scores_relative_to_a_reference(reward_path):
    path = reward_path("llama")
    plain = RewardScorer(path, device="cpu")
    prompts, completions = [p for p in PROMPTS[:3] for _ in range(2)], [*CHOSEN[:3], *REJECTED[:3]]
    references = [[f" It may be {n // 2}.", " No."] for n in range(6)]
    scores = plain(prompts, completions)
    against = [plain(prompts, [own[m] for own in references]) for m in range(2)]
    wanted = [
        sum(1 / (1 + math.exp(other - score)) for other in others) / 2
        for score, *others in zip(scores, *against, strict=True)
    ]
    shaped = RewardScorer(path, device="cpu", reference="reference")
    assert shaped(prompts, completions, reference=references) == pytest.approx(wanted, abs=1e-5)
    asked = []
    read = shaped.raw.scores
    shaped.raw.scores = lambda prompts, completions, columns: (
        asked.append(len(completions)) or read(prompts, completions, columns)
    )
    shaped(prompts, completions, reference=references)
    assert asked == [6, 6]  # six samples; two references of three prompts, once each
    asked.clear()
    same = {"reference": [" No."] * 6, "tools": [[], [], None, None, [], []]}
    shaped([PROMPTS[0]] * 6, completions, **same)
    assert asked == [6, 2]  # the chat template may show the tools
    fixed = RewardScorer(path, device="cpu", reference=0.25)
    assert fixed(prompts, completions) == pytest.approx([1 / (1 + math.exp(0.25 - s)) for s in scores], abs=1e-5)
    with pytest.raises(ValueError, match="'reference'.*not among"):
        shaped(prompts, completions)
    with pytest.raises(ValueError, match="Row 1 has no reference"):
        shaped(prompts, completions, reference=["x", None, "x", "x", "x", "x"])
