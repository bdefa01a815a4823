"""The posterior of the last layer against closed forms and numerical derivatives, saved, merged, and refused."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from peft import PeftModel

from tests.scoring.conftest import save_reward_model
from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.table import outcome_rows, tiny_trainer
from trl_ext import RewardScorer, merge_reward_model
from trl_ext.data.validation import DataError
from trl_ext.losses import bradley_terry, plackett_luce
from trl_ext.models.heads import features_as_output, output_layer
from trl_ext.pipelines.reward_functions import reward_identity
from trl_ext.scoring import SharedBaseScorer
from trl_ext.scoring.last_layer import (
    Information,
    PosteriorError,
    best_prior_precision,
    expected_curvature,
    information_vectors,
    loss_curvature,
    read_posterior,
)
from trl_ext.scoring.uncertainty import Candidates


PAIRS, RANKINGS = pair_rows(40), ranked_rows(20, k=4, ragged=True)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """An adapter with a stored posterior, its folder and its scorer."""
    folder = save_reward_model(tmp_path_factory.mktemp("adapter"), lora=True)
    scorer = RewardScorer(folder)
    about = scorer.fit_uncertainty(PAIRS)
    return folder, scorer, about


def features_of(scorer, rows, column):
    found = scorer.raw.features([row["prompt"] for row in rows], [row[column] for row in rows], {})
    return torch.stack(found).double()


# ------------------------------------------------------------ features and scores
@pytest.mark.parametrize(("family", "lora"), [("llama", True), ("gpt2", False), ("bert", False), ("roberta", False)])
def test_a_score_is_the_product_of_features_and_weight(reward_path, family, lora):
    scorer = RewardScorer(reward_path(family, lora=lora))
    prompts, completions = ["a b?", "a b?", "c"], [" good.", " bad and long.", " so"]
    features, mask = scorer.group_features(
        [Candidates(*row) for row in zip(prompts, [[c] for c in completions], strict=True)]
    )
    assert mask.all()
    scores = scorer.raw.scores(prompts, completions, {})
    assert (features[:, 0] @ scorer.last_weight()).tolist() == pytest.approx(scores, abs=1e-5)


def test_flat_and_padded_rows_have_the_same_features(reward_path):
    prompts, completions = ["one long prompt of words"] * 4, [" a", " b c", " d", " e f g"]
    flat = RewardScorer(reward_path("llama"), shared_prefix=True).raw.features(prompts, completions, {})
    padded = RewardScorer(reward_path("llama"), shared_prefix=False).raw.features(prompts, completions, {})
    assert torch.stack(flat).flatten().tolist() == pytest.approx(torch.stack(padded).flatten().tolist(), abs=1e-4)


def test_the_model_gives_scores_again_after_features(fitted):
    _, scorer, _ = fitted
    with pytest.raises(RuntimeError, match="stop"), features_as_output(scorer.model):
        raise RuntimeError("stop")
    assert not output_layer(scorer.model)._forward_hooks


# ------------------------------------------------------------ the posterior
def test_the_precision_is_that_of_logistic_regression(fitted):
    folder, scorer, about = fitted
    posterior = read_posterior(folder)
    difference = features_of(scorer, PAIRS, "chosen") - features_of(scorer, PAIRS, "rejected")
    chance = torch.sigmoid(difference @ scorer.last_weight().double())
    precision = (difference * (chance * (1 - chance))[:, None]).T @ difference
    precision += about["prior_precision"] * torch.eye(len(precision), dtype=torch.float64)
    factor = posterior.factor.double()
    assert torch.allclose(factor @ factor.T, precision, rtol=1e-4, atol=1e-4 * float(precision.diag().mean()))
    assert about["rows"] == 40 and about["chosen_by"] == "marginal_likelihood"

    chosen = features_of(scorer, PAIRS, "chosen")
    mean = torch.cat([chosen, features_of(scorer, PAIRS, "rejected")]).mean(0)
    wanted = ((chosen - mean) @ torch.linalg.inv(precision) * (chosen - mean)).sum(1).sqrt()
    scores, stds = scorer.score_with_uncertainty([row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS])
    assert stds == pytest.approx(wanted.tolist(), rel=1e-3)
    again = scorer([row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS])
    assert scores == pytest.approx(again, abs=1e-5)


@pytest.mark.parametrize("margins", [False, True])
def test_rows_are_read_as_training_read_them(tmp_path, caplog, margins):
    """Ratings of pairs say something only with `margin_from_ratings`, and rows that were too long are left out."""
    better = 2.0 if margins else 1.0
    rows = [{**row, "chosen_rating": better, "rejected_rating": 1.0} for row in PAIRS]
    base = save_tiny_model(tmp_path / "base", "llama")
    arguments = {"loss_type": "bradley_terry", "loss_kwargs": {"margin_from_ratings": margins}, "max_length": 256}
    tiny_trainer("reward", base, tmp_path / "out", rows=rows, **arguments).save_model()
    scorer = RewardScorer(tmp_path / "out")
    too_long = {**rows[0], "chosen": rows[0]["chosen"] * 300}
    with caplog.at_level("INFO"):
        about = scorer.fit_uncertainty([*rows[:7], too_long, *rows[7:]], prior_precision=1.0)
    assert about["rows"] == 40 and "1 of 41 rows are longer than the 256 tokens of training" in caplog.text
    difference = features_of(scorer, PAIRS, "chosen") - features_of(scorer, PAIRS, "rejected")
    chance = torch.sigmoid(difference @ scorer.last_weight().double() - (1.0 if margins else 0.0))
    precision = (difference * (chance * (1 - chance))[:, None]).T @ difference
    precision += torch.eye(len(precision), dtype=torch.float64)
    factor = scorer.posterior.factor.double()
    assert torch.allclose(factor @ factor.T, precision, rtol=1e-4, atol=1e-4 * float(precision.diag().mean()))


def test_a_candidate_that_was_too_long_is_left_out_of_its_row(tmp_path):
    """As in training, the others stay if there are two of them."""
    rows = ranked_rows(12, k=3)
    base = save_tiny_model(tmp_path / "base", "llama")
    tiny_trainer("reward", base, tmp_path / "out", rows=rows, max_length=256).save_model()
    scorer, found = RewardScorer(tmp_path / "out"), {}
    long = {**rows[0], "completions": [*rows[0]["completions"][:2], "x" * 2000], "ratings": [1.0, 0.0, 2.0]}
    short = {**long, "completions": long["completions"][:2], "ratings": [1.0, 0.0]}
    for name, row in (("long", long), ("short", short)):
        about = scorer.fit_uncertainty([*rows[1:], row], prior_precision=1.0)
        assert about["rows"] == 12
        found[name] = scorer.posterior.factor
    torch.testing.assert_close(found["long"], found["short"])


def test_stored_uncertainty_is_found_on_a_shared_base_and_in_a_repository(fitted, tmp_path, monkeypatch):
    folder, scorer, _ = fitted
    given = (["a b?", "c"], [" good.", " so"])
    scores, stds = scorer.score_with_uncertainty(*given)
    wanted = [score - 2 * std for score, std in zip(scores, stds, strict=True)]
    shared = SharedBaseScorer(folder, std_coefficient=2.0)
    shared.use_base(RewardScorer(folder).model)
    assert shared(*given) == pytest.approx(wanted, abs=1e-5)

    repository = tmp_path / "models--me--reward"
    shutil.copytree(folder, repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("trl_ext.scoring.scorer.load_tokenizer", lambda source: scorer.processing_class)
    assert RewardScorer("me/reward", std_coefficient=2.0)(*given) == pytest.approx(wanted, abs=1e-5)

    bare = save_reward_model(tmp_path / "bare", lora=True)
    with pytest.raises(PosteriorError, match="has no uncertainty"):
        SharedBaseScorer(bare, std_coefficient=2.0).use_base(RewardScorer(bare).model)


@pytest.mark.parametrize("ties", [False, True])
def test_the_curvature_is_the_numerical_hessian(ties):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    ratings = torch.tensor([[3.0, 1, 2, 0], [0, 1, 2, 0], [1, 0, 0, 0]] if ties else [[3.0, 1, 2, 0]] * 3)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    found = loss_curvature(scores, mask, lambda values: plackett_luce(values, ratings, mask))
    step = 1e-4
    for row in range(3):
        for one in range(4):
            for other in range(4):
                total = 0.0
                for sign, a, b in ((1, 1, 1), (-1, 1, -1), (-1, -1, 1), (1, -1, -1)):
                    moved = scores.clone()
                    moved[row, one] += a * step
                    moved[row, other] += b * step
                    total += sign * plackett_luce(moved, ratings, mask)[row].item()
                assert found[row, one, other].item() == pytest.approx(total / (4 * step**2), abs=1e-6)


def test_a_pair_s_information_is_its_weighted_difference():
    scores, mask = torch.tensor([[1.0, -0.5]]), torch.ones(1, 2, dtype=torch.bool)
    features = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 2.0, 3.0]]])
    (vector,) = information_vectors(features, expected_curvature(scores, mask))[0]
    chance = 1 / (1 + math.exp(-1.5))
    wanted = torch.tensor([1.0, 0.0, -3.0]) * math.sqrt(chance * (1 - chance))
    assert vector.abs().tolist() == pytest.approx(wanted.abs().tolist(), abs=1e-6)
    soft = loss_curvature(
        scores, mask, lambda s: bradley_terry(s, torch.tensor([[1.0, 0.0]]), mask, target=torch.tensor([0.7]))
    )
    assert torch.allclose(soft, expected_curvature(scores, mask), atol=1e-9)  # does not depend on the label


def test_equal_scores_still_have_information():
    curvature = expected_curvature(torch.zeros(1, 3), torch.tensor([[True, True, False]]))
    assert curvature[0, :2, :2].flatten().tolist() == pytest.approx([0.25, -0.25, -0.25, 0.25], abs=1e-8)
    assert not curvature[0, 2].any()


def test_the_prior_precision_maximises_the_marginal_likelihood():
    eigenvalues, weight = torch.tensor([5.0, 2.0, 0.1, 0.0]), torch.tensor([0.5, -0.2, 0.1, 0.0])

    def evidence(precision):
        return (
            2 * math.log(precision)
            - precision * float(weight.square().sum()) / 2
            - float((eigenvalues + precision).log().sum()) / 2
        )

    found = best_prior_precision(eigenvalues, weight)
    assert evidence(found) > max(evidence(found * 1.01), evidence(found / 1.01))
    assert all(evidence(found) >= evidence(10**power) for power in range(-6, 7))
    with pytest.raises(ValueError, match="prior precision"):
        best_prior_precision(eigenvalues, torch.zeros(4))


def test_rankings_of_any_size_and_a_given_precision(reward_path):
    scorer = RewardScorer(reward_path("llama"))
    scorer.folder = None  # do not write to the shared folder
    about = scorer.fit_uncertainty(RANKINGS, prior_precision=3.0)
    assert about == {"prior_precision": 3.0, "chosen_by": "given", "rows": 20}
    information = Information(len(scorer.last_weight()))
    for row in RANKINGS:
        features, mask = scorer.group_features([Candidates(row["prompt"], row["completions"])])
        ratings = torch.tensor([row["ratings"]])
        scores = features @ scorer.last_weight()
        information.add(features, loss_curvature(scores, mask, lambda s: plackett_luce(s, ratings, mask)), mask)  # noqa: B023
    one_by_one = information.posterior(scorer.last_weight(), "scalar", 3.0)
    assert torch.allclose(one_by_one.factor, scorer.posterior.factor, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ stored and used
def test_saved_and_loaded_it_gives_the_same(fitted):
    folder, scorer, _ = fitted
    texts = [" one", " two words", " three"]
    loaded = RewardScorer(folder).score_with_uncertainty(["p"] * 3, texts)
    for found, wanted in zip(loaded, scorer.score_with_uncertainty(["p"] * 3, texts), strict=True):
        assert found == pytest.approx(wanted, abs=1e-6)


def test_merged_it_gives_the_same(fitted, tmp_path):
    folder, scorer, _ = fitted
    merge_reward_model(folder, tmp_path / "merged")
    texts = [" one", " two words", " three"]
    merged = RewardScorer(tmp_path / "merged")
    assert not isinstance(merged.model, PeftModel)
    for found, wanted in zip(
        merged.score_with_uncertainty(["p"] * 3, texts), scorer.score_with_uncertainty(["p"] * 3, texts), strict=True
    ):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_the_posterior_of_another_model_is_refused(fitted, tmp_path):
    folder, _, _ = fitted
    other = save_reward_model(tmp_path, "llama")
    with pytest.raises(PosteriorError, match="fit_uncertainty"):
        RewardScorer(other).score_with_uncertainty(["p"], [" c"])
    shutil.copytree(folder / "uncertainty", other / "uncertainty")
    scorer = RewardScorer(other)
    with torch.no_grad():
        output_layer(scorer.model).weight += 0.01  # as after more training
    with pytest.raises(PosteriorError, match="another model"):
        scorer.score_with_uncertainty(["p"], [" c"])
    (other / "uncertainty" / "last_layer.safetensors").write_bytes(b"no")
    with pytest.raises(PosteriorError, match="cannot be read"):
        RewardScorer(other, std_coefficient=1.0)


def test_a_lower_bound_is_a_reward_function_with_a_key_of_its_own(fitted, tmp_path):
    folder, scorer, _ = fitted
    bound = RewardScorer(folder, std_coefficient=2.0)
    scores, stds = scorer.score_with_uncertainty(["p", "p"], [" a", " b c"])
    assert bound(["p", "p"], [" a", " b c"]) == pytest.approx([s - 2 * d for s, d in zip(scores, stds, strict=True)])
    assert reward_identity(bound) != reward_identity(scorer)
    assert reward_identity(RewardScorer(folder, reference=0.0)) != reward_identity(scorer)
    file = tmp_path / "rewards.py"
    file.write_text(
        f"from trl_ext import RewardScorer\ncareful = RewardScorer({str(folder)!r}, std_coefficient=2.0)\n"
    )
    named = reward_identity(f"{file}:careful")
    assert {**named, "name": bound.__name__} == reward_identity(bound)
    with pytest.raises(ValueError, match="std_coefficient"):
        RewardScorer(folder, std_coefficient=-1.0)


def test_deviations_are_on_the_scale_of_normalised_and_calibrated_scores(fitted):
    folder, _, _ = fitted
    scorer = RewardScorer(folder)
    _, raw = scorer.score_with_uncertainty(["p"], [" a b"])
    scorer.normalizer = {"mean": 0.3, "std": 0.5}
    scores, stds = scorer.score_with_uncertainty(["p"], [" a b"])
    assert stds == pytest.approx([raw[0] / 0.5]) and scores == pytest.approx(scorer(["p"], [" a b"]), abs=1e-5)
    scorer.calibrated = True
    scorer.calibration = {"method": "temperature", "temperature": 2.0, "of": "pairs", "probabilities": False}
    scorer.calibration["normalizer"] = scorer.normalizer
    scores, stds = scorer.score_with_uncertainty(["p"], [" a b"])
    assert stds == pytest.approx([raw[0] / 1.0]) and scores == pytest.approx(scorer(["p"], [" a b"]), abs=1e-5)
    scorer.normalizer = None
    with pytest.raises(ValueError, match="another normaliser"):
        scorer.score_with_uncertainty(["p"], [" a b"])


def test_a_row_without_tokens_has_neither(fitted):
    _, scorer, _ = fitted
    scores, stds = scorer.score_with_uncertainty([None, "p"], [[], " a"])
    assert (scores[0], stds[0]) == (None, None) and stds[1] > 0


def test_a_named_data_set_is_read_once(reward_path, tmp_path, caplog):
    folder = shutil.copytree(reward_path("llama"), tmp_path / "model")
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:8]))
    first = RewardScorer(folder).fit_uncertainty(rows)
    with caplog.at_level("INFO", "trl_ext"):
        assert RewardScorer(folder).fit_uncertainty(str(rows)) == first
    assert "already" in caplog.text
    assert RewardScorer(folder).fit_uncertainty(rows, prior_precision=1.0)["chosen_by"] == "given"


def test_a_folder_of_data_is_its_files_and_a_changed_model_or_limit_is_fitted_again(reward_path, tmp_path):
    folder = shutil.copytree(reward_path("llama"), tmp_path / "model")
    for name, count in (("one", 4), ("two", 6)):
        Dataset.from_list(PAIRS[:count]).save_to_disk(tmp_path / name)
    scorer = RewardScorer(folder)
    assert scorer.fit_uncertainty(tmp_path / "one")["rows"] == 4
    assert scorer.fit_uncertainty(tmp_path / "two")["rows"] == 6
    first = scorer.posterior
    assert scorer.fit_uncertainty(tmp_path / "two") and scorer.posterior is first
    RewardScorer(folder, max_length=4).fit_uncertainty(tmp_path / "two")
    assert read_posterior(folder).digest() != first.digest()  # cut rows have other features
    with torch.no_grad():
        output_layer(scorer.model).weight += 0.01
    scorer.fit_uncertainty(tmp_path / "two")  # as the error of the old posterior says
    assert scorer.posterior.fits(scorer.last_weight()) and not first.fits(scorer.last_weight())
    DatasetDict({"test": Dataset.from_list(PAIRS[:2])}).save_to_disk(tmp_path / "three")
    with pytest.raises(ValueError, match="no split 'train'.*'test'"):
        scorer.fit_uncertainty(tmp_path / "three")


def test_rows_that_say_nothing_are_refused(reward_path):
    scorer = RewardScorer(reward_path("llama"))
    scorer.folder = None
    with pytest.raises(ValueError, match="no rows"):
        scorer.fit_uncertainty([])
    with pytest.raises(ValueError, match="information of the rows"):
        scorer.fit_uncertainty([{"prompt": "p", "chosen": " a", "rejected": " a"}])
    with pytest.raises(ValueError, match="above 0"):
        scorer.fit_uncertainty(PAIRS[:2], prior_precision=0.0)
    with pytest.raises(DataError, match="row 1"):
        scorer.fit_uncertainty([PAIRS[0], {**PAIRS[1], "rejected": ""}])


def test_an_outcome_model_has_the_precision_of_logistic_regression(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    rows = outcome_rows(16)
    trainer = tiny_trainer("orm", base, tmp_path / "orm", rows, max_steps=1)
    trainer.save_model()
    scorer = RewardScorer(tmp_path / "orm")
    about = scorer.fit_uncertainty(rows)
    texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    features = torch.stack(scorer.raw.features(*texts, {})).double()
    if len(scorer.last_weight()) > features.shape[1]:  # token classifiers have a bias
        features = torch.cat([features, torch.ones(len(features), 1).double()], dim=1)
    chance = torch.sigmoid(features @ scorer.last_weight().double())
    precision = (features * (chance * (1 - chance))[:, None]).T @ features
    precision += about["prior_precision"] * torch.eye(len(precision), dtype=torch.float64)
    wanted = (features @ torch.linalg.inv(precision) * features).sum(1).sqrt()  # of the log-odds: no reference
    scores, stds = scorer.score_with_uncertainty(*texts)
    assert stds == pytest.approx(wanted.tolist(), rel=1e-3) and scores == pytest.approx(scorer(*texts), abs=1e-5)
    with pytest.raises(DataError, match="row 1.*label"):
        scorer.fit_uncertainty([rows[0], {"prompt": "p", "completion": " c"}])
    with pytest.raises(ValueError, match="several outputs"):
        RewardScorer(tmp_path / "orm", aggregation="min").fit_uncertainty(rows)
    scorer.raw.sidecar.loss_type = "mse"
    with pytest.raises(ValueError, match="bce"):
        scorer.fit_uncertainty(rows)


def test_a_model_that_is_trained_further_in_memory_is_refused(tmp_path, caplog):
    scorer = RewardScorer(save_reward_model(tmp_path))
    scorer.raw.sidecar.loss_type = "pointwise"
    scorer.fit_uncertainty(PAIRS[:8])
    assert "pointwise" in caplog.text
    with torch.no_grad():
        output_layer(scorer.model).weight += 0.01
    with pytest.raises(PosteriorError, match="trained further"):
        scorer.score_with_uncertainty(["p"], [" c"])
