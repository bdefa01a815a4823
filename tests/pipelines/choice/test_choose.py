"""Which rows are chosen: against values worked out by other means, chunked pools, and pools that cannot be used."""

import math

import pytest
import torch
from datasets import Dataset

from tests.scoring.conftest import save_reward_model
from tests.tiny import pair_rows, ranked_rows
from trl_ext import RewardEnsemble, RewardScorer, choose
from trl_ext.data.validation import DataError
from trl_ext.metrics.design import greedy_determinant
from trl_ext.pipelines.choice import choose as module
from trl_ext.pipelines.choice.choose import choose_rows
from trl_ext.pipelines.choice.shortlist import Shortlist
from trl_ext.scoring.last_layer import PosteriorError
from trl_ext.scoring.uncertainty import Candidates


PAIRS = pair_rows(30)
POOL = Dataset.from_list([{**row, "id": number} for number, row in enumerate(PAIRS)])
RANKINGS = [{"prompt": row["prompt"], "completions": row["completions"]} for row in ranked_rows(12, k=4, ragged=True)]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return RewardScorer(save_reward_model(tmp_path_factory.mktemp("choose")))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    scorer = RewardScorer(save_reward_model(tmp_path_factory.mktemp("fitted")))
    scorer.fit_uncertainty(pair_rows(30, seed=5))
    return scorer


@pytest.fixture(scope="module")
def differences(scorer):
    groups = [Candidates(row["prompt"], [row["chosen"], row["rejected"]]) for row in PAIRS]
    features, _ = scorer.group_features(groups)
    return (features[:, 0] - features[:, 1]).double()


def by_length(shift):
    def member(prompts, completions, **kwargs):
        return [math.sin(shift * len(completion)) for completion in completions]

    member.__name__ = f"member_{shift}"
    return member


# ---------------------------------------------------------------------------------------------------------- strategies
def test_fisher_is_the_d_optimal_design_of_weighted_differences(scorer, differences):
    weight = scorer.last_weight().double()
    chance = torch.sigmoid(differences @ weight)
    vectors = differences * (chance * (1 - chance)).sqrt()[:, None] / math.sqrt(2.0)
    rows, gains = greedy_determinant(vectors[:, None], 5)
    found = choose_rows(scorer, POOL, 5, prior_precision=2.0)
    assert found.rows == rows
    assert found.values == pytest.approx(gains, rel=1e-4)
    default = choose_rows(scorer, POOL, 5).report["prior_precision"]
    assert default == pytest.approx(len(weight) / float(weight.square().sum()), rel=1e-5)


def test_fisher_with_a_posterior_knows_what_is_labelled(fitted, differences):
    report = choose_rows(fitted, POOL, 3).report
    assert report["labelled"] == 30 and report["prior_precision"] == fitted.posterior.prior_precision
    factor, chance = fitted.posterior.factor.double(), torch.sigmoid(differences @ fitted.last_weight().double())
    covariance = torch.linalg.inv(factor @ factor.T)
    variance = (differences @ covariance * differences).sum(1)
    wanted = (chance * (1 - chance) * variance).log1p() / 2
    found = choose_rows(fitted, POOL, 30, diversity="none")
    assert found.values == pytest.approx(wanted.sort(descending=True).values.tolist(), rel=1e-3)
    uncertain = choose_rows(fitted, POOL, 30, "uncertainty")
    assert uncertain.values == pytest.approx(variance.sqrt().sort(descending=True).values.tolist(), rel=1e-3)
    with pytest.raises(ValueError, match="prior_precision"):
        choose_rows(fitted, POOL, 3, prior_precision=1.0)


def test_entropy_is_highest_where_the_scores_are_closest(scorer):
    scores = [scorer([row["prompt"]] * 2, [row["chosen"], row["rejected"]]) for row in PAIRS]
    margins = [abs(a - b) for a, b in scores]
    found = choose_rows(scorer, POOL, 30, "entropy")
    assert [margins[row] for row in found.rows] == pytest.approx(sorted(margins), abs=1e-4)
    chance = 1 / (1 + math.exp(-margins[found.rows[0]]))
    assert found.values[0] == pytest.approx(-chance * math.log(chance) - (1 - chance) * math.log(1 - chance), abs=1e-5)


