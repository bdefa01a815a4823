"""The number of groups that share an optimizer step decides, not how they were cut into batches."""

import pytest
import torch

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, history, largest_difference, trainer_for, weights
from trl_ext.data.collators import GroupCollator
from trl_ext.losses.ranking import ranking_losses


RANKED = ranked_rows(21, k=4, ragged=True, ties=True)
PAIRS = [{**row, "margin": 0.5} for row in pair_rows(21)]
SOFT = [{**row, "preference_probability": number / 20} for number, row in enumerate(pair_rows(21))]

RUNS = {
    "bradley_terry": (PAIRS, {}),
    "bradley_terry, soft": (SOFT, {}),
    "bradley_terry, centred": (PAIRS, {"center_rewards_coefficient": 0.1}),
    "pairwise": (RANKED, {"loss_kwargs": {"margin_from_ratings": True}}),
    "plackett_luce": (RANKED, {}),
    "listnet": (RANKED, {"loss_kwargs": {"temperature": 0.5}}),
    "pointwise": (RANKED, {"center_rewards_coefficient": 0.1}),
}


def test_every_loss_is_in_the_table():
    built_in = {name for name, origin in ranking_losses.available() if origin.startswith("trl_ext.")}
    assert {name.split(",")[0] for name in RUNS} == built_in


@pytest.mark.parametrize("name", RUNS)
def test_batches_of_two_or_eight_are_the_same(name, base, tmp_path):
    """21 rows: windows of 8, 8 and 5 groups, the last one of batches of 2, 2 and 1."""
    rows, kwargs = RUNS[name]
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        args = config(
            tmp_path,
            loss_type=name.split(",")[0],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=-1,
            num_train_epochs=2,
            lr_scheduler_type="constant",
            **kwargs,
        )
        trainer = trainer_for(base, args, rows)
        trainer.train()
        runs.append(trainer)
    one, cut = runs
    assert len(history(one, "loss")) == 6
    assert history(cut, "loss") == pytest.approx(history(one, "loss"), abs=1e-5)
    for metric in ("grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "num_tokens"):
        assert history(cut, metric) == pytest.approx(history(one, metric), abs=1e-4, nan_ok=True), metric
    # Adam divides tiny gradients by their own size, so that weights are looser than losses
    assert largest_difference(weights(one), weights(cut)) < 1e-4


def test_gradients_of_a_window_are_the_same(base, tmp_path):
    """The gradient itself, before any optimizer; the window holds 5 groups in batches of 2, 2 and 1."""
    gradients = []
    for size, accumulation in ((8, 1), (2, 4)):
        args = config(
            tmp_path,
            loss_type="plackett_luce",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_steps=-1,
            num_train_epochs=1,
        )
        trainer = trainer_for(base, args, RANKED[:5])
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        gradients.append({key: before[key] - after[key] for key in before})
    assert max(g.abs().max().item() for g in gradients[0].values()) > 1e-3
    assert largest_difference(*gradients) < 1e-5


def test_the_loss_of_a_step_is_the_mean_over_its_groups(base, tmp_path):
    """Worked out beside the trainer, from the scores of the untouched model."""
    trainer = trainer_for(base, config(tmp_path, max_steps=1, loss_type="plackett_luce"), RANKED[:4])
    padded = GroupCollator(trainer.processing_class.pad_token_id)
    batch = padded([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        flat = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    scores = torch.zeros(batch["ratings"].shape).masked_scatter(batch["group_mask"], flat)
    expected = ranking_losses.get("plackett_luce")(scores, batch["ratings"], batch["group_mask"]).mean().item()
    trainer.train()
    assert history(trainer, "loss") == pytest.approx([expected], abs=1e-5)
