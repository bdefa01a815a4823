"""Losses by name, as callables and from plugins; what a loss cannot use is said before training."""

import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, history, trainer_for
from trl_ext import RewardConfig, load_reward_model
from trl_ext.data.validation import DataError
from trl_ext.losses.ranking import bradley_terry, ranking_losses
from trl_ext.trainers.ranking.objective import RankingObjective


def hinge(scores, ratings, mask, *, margin=None, target=None, width=1.0):
    delta = scores[:, 0] - scores[:, 1]
    return F.relu(width - delta)


def test_a_callable_trains_and_its_checkpoint_loads(base, tmp_path):
    """One that cannot be pickled, too: the arguments are saved beside the model."""

    def local(scores, ratings, mask, *, margin=None, target=None):
        return bradley_terry(scores, ratings, mask)

    named = trainer_for(base, config(tmp_path / "named"))
    given = trainer_for(base, config(tmp_path / "given", loss_type=local, save_strategy="steps", save_steps=2))
    named.train()
    given.train()
    assert history(given, "loss") == history(named, "loss")
    assert given.args.loss_type is local
    saved = torch.load(tmp_path / "given" / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert saved.loss_type.endswith("local")
    load_reward_model(tmp_path / "given" / "checkpoint-4")


def test_a_partial_and_its_arguments(base, tmp_path):
    one = trainer_for(base, config(tmp_path, loss_type=hinge, loss_kwargs={"width": 2.0}))
    other = trainer_for(base, config(tmp_path, loss_type=functools.partial(hinge, width=2.0)))
    one.train()
    other.train()
    other.save_model()
    assert history(one, "loss") == history(other, "loss")
    assert one.args.to_dict()["loss_type"].endswith("hinge")
    pickle.dumps(one.args)


def test_the_name_of_a_plugin(base, tmp_path, monkeypatch):
    class Plugin:
        name, value = "my_hinge", "somewhere:hinge"
        dist = type("Distribution", (), {"name": "my-package", "version": "1.0"})

        @staticmethod
        def load():
            return hinge

    monkeypatch.setattr(ranking_losses, "_plugins", lambda: [Plugin])
    trainer = trainer_for(base, config(tmp_path, loss_type="my_hinge"))
    trainer.train()
    assert len(history(trainer, "loss")) == 4


def test_an_unknown_name_suggests_the_nearest(base, tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'plackett_luce'"):
        trainer_for(base, config(tmp_path, loss_type="placket_luce"))


@pytest.mark.parametrize(
    ("loss", "kwargs", "words"),
    [
        (
            "listnet",
            {"temprature": 0.5},
            r"cannot be called with loss_kwargs=\{'temprature': 0.5\}.*\['temperature'\]",
        ),
        ("plackett_luce", {"temperature": 0.5}, "arguments none"),
        ("listnet", {"temperature": -1.0}, "temperature above 0"),
        ("bradley_terry", {"margin": 1.0}, "come from the data"),
        (hinge, {"breadth": 1.0}, r"hinge.*\['width'\]"),
        (lambda scores, ratings, mask: scores.mean(), {}, r"returned \(\) for 2 groups"),
        (lambda scores, ratings, mask: 0.0, {}, "returned float for 2 groups"),
    ],
)
def test_arguments_that_the_loss_does_not_take_are_refused_at_construction(loss, kwargs, words):
    with pytest.raises(ValueError, match=words):
        RankingObjective(loss, kwargs)


@pytest.mark.parametrize("given", ["temperature=0.5", "[1, 2]", 3])
def test_loss_kwargs_that_are_no_dictionary_are_refused(given, tmp_path):
    with pytest.raises(ValueError, match="loss_kwargs="):
        config(tmp_path, loss_kwargs=given)


def test_loss_kwargs_as_json(tmp_path):
    assert config(tmp_path, loss_kwargs='{"temperature": 0.5}').loss_kwargs == {"temperature": 0.5}


@pytest.mark.parametrize("loss", ["plackett_luce", "listnet", "pointwise"])
def test_a_margin_that_the_loss_cannot_use_is_refused_before_training(loss, base, tmp_path):
    rows = [{**row, "margin": 0.5} for row in ranked_rows(4)]
    with pytest.raises(DataError, match=rf"train data, column 'margin'.*'{loss}'.*remove_columns\('margin'\)"):
        trainer_for(base, config(tmp_path, loss_type=loss), rows)


def test_a_probability_that_the_loss_cannot_use_is_refused_before_training(base, tmp_path):
    rows = [{**row, "preference_probability": 0.5} for row in pair_rows(4)]
    with pytest.raises(DataError, match="column 'preference_probability'.*'pairwise'"):
        trainer_for(base, config(tmp_path, loss_type="pairwise"), rows)

    def plain(scores, ratings, mask):
        return (scores[:, 0] - scores[:, 1]).exp()

    with pytest.raises(DataError, match="column 'preference_probability'.*unexpected keyword argument 'target'"):
        trainer_for(base, config(tmp_path, loss_type=plain), rows)


def test_a_margin_beside_a_probability_is_refused_unless_the_loss_takes_both(base, tmp_path):
    rows = [{**row, "margin": 0.5, "preference_probability": 0.5} for row in pair_rows(4)]
    with pytest.raises(
        DataError, match="column 'margin': found 'margin' beside 'preference_probability'.*'bradley_terry'"
    ):
        trainer_for(base, config(tmp_path), rows)

    @ranking_losses.declare(takes_margin=True, takes_target=True)
    def own(scores, ratings, mask, *, margin=None, target=None):
        return (scores[:, 0] - scores[:, 1]).square()

    trainer_for(base, config(tmp_path, loss_type=own), rows)


def test_bradley_terry_with_more_than_two_candidates_names_the_row(base, tmp_path):
    rows = [*ranked_rows(3, k=2), *ranked_rows(2, k=4)]
    with pytest.raises(
        DataError, match="train data, row 3, column 'completions': found 4 candidates.*'plackett_luce'"
    ):
        trainer_for(base, config(tmp_path), rows)
    with pytest.raises(DataError, match="eval data, row 3"):
        trainer_for(base, config(tmp_path), rows[:3], eval_dataset=Dataset.from_list(rows))
    stream = Dataset.from_list(rows[3:]).to_iterable_dataset()
    trainer = trainer_for(base, config(tmp_path), stream)
    with pytest.raises(ValueError, match="use `pairwise` or `plackett_luce`"):
        trainer.train()


@pytest.mark.parametrize("loss", ["listnet", "pointwise"])
def test_ranks_are_refused_by_losses_that_need_distances(loss, base, tmp_path):
    with pytest.raises(DataError, match="column 'ranks'"):
        trainer_for(base, config(tmp_path, loss_type=loss), ranked_rows(4, ranks=True))
    with pytest.raises(DataError, match="column 'ranks'"):
        args = config(tmp_path, loss_type="pairwise", loss_kwargs={"margin_from_ratings": True})
        trainer_for(base, args, ranked_rows(4, ranks=True))
    trainer_for(base, config(tmp_path, loss_type="pairwise"), ranked_rows(4, ranks=True))


def test_soft_targets_train_and_a_small_one_prefers_the_second(base, tmp_path):
    """Rows whose `rejected` is the better one, and say so by a probability of 0.05: accuracy must rise, not fall."""
    rows = [
        {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"], "preference_probability": 0.05}
        for row in pair_rows(48)
    ]
    sure = [{**row, "preference_probability": 0.5} for row in rows[:2]]  # prefer neither: no metric
    args = config(tmp_path, max_steps=60, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=20)
    trainer = trainer_for(base, args, rows, eval_dataset=Dataset.from_list(rows[:20] + sure))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] >= 0.9 > before["eval_accuracy"]
    assert after["eval_margin"] > 1.0
    assert after["eval_loss"] < before["eval_loss"]

    only_half = trainer.evaluate(Dataset.from_list(sure))
    assert "eval_accuracy" not in only_half  # undefined: left out
    assert only_half["eval_loss"] >= 0.6931 - 1e-4


def test_a_probability_of_one_is_no_probability(base, tmp_path):
    plain = trainer_for(base, config(tmp_path), pair_rows(16))
    soft = trainer_for(base, config(tmp_path), [{**row, "preference_probability": 1.0} for row in pair_rows(16)])
    plain.train()
    soft.train()
    assert history(soft, "loss") == pytest.approx(history(plain, "loss"), abs=1e-7)
    assert history(soft, "accuracy") == history(plain, "accuracy")


def test_values_out_of_range_are_refused(tmp_path):
    for wrong in ({"min_survival": 1.5}, {"min_survival": -0.1}, {"log_table_size": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RewardConfig(str(tmp_path), use_cpu=True, bf16=False, **wrong)


def test_margins_from_ratings_need_ratings(base, tmp_path):
    args = config(tmp_path, loss_kwargs={"margin_from_ratings": True})
    with pytest.raises(DataError, match="margin_from_ratings=True, which needs them.*chosen_rating"):
        trainer_for(base, args, pair_rows(8))
    pairs = Dataset.from_dict({"chosen": [" a"], "rejected": [" b"]})
    with pytest.raises(DataError, match="good_from=0.5, which needs them"):
        RankingObjective("rao_kupper", {"good_from": 0.5}).check_data(pairs, "train")
    rows = [{**row, "chosen_rating": 3.0, "rejected_rating": 1.5} for row in pair_rows(8)]
    trainer_for(base, args, rows)
