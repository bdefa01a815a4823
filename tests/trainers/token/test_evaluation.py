"""Evaluations of token-level trainers: several data sets, predictions for every token, any batch size."""

import math

import pytest
from datasets import Dataset

from tests.trainers.helpers import without_time
from tests.trainers.table import TOKEN, rows_of, tiny_trainer


def test_several_data_sets_are_evaluated_by_name(base, tmp_path):
    rows = {"one": rows_of("prm", 9, seed=1), "two": rows_of("prm", 7, seed=2)}

    data = {name: Dataset.from_list(given) for name, given in rows.items()}
    trainer = tiny_trainer("prm", base, tmp_path, eval_rows=data, eval_strategy="steps", eval_steps=4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_two_loss" in entry]
    assert len(logged) == 1
    again = trainer.evaluate(data)  # rows as they were given
    assert again["eval_one_loss"] == pytest.approx(trainer.evaluate()["eval_one_loss"], abs=1e-6)
    alone = trainer.evaluate(data["two"], metric_key_prefix="alone")
    assert alone["alone_balanced_accuracy"] == again["eval_two_balanced_accuracy"]


@pytest.mark.parametrize("kind", TOKEN)
def test_predictions_are_the_outputs_of_all_tokens(kind, base, tmp_path):
    rows = rows_of(kind, 5)
    trainer = tiny_trainer(kind, base, tmp_path, eval_rows=rows)

    output = trainer.predict(Dataset.from_list(rows))
    width = max(len(row["span_input_ids"]) for row in trainer.eval_dataset)
    shape = {"orm": (5, width, 1), "prm": (5, width, 2), "segment": (5, width, 2, 1)}[kind]
    assert output.predictions.shape == shape
    assert output.label_ids.shape == (shape[:2] if kind != "segment" else shape[:3])
    labelled = sum(len(row["label_positions"]) for row in trainer.eval_dataset)
    assert (output.label_ids != -100).sum() == labelled
    assert output.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert all(math.isfinite(value) for value in output.metrics.values())


def test_metrics_do_not_depend_on_the_batch_size(base, tmp_path):
    """9 rows give the same values at batch 1, 2 and 8."""
    for kind in TOKEN:
        rows = rows_of(kind, 9)
        for averaging in ("token", "sequence"):
            trainer = tiny_trainer(kind, base, tmp_path, eval_rows=rows, averaging=averaging)
            found = []
            for size in (1, 2, 8):
                trainer.args.per_device_eval_batch_size = size
                found.append(without_time(trainer.evaluate()))
            assert len(found[0]) >= 5
            assert found[1] == pytest.approx(found[0], abs=1e-6)
            assert found[2] == pytest.approx(found[0], abs=1e-6)
