"""An optimizer step is the same however it is cut into micro-batches with unequal numbers of groups or labels."""

from typing import Any, NamedTuple

import pytest
import torch

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, history, largest_difference, lora, trainer_for, weights
from tests.trainers.table import logits_of, outcome_rows, rows_of, segment_rows, step_rows, tiny_trainer
from trl_ext.data.collators import GroupCollator
from trl_ext.losses.ranking import ranking_losses


class Run(NamedTuple):
    """A training that is cut in two ways."""

    kind: str
    rows: list[dict[str, Any]]
    arguments: dict[str, Any]


RANKED = ranked_rows(21, k=4, ragged=True, ties=True)
PAIRS = [{**row, "margin": 0.5} for row in pair_rows(21)]
SOFT = [{**row, "preference_probability": number / 20} for number, row in enumerate(pair_rows(21))]
BINARY = segment_rows(24, binary=True)

# 21 rows, two epochs: windows of 8, 8 and 5 groups, the last one of batches of 2, 2 and 1
TWO_EPOCHS = dict(max_steps=-1, num_train_epochs=2, lr_scheduler_type="constant")
RANKING = {
    "bradley_terry": (PAIRS, {}),
    "bradley_terry, soft": (SOFT, {}),
    "bradley_terry, centred": (PAIRS, {"center_rewards_coefficient": 0.1}),
    "pairwise": (RANKED, {"loss_kwargs": {"margin_from_ratings": True}}),
    "plackett_luce": (RANKED, {}),
    "listnet": (RANKED, {"loss_kwargs": {"temperature": 0.5}}),
    "lambda_loss": (RANKED, {}),
    "rao_kupper": (RANKED, {"loss_kwargs": {"good_from": 2.0}}),
    "robust_bradley_terry": (pair_rows(21), {"sft_coefficient": 0.1}),
    "pointwise": (RANKED, {"center_rewards_coefficient": 0.1}),
}
TOKENS = {
    "orm bce": Run("orm", outcome_rows(24), {}),
    "orm bce, class weights": Run("orm", outcome_rows(24), dict(class_weights=[0.5, 2.0])),
    "prm ce": Run("prm", step_rows(24), {}),
    "prm ce, 3 classes": Run("prm", step_rows(24, classes=3), dict(num_labels=3)),
    "prm bce": Run("prm", step_rows(24), dict(num_labels=1, loss_type="bce")),
    "segment mse": Run("segment", segment_rows(24), {}),
    "segment hinge": Run("segment", BINARY, dict(loss_type="hinge", loss_kwargs={"margin": 0.5})),
    "segment ce": Run("segment", BINARY, dict(loss_type="ce", num_labels=2)),
}
# plain gradient descent: Adam would blow up differences of gradients near zero
SGD = dict(optim="sgd", learning_rate=1e-2, train_sampling_strategy="sequential", max_steps=3)
RUNS = {name: Run("reward", rows, {"loss_type": name.split(",")[0], **TWO_EPOCHS, **more})
        for name, (rows, more) in RANKING.items()}  # fmt: skip
RUNS |= {
    f"{name}, {averaging}": Run(run.kind, run.rows, {**SGD, **run.arguments, "averaging": averaging})
    for name, run in TOKENS.items()
    for averaging in ("token", "sequence")
}


def train(base, folder, run, size, accumulation, **more):
    sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    trainer = tiny_trainer(run.kind, base, folder, run.rows, **(run.arguments | sizes | more))
    trainer.train()
    return trainer


def test_every_ranking_loss_is_in_the_table():
    built_in = {name for name, origin in ranking_losses.available() if origin.startswith("trl_ext.")}
    assert {name.split(",")[0] for name in RANKING} == built_in