def test_disagreement_is_the_deviation_of_the_members_differences():
    ensemble = RewardEnsemble([by_length(0.1), by_length(0.7), by_length(2.0)])
    found = choose_rows(ensemble, POOL, 30, "disagreement")
    table = torch.tensor(
        [
            [
                math.sin(shift * len(row["chosen"])) - math.sin(shift * len(row["rejected"]))
                for shift in (0.1, 0.7, 2.0)
            ]
            for row in PAIRS
        ]
    )
    wanted = table.std(dim=1, correction=0)
    assert found.values == pytest.approx(wanted.sort(descending=True).values.tolist(), rel=1e-4)
    diverse = choose_rows(ensemble, POOL, 4, "disagreement", diversity="determinant")
    vectors = (table - table.mean(1, keepdim=True))[:, None] / math.sqrt(3) / 2
    assert diverse.values == pytest.approx(greedy_determinant(vectors, 4)[1], rel=1e-4)
    assert choose_rows(ensemble, RANKINGS, 3, "entropy", diversity="k_centre").report["chosen"] == 3


def test_random_needs_no_model_and_follows_its_seed():
    first, again, other = (choose_rows(None, POOL, 10, "random", seed=seed).rows for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 10


def test_k_centre_begins_with_the_best_and_spreads(scorer):
    plain, spread = (choose_rows(scorer, POOL, 6, "entropy", diversity=how) for how in ("none", "k_centre"))
    assert spread.rows[0] == plain.rows[0] and set(spread.rows) != set(plain.rows)


def test_rankings_of_any_size(scorer, fitted):
    for strategy in ("fisher", "entropy", "random"):
        assert len(set(choose_rows(scorer, RANKINGS, 5, strategy).rows)) == 5
    assert len(choose_rows(fitted, RANKINGS, 5, "uncertainty", diversity="determinant").rows) == 5


def test_a_copy_of_a_chosen_row_is_not_chosen_again(scorer):
    rows = choose_rows(scorer, [*PAIRS, *PAIRS], 8, prior_precision=1e-3).rows
    assert len({row % 30 for row in rows}) == 8


# --------------------------------------------------------------------------------------------------------- large pools
def test_chunks_change_nothing(scorer, monkeypatch):
    for strategy in ("fisher", "entropy", "random"):
        whole = choose_rows(scorer, POOL, 4, strategy)
        monkeypatch.setattr(module, "CHUNK_ROWS", 7)
        parts = choose_rows(scorer, POOL, 4, strategy)
        monkeypatch.undo()
        assert parts.rows == whole.rows and parts.values == pytest.approx(whole.values, rel=1e-4)


def test_the_report_says_whether_the_shortlist_mattered(scorer):
    whole = choose_rows(scorer, POOL, 5, shortlist=30)
    assert whole.report["same_as_without_shortlist"]
    for size in (5, 8, 16, 25):
        short = choose_rows(scorer, POOL, 5, shortlist=size)
        assert short.report["shortlist"] == size
        if short.report["same_as_without_shortlist"]:
            assert short.rows == whole.rows
        if short.rows != whole.rows:
            assert not short.report["same_as_without_shortlist"]


def test_a_shortlist_holds_no_more_than_its_size():
    best, generator = Shortlist(5), torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=generator)
    for start in range(0, 1000, 50):
        part = values[start : start + 50]
        best.add(range(start, start + 50), part, torch.zeros(50, 1 + start // 500, 3))
        assert sum(len(part[0]) for part in best._new) < 5
    rows, found, vectors = best.best()
    assert rows.tolist() == values.argsort(descending=True)[:5].tolist() and vectors.shape == (5, 2, 3)
    assert found.tolist() == pytest.approx(values.sort(descending=True).values[:5].tolist())
    assert best.dropped == pytest.approx(values.sort(descending=True).values[5].item())


# ---------------------------------------------------------------------------------------------------- what comes back
def test_the_chosen_rows_come_in_order_with_their_values(scorer):
    found = choose_rows(scorer, POOL, 4)
    batch = choose(scorer, POOL, 4)
    assert isinstance(batch, Dataset) and batch["id"] == found.rows == batch["choice_row"]
    assert batch["choice_order"] == [0, 1, 2, 3] and batch["choice_value"] == found.values
    assert choose(scorer.folder, PAIRS, 4, batch_size=4)["choice_row"] == found.rows
    with pytest.raises(ValueError, match="choice_order"):
        choose(scorer, batch, 2)


def test_rows_that_cannot_be_compared_are_counted(scorer):
    same = {"prompt": "p", "chosen": " same", "rejected": " same"}
    found = choose_rows(scorer, [same, *PAIRS[:3], same], 3, "entropy")
    assert found.report["identical_completions"] == 2 and sorted(found.rows) == [1, 2, 3]
    with pytest.raises(ValueError, match="3 rows that can be compared"):
        choose_rows(scorer, [same, *PAIRS[:3], same], 4)


@pytest.mark.parametrize(
    ("rows", "n", "options", "message"),
    [
        ([], 1, {}, "pool is empty"),
        (PAIRS, 31, {}, "has 30 rows"),
        (PAIRS, 0, {}, "n=0"),
        (PAIRS, 1, {"strategy": "fischer"}, "fischer"),
        (PAIRS, 1, {"diversity": "some"}, "some"),
        (PAIRS, 1, {"strategy": "entropy", "diversity": "determinant"}, "k_centre"),
        (PAIRS, 1, {"strategy": "disagreement"}, "ensemble"),
        (PAIRS, 1, {"prior_precision": -1.0}, "prior_precision"),
        (PAIRS, 1, {"prior_precision": 1.0, "strategy": "entropy"}, "prior_precision"),
        (PAIRS, 3, {"shortlist": 2}, "shortlist"),
        (PAIRS, 3, {"shortlist": 9, "diversity": "none"}, "shortlist"),
        (POOL.to_iterable_dataset(), 1, {}, "stream"),
        ([*PAIRS[:2], {"prompt": "p", "completions": [" one"]}], 1, {}, "row 2.*1 completion"),
        ([{"prompt": "p", "completion": " one"}], 1, {}, "row 0.*completions"),
        ([*PAIRS[:2], {"prompt": "p", "chosen": "", "rejected": " a"}], 1, {}, "row 2"),
    ],
)
def test_what_cannot_work_is_refused(scorer, rows, n, options, message):
    with pytest.raises(ValueError, match=message):
        choose_rows(scorer, rows, n, **options)


def test_what_a_model_cannot_do_is_refused(scorer):
    with pytest.raises(PosteriorError, match="fit_uncertainty"):
        choose_rows(scorer, POOL, 1, "uncertainty")
    ensemble = RewardEnsemble([by_length(0.1), by_length(0.7)])
    with pytest.raises(ValueError, match="single scalar model"):
        choose_rows(ensemble, POOL, 1, "fisher")
    with pytest.raises(ValueError, match="NoneType"):
        choose_rows(None, POOL, 1, "entropy")
    for model in (scorer, ensemble, None):
        with pytest.raises(TypeError, match="diversety"):
            choose_rows(model, POOL, 1, "random", diversety="none")


def test_of_equal_values_the_earlier_rows_are_chosen():
    best = Shortlist(3)
    for start in (0, 4, 8):
        best.add(range(start, start + 4), torch.ones(4), None)
    assert best.pick(3, "none") == ([0, 1, 2], [1.0, 1.0, 1.0], True)


def test_a_score_that_is_not_finite_names_its_row(tmp_path):
    scorer = RewardScorer(save_reward_model(tmp_path))
    with torch.no_grad():
        embeddings = scorer.model.get_input_embeddings().weight
        embeddings[scorer.processing_class("Q")["input_ids"][-1]] = torch.nan
    rows = [*[{**row, "prompt": "a b"} for row in PAIRS[:3]], {"prompt": "Q", "chosen": " a", "rejected": " b"}]
    for strategy in ("fisher", "entropy"):
        with pytest.raises(DataError, match="not finite|nan") as error:
            choose_rows(scorer, rows, 1, strategy)
        assert error.value.row == 3
