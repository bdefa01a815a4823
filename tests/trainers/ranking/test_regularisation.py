"""Options that regularise reward models in training: what they add to the loss, of one model and of an ensemble."""

import pytest
import torch
from peft import LoraConfig

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.helpers import config, trainer_for
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("base"), "llama"))


def loss_of(trainer, batch):
    """The training loss of one batch of its data, and the scores."""
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    return loss, outputs["scores"]


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_the_batch_penalty_of_one_model(tiny, tmp_path, shared_prefix):
    rows = ranked_rows(4, k=3, ragged=True)
    options = dict(loss_type="plackett_luce", shared_prefix=shared_prefix)
    plain = trainer_for(tiny, config(tmp_path, **options), rows)
    ours = trainer_for(tiny, config(tmp_path, batch_sum_to_zero_coefficient=0.5, **options), rows)
    batch = ours.data_collator(list(ours.train_dataset))
    assert ("prefix_layout" in batch) == shared_prefix
    loss, scores = loss_of(ours, batch)
    without, _ = loss_of(plain, batch)
    mean = scores[batch["group_mask"]].mean()
    assert abs(mean) > 1e-3 and loss.item() == pytest.approx((without + 0.5 * mean**2).item(), abs=1e-6)
    # the gradient at the head's weights: that of the plain loss, and 0.5 * 2 * mean times that of the mean
    for trainer in (ours, plain):
        trainer.model.zero_grad()
    loss.backward()
    without.backward()
    again = loss_of(ours, batch)[1]
    head = ours.model.score.weight
    (of_mean,) = torch.autograd.grad(again[batch["group_mask"]].mean(), head)
    expected = plain.model.score.weight.grad + mean.detach() * of_mean
    torch.testing.assert_close(head.grad, expected, rtol=1e-4, atol=1e-6)
    ours.model.eval()
    plain.model.eval()
    with torch.no_grad():
        assert ours.compute_loss(ours.model, batch) == plain.compute_loss(plain.model, batch)


def test_accumulated_batches_have_a_penalty_each(tiny, tmp_path):
    """Two batches of an accumulation window: the mean of their penalties, weighted by their groups."""
    ours = trainer_for(tiny, config(tmp_path, batch_sum_to_zero_coefficient=1.0), pair_rows(4))
    plain = trainer_for(tiny, config(tmp_path), pair_rows(4))
    rows = list(ours.train_dataset)
    parts = [ours.data_collator(rows[:3]), ours.data_collator(rows[3:])]
    ours.model.train()
    plain.model.train()
    groups = torch.tensor(4)
    found = sum(ours.compute_loss(ours.model, part, num_items_in_batch=groups) for part in parts)
    without = sum(plain.compute_loss(plain.model, part, num_items_in_batch=groups) for part in parts)
    means = [loss_of(ours, part)[1].mean() for part in parts]
    assert (found - without).item() == pytest.approx(((3 * means[0] ** 2 + means[1] ** 2) / 4).item(), abs=1e-6)


@pytest.mark.parametrize("strategy", ["shared", "bootstrap", "shuffle"])
def test_the_batch_penalty_of_an_ensemble_is_per_member(tiny, tmp_path, strategy):
    def made(**more):
        args = config(
            tmp_path,
            RewardEnsembleConfig,
            num_members=2,
            data_strategy=strategy,
            max_steps=1,
            learning_rate=0.0,
            **more,
        )
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
        return trainer_for(tiny, args, pair_rows(8), RewardEnsembleTrainer, peft_config=lora)

    seen = {}

    def watch(trainer, name):
        inner = trainer.compute_loss

        def compute_loss(model, inputs, **kwargs):
            loss, outputs = inner(model, inputs, **(kwargs | {"return_outputs": True}))
            seen[name] = (loss.detach(), outputs["scores"].detach(), inputs.get("member_weights"))
            return loss

        trainer.compute_loss = compute_loss
        trainer.train()

    watch(made(batch_sum_to_zero_coefficient=2.0), "ours")
    watch(made(), "plain")
    loss, scores, weights = seen["ours"]
    members = scores.permute(2, 0, 1)  # (M, B, K)
    torch.testing.assert_close(scores, seen["plain"][1])
    counted = torch.ones(members.shape[:2]) if weights is None else weights
    means = (members * counted[..., None]).sum((1, 2)) / (2 * counted.sum(1)).clamp(min=1)
    assert abs(means[0] - means[1]) > 1e-4
    assert (loss - seen["plain"][0]).item() == pytest.approx(2.0 * means.square().sum().item(), rel=1e-3, abs=1e-6)
    if strategy == "bootstrap":
        assert not torch.equal(weights[0], weights[1])


