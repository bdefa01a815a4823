"""Token losses: however a step is cut into micro-batches, with unequal label counts, it is the same step."""

import pytest
import torch

from tests.trainers.helpers import history, largest_difference, lora, weights
from tests.trainers.table import KINDS, outcome_rows, segment_rows, step_rows, token_trainer


RUNS = {
    "orm bce": ("orm", outcome_rows(24), {}),
    "orm bce, class weights": ("orm", outcome_rows(24), dict(class_weights=[0.5, 2.0])),
    "prm ce": ("prm", step_rows(24), {}),
    "prm ce, 3 classes": ("prm", step_rows(24, classes=3), dict(num_labels=3)),
    "prm bce": ("prm", step_rows(24), dict(num_labels=1, loss_type="bce")),
    "segment mse": ("segment", segment_rows(24), {}),
    "segment hinge": ("segment", segment_rows(24, binary=True), dict(loss_type="hinge", loss_kwargs={"margin": 0.5})),
    "segment ce": ("segment", segment_rows(24, binary=True), dict(loss_type="ce", num_labels=2)),
}


def run(base, folder, kind, rows, size, steps, **arguments):
    # plain gradient descent: Adam would blow up differences of gradients near zero
    trainer = token_trainer(
        kind,
        base,
        folder,
        rows,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=1e-2,
        max_steps=3,
        **arguments,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("averaging", ["token", "sequence"])
@pytest.mark.parametrize("name", RUNS)
def test_4x2_equals_8(name, averaging, base, tmp_path):
    kind, rows, arguments = RUNS[name]
    assert len({len(row.get("labels", row.get("segments", row.get("completion")))) for row in rows}) > 1
    runs = [
        run(base, tmp_path / f"{size}", kind, rows, size, 8 // size, averaging=averaging, **arguments)
        for size in (8, 2)
    ]
    whole = history(runs[0], "loss")
    assert len(whole) == len(set(whole)) == 3
    for other in runs[1:]:
        assert history(other, "loss") == pytest.approx(whole, abs=1e-5)
        assert history(other, "grad_norm") == pytest.approx(history(runs[0], "grad_norm"), rel=1e-4)
        assert largest_difference(weights(other), weights(runs[0])) < 1e-5


def test_the_loss_of_a_step_is_the_mean_over_its_labels(base, tmp_path):
    """By hand, and not the mean of the micro-batches' means."""
    rows = step_rows(8)
    for averaging in ("token", "sequence"):
        trainer = run(base, tmp_path, "prm", rows, 4, 2, averaging=averaging)
        fresh = token_trainer("prm", base, tmp_path, rows, averaging=averaging)
        of_rows = []
        for row in fresh.train_dataset:
            ids = torch.tensor([row["span_input_ids"]])
            with torch.no_grad():
                logits = fresh._outputs_of(
                    fresh.model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                )
            logits = logits[0, row["label_positions"], 0]  # (n, 2)
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
    alone = run(
        base, tmp_path / "a", "segment", rows[4:] * 3, 4, 1, averaging=averaging, categories=["length", "tone"]
    )
    beside = run(base, tmp_path / "b", "segment", rows * 3, 4, 2, averaging=averaging, categories=["length", "tone"])
    assert history(beside, "loss") == pytest.approx(history(alone, "loss"), abs=1e-5)
    assert largest_difference(weights(beside), weights(alone)) < 1e-5

    empty = run(
        base, tmp_path / "c", "segment", rows[:4] * 6, 4, 2, averaging=averaging, categories=["length", "tone"]
    )
    assert history(empty, "loss") == [0.0, 0.0, 0.0]
    start = weights(token_trainer("segment", base, tmp_path, rows))
    assert largest_difference(weights(empty), start) == 0


@pytest.mark.parametrize("kind", ["prm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("orm", "segment"))])
def test_gradient_checkpointing_changes_nothing(kind, base, tmp_path):
    """Off, reentrant and not give the same loss and LoRA weights."""
    runs = [
        run(
            base, tmp_path / str(number), kind, KINDS[kind][2](12), 4, 1,
            trainer_kwargs={"peft_config": lora()}, **arguments,
        )
        for number, arguments in enumerate(
            [
                dict(gradient_checkpointing=False),
                dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
                dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
            ]
        )
    ]  # fmt: skip
    start = weights(token_trainer(kind, base, tmp_path, trainer_kwargs={"peft_config": lora()}))
    assert max((weights(runs[0])[name] - start[name]).abs().max() for name in start if "lora_B" in name) > 0
    for other in runs[1:]:
        assert history(other, "loss") == pytest.approx(history(runs[0], "loss"), abs=1e-4)
        assert largest_difference(weights(other), weights(runs[0])) < 1e-4