@pytest.mark.parametrize("name", RUNS)
def test_batches_of_two_or_eight_are_the_same(name, base, tmp_path):
    run = RUNS[name]
    whole, cut = (train(base, tmp_path / str(size), run, size, 8 // size) for size in (8, 2))
    losses = history(whole, "loss")
    assert history(cut, "loss") == pytest.approx(losses, abs=1e-5)
    if run.kind == "reward":
        assert len(losses) == 6
        for metric in ("grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "num_tokens"):
            assert history(cut, metric) == pytest.approx(history(whole, metric), abs=1e-4, nan_ok=True), metric
        # Adam divides tiny gradients by their own size, so that weights are looser than losses
        assert largest_difference(weights(whole), weights(cut)) < 1e-4
    else:
        assert len({len(row.get("labels", row.get("segments", row.get("completion")))) for row in run.rows}) > 1
        assert len(losses) == len(set(losses)) == 3
        assert history(cut, "grad_norm") == pytest.approx(history(whole, "grad_norm"), rel=1e-4)
        assert largest_difference(weights(cut), weights(whole)) < 1e-5


def test_gradients_of_a_window_are_the_same(base, tmp_path):
    """The gradient itself, before any optimizer; the window holds 5 groups in batches of 2, 2 and 1."""
    step = dict(max_grad_norm=0.0, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_steps=-1)
    run = Run("reward", RANKED[:5], {"num_train_epochs": 1, **step})
    before = weights(tiny_trainer("reward", base, tmp_path))
    gradients = []
    for size in (8, 2):
        after = weights(train(base, tmp_path, run, size, 8 // size))
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


@pytest.mark.parametrize("averaging", ["token", "sequence"])
def test_the_loss_of_a_step_is_the_mean_over_its_labels(averaging, base, tmp_path):
    """Worked out by hand; the mean of the micro-batches' means is another number."""
    run = Run("prm", step_rows(8), SGD | {"averaging": averaging})
    trainer = train(base, tmp_path, run, 4, 2)
    fresh = tiny_trainer("prm", base, tmp_path, run.rows, averaging=averaging)
    of_rows = []
    for row in fresh.train_dataset:
        logits = logits_of(fresh, row)[row["label_positions"]]  # (n, 2)
        labels = torch.tensor(row["label_values"]).long()
        of_rows.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    want = torch.cat(of_rows).mean() if averaging == "token" else torch.stack([r.mean() for r in of_rows]).mean()
    assert history(trainer, "loss")[0] == pytest.approx(want.item(), abs=1e-5)


@pytest.mark.parametrize("averaging", ["token", "sequence"])
def test_a_window_or_a_batch_without_labels(averaging, base, tmp_path):
    """Segment rows may have no segment: a micro-batch of them adds nothing, a whole step of them moves nothing."""
    rows = segment_rows(8)
    for row in rows[:4]:
        row["segments"] = []
    arguments = SGD | {"averaging": averaging, "categories": ["length", "tone"]}
    alone = train(base, tmp_path / "a", Run("segment", rows[4:] * 3, arguments), 4, 1)
    beside = train(base, tmp_path / "b", Run("segment", rows * 3, arguments), 4, 2)
    assert history(beside, "loss") == pytest.approx(history(alone, "loss"), abs=1e-5)
    assert largest_difference(weights(beside), weights(alone)) < 1e-5

    empty = train(base, tmp_path / "c", Run("segment", rows[:4] * 6, arguments), 4, 2)
    assert history(empty, "loss") == [0.0, 0.0, 0.0]
    start = weights(tiny_trainer("segment", base, tmp_path, rows))
    assert largest_difference(weights(empty), start) == 0


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("orm", "segment")]


@pytest.mark.parametrize("kind", ["reward", "prm", *SLOW])
def test_gradient_checkpointing_changes_nothing(kind, base, tmp_path):
    """Off, reentrant and not give the same loss and LoRA weights."""
    run = Run(kind, rows_of(kind, 12), SGD | {"trainer_kwargs": {"peft_config": lora()}})
    plain, *others = (
        train(base, tmp_path / str(number), run, 4, 1, **arguments)
        for number, arguments in enumerate(
            [
                dict(gradient_checkpointing=False),
                dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
                dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
            ]
        )
    )
    start = weights(tiny_trainer(kind, base, tmp_path, trainer_kwargs={"peft_config": lora()}))
    assert max((weights(plain)[name] - start[name]).abs().max() for name in start if "lora_B" in name) > 0
    for other in others:
        assert history(other, "loss") == pytest.approx(history(plain, "loss"), abs=1e-4)
        assert largest_difference(weights(other), weights(plain)) < 1e-4