def test_a_loss_at_chance_is_seen_beside_the_penalty_of_an_ensemble(tiny, tmp_path):
    watched = []
    for coefficient in (None, 5.0):
        args = config(tmp_path, RewardEnsembleConfig, num_members=2, batch_sum_to_zero_coefficient=coefficient)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
        trainer = trainer_for(tiny, args, pair_rows(4), RewardEnsembleTrainer, peft_config=lora)
        trainer._monitor.update = lambda *arguments, **options: watched.append(arguments[3])
        batch = trainer.data_collator(list(trainer.train_dataset))
        watched.append(loss_of(trainer, batch)[0])
    plain_losses, plain, losses, loss = watched
    assert loss > plain + 1e-4
    torch.testing.assert_close(losses, plain_losses)


def test_a_negative_coefficient_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="batch_sum_to_zero_coefficient=-1"):
        trainer_for(tiny, config(tmp_path, batch_sum_to_zero_coefficient=-1.0))


def test_equal_ratings_of_a_pair_are_a_tie_for_rao_kupper(tiny, tmp_path):
    rows = [
        {**row, "chosen_rating": 3.0, "rejected_rating": 3.0 - (number % 2)} for number, row in enumerate(pair_rows(4))
    ]
    trainer = trainer_for(tiny, config(tmp_path, loss_type="rao_kupper"), rows)
    ratings = [row["candidate_ratings"] for row in trainer.train_dataset]
    assert [first == second for first, second in ratings] == [True, False, True, False]
    plain = trainer_for(tiny, config(tmp_path), rows)  # for Bradley-Terry they are metadata
    assert all(first > second for first, second in (row["candidate_ratings"] for row in plain.train_dataset))


def test_tied_pairs_teach_with_rao_kupper(tiny, tmp_path):
    """Every row is a tie: other losses give no gradient, this one does, and "both bad" lowers the scores."""
    rows = [{"prompt": f"q{n}", "completions": [" a b", " c"], "ratings": [0.0, 0.0]} for n in range(4)]
    for kwargs, moved in ((None, False), ({"theta": 2.0}, True), ({"good_from": 0.0}, True)):
        loss_type = "plackett_luce" if kwargs is None else "rao_kupper"
        trainer = trainer_for(tiny, config(tmp_path, loss_type=loss_type, loss_kwargs=kwargs), rows)
        loss, _ = loss_of(trainer, trainer.data_collator(list(trainer.train_dataset)))
        loss.backward()
        assert bool(trainer.model.score.weight.grad.any()) is moved
    # a threshold of 0 reads the size of ratings, which ranks do not have
    ranked = [{**{k: v for k, v in row.items() if k != "ratings"}, "ranks": [0, 0]} for row in rows]
    trainer_for(tiny, config(tmp_path, loss_type="rao_kupper"), ranked)
    with pytest.raises(ValueError, match="rank"):
        trainer_for(tiny, config(tmp_path, loss_type="rao_kupper", loss_kwargs={"good_from": 0.0}), ranked)


def test_a_share_of_wrong_labels_is_an_argument_of_the_loss(tiny, tmp_path):
    args = config(tmp_path, loss_type="robust_bradley_terry", loss_kwargs={"flip_probability": 0.2}, max_steps=2)
    trainer = trainer_for(tiny, args, pair_rows(8))
    trainer.train()
    assert 0 < trainer.state.log_history[0]["loss"] < 1.61  # at most -log 0.2
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_for(tiny, config(tmp_path, loss_type="robust_bradley_terry", label_smoothing_factor=0.1))
