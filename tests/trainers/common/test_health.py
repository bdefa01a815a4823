"""Numbers that are not finite stop the training within a step and harm no weight; a model that does not
learn is warned of, once."""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, history, largest_difference, lora, trainer_for, weights
from trl_ext.data.validation import DataError
from trl_ext.trainers.common import health
from trl_ext.trainers.common.health import HealthMonitor, NotFiniteError, RewardTrainingWarning, check_finite


NAN, INF = float("nan"), float("inf")


class At(TrainerCallback):
    """Calls a function at the start of one step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.function(model)


# ------------------------------------------------------------------------------------------------------ not finite
@pytest.mark.parametrize("value", [NAN, INF, None, -0.5])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_margin_is_a_data_error(value, streaming, base, tmp_path):
    rows = [{**row, "margin": 0.5 if number != 2 else value} for number, row in enumerate(pair_rows(4))]
    data = Dataset.from_list(rows)
    with pytest.raises(DataError, match="train data, row 2, column 'margin'"):
        trainer_for(base, config(tmp_path), data.to_iterable_dataset() if streaming else data).train()


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_rating_is_a_data_error(value, base, tmp_path):
    rows = ranked_rows(4, k=3)
    rows[1]["ratings"][2] = value
    with pytest.raises(DataError, match="train data, row 1, column 'ratings'"):
        trainer_for(base, config(tmp_path, loss_type="plackett_luce"), rows)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("peft", [False, True])
def test_a_weight_that_breaks_stops_the_step_and_names_rows(value, peft, base, tmp_path):
    kept = {}

    def break_embedding(model):
        kept.update(weights(trainer))
        embeddings = model.get_input_embeddings().weight
        used = trainer.train_dataset[5]["candidate_ids"][0][-3]
        embeddings.data[used] = value
        kept.update({name: p.detach().clone() for name, p in trainer.model.named_parameters() if name in kept})

    args = config(tmp_path, max_steps=6, train_sampling_strategy="sequential")
    callbacks = [At(1, break_embedding)]
    trainer = trainer_for(base, args, pair_rows(24), callbacks=callbacks, peft_config=lora() if peft else None)
    with pytest.raises(NotFiniteError, match=r"score of data set row\(s\) \[.*5.*\] is NaN or infinite"):
        trainer.train()
    assert trainer.state.global_step == 1
    same = {
        name: torch.equal(p, kept[name]) or not kept[name].isfinite().all() for name, p in weights(trainer).items()
    }
    assert all(same.values())


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_breaks_stops_before_the_optimizer(value, clip, base, tmp_path):
    kept = {}

    def break_gradient(model):
        kept.update(weights(trainer))
        parameter = model.model.layers[0].mlp.up_proj.weight
        parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value))

    args = config(tmp_path, max_steps=6, max_grad_norm=clip, train_sampling_strategy="sequential")
    trainer = trainer_for(base, args, pair_rows(24), callbacks=[At(2, break_gradient)])
    with pytest.raises(NotFiniteError, match=r"gradient of step 3 \(data set row\(s\) \[8, 9, 10, 11\]\)"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert largest_difference(weights(trainer), kept) == 0


def test_row_numbers_of_a_shared_stream_are_not_said_to_be_unique(base, tmp_path):
    """Two workers read two shards each and number their rows from 0; one reader numbers all of them."""
    rows = Dataset.from_list(pair_rows(16)).to_iterable_dataset(num_shards=4)
    for workers, shared in ((2, True), (0, False)):
        args = config(tmp_path, max_steps=2, dataloader_num_workers=workers)
        trainer = trainer_for(base, args, rows)
        trainer.model.score.weight.data[0, 3] = NAN
        with pytest.raises(NotFiniteError, match=r"row\(s\) \[") as caught:
            trainer.train()
        assert ("a stream of 4 shards, and 2 readers" in str(caught.value)) == shared


def test_a_bad_row_of_a_shared_stream_names_who_counted_it(base, tmp_path):
    rows = [{**row, "margin": -1.0 if number == 9 else 0.5} for number, row in enumerate(pair_rows(12))]
    data = Dataset.from_list(rows).to_iterable_dataset(num_shards=4)  # row 9 is row 3 of the second worker's
    args = config(tmp_path, max_steps=4, dataloader_num_workers=2)
    with pytest.raises(Exception, match="row 3 as counted by DataLoader worker 1 of 2, column 'margin'"):
        trainer_for(base, args, data).train()


def test_an_evaluation_stops_too(base, tmp_path):
    trainer = trainer_for(base, config(tmp_path), eval_dataset=Dataset.from_list(pair_rows(4)))
    trainer.model.score.weight.data[0, 3] = NAN
    with pytest.raises(NotFiniteError, match=r"row\(s\) \[0, 1, 2, 3\]"):
        trainer.evaluate()


def test_a_loss_that_breaks_names_its_rows_only():
    scores, rows = torch.zeros(3, 2), torch.tensor([7, 8, 9])
    check_finite(scores, torch.zeros(3), rows)
    with pytest.raises(NotFiniteError, match=r"loss of data set row\(s\) \[8\] is"):
        check_finite(scores, torch.tensor([0.0, NAN, 0.0]), rows)
    many = torch.full((20,), INF)
    with pytest.raises(NotFiniteError, match=r"\[0, 1, 2, 3, 4, 5, 6, 7\] and 12 more is"):
        check_finite(torch.zeros(20, 2), many, torch.arange(20))


def test_large_finite_scores_are_no_error():
    monitor = HealthMonitor()
    scores = torch.tensor([[3e38, 3e38]])
    monitor.update(0, scores, torch.ones(1, 2).bool(), torch.tensor([3e38]), torch.tensor([0]), lambda: torch.ones(1))


# -------------------------------------------------------------------------------------------------------- warnings
def feed(monitor, steps, loss=0.4, scores=((1.0, -1.0),), head_moves=True, chance=0.6931):
    scores = torch.tensor(scores)
    mask, rows = torch.ones(scores.shape, dtype=torch.bool), torch.arange(len(scores))
    for step in steps:
        losses = torch.full((len(scores),), loss)
        monitor.update(step, scores, mask, losses, rows, lambda: torch.full((len(scores),), chance))
        monitor.end_step(head_moves)


def test_each_finding_warns_once_and_names_its_cause():
    cases = [
        ({"loss": 0.6935}, "within 1 % of the loss of equal scores.*labels in the wrong column"),
        ({"scores": ((0.5, 0.5004),)}, "deviate by less than 1e-3.*frozen or zero head"),
        ({"head_moves": False}, "gradient of exactly 0.*tied"),
    ]
    for kwargs, words in cases:
        with pytest.warns(RewardTrainingWarning, match=words) as caught:
            feed(HealthMonitor(), range(3 * health.CHANCE_STEPS), **kwargs)
        assert len([w for w in caught if w.category is RewardTrainingWarning]) == 1


def test_healthy_numbers_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = HealthMonitor()
        feed(monitor, range(150), loss=0.6931 * 0.98)
        feed(monitor, range(150, 400), loss=0.74)  # worse than chance is no standstill
        feed(monitor, range(400, 402), head_moves=False)  # a tied batch or two
        feed(monitor, range(402, 404), scores=((0.5, 0.5),))
        feed(monitor, range(404, 410))
        feed(monitor, range(410, 490), loss=0.6931)  # most of a block, but not the whole
        feed(monitor, range(490, 700))


def test_chance_is_counted_in_optimizer_steps():
    """Many forward passes in a step (accumulation) do not make the judgement earlier."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = HealthMonitor()
        for step in range(health.CHANCE_STEPS - 1):
            feed(monitor, [step] * 8, loss=0.6931)


def test_a_healthy_run_warns_of_nothing(base, tmp_path):
    args = config(tmp_path, max_steps=120, per_device_train_batch_size=8, learning_rate=2e-3)
    trainer = trainer_for(base, args, pair_rows(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RewardTrainingWarning)
        trainer.train()
    assert sum(history(trainer, "accuracy")[-10:]) / 10 > 0.8


def test_a_run_that_cannot_learn_is_warned_of(base, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "CHANCE_STEPS", 20)
    head_to_zero = At(0, lambda model: model.score.weight.data.zero_())
    args = config(tmp_path, max_steps=45, learning_rate=0.0)
    trainer = trainer_for(base, args, callbacks=[head_to_zero])
    with pytest.warns(RewardTrainingWarning) as caught:
        trainer.train()
    messages = [str(w.message) for w in caught if w.category is RewardTrainingWarning]
    assert len(messages) == 2
    assert any("deviate by less than 1e-3" in message for message in messages)
    assert any("within 1 % of the loss of equal scores" in message for message in messages)


def test_ties_and_nothing_else_give_the_head_no_gradient(base, tmp_path):
    rows = [{**row, "ratings": [1.0, 1.0]} for row in ranked_rows(16, k=2)]
    trainer = trainer_for(base, config(tmp_path, max_steps=6), rows)
    with pytest.warns(RewardTrainingWarning, match="gradient of exactly 0") as caught:
        trainer.train()
    assert len([w for w in caught if w.category is RewardTrainingWarning]) == 1
    assert history(trainer, "loss") == [0.0] * 6
