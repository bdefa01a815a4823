"""What an evaluation reports, on which rows, and that it counts every row once."""

import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, history, trainer_for, without_time
from tests.trainers.table import tiny_trainer
from trl_ext.data.collators import GroupCollator
from trl_ext.data.validation import DataError
from trl_ext.losses.ranking import bradley_terry, plackett_luce
from trl_ext.models.heads import candidate_scores


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A Plackett-Luce model after a few steps, with 9 rows to evaluate."""
    folder = tmp_path_factory.mktemp("trained")
    args = config(folder, max_steps=6, loss_type="plackett_luce")
    data = Dataset.from_list(ranked_rows(9, k=5, ragged=True, ties=True, seed=3))
    trainer = trainer_for(base, args, ranked_rows(24, k=4), eval_dataset=data)
    trainer.train()
    return trainer


def at_batch_size(trainer, size, data=None):
    trainer.args.per_device_eval_batch_size = size
    return without_time(trainer.evaluate(data))


def test_nine_rows_give_the_same_at_every_batch_size(trained):
    one = at_batch_size(trained, 1)
    assert len(one) >= 12
    assert all(math.isfinite(value) for value in one.values())
    for size in (2, 4, 8, 16):
        assert at_batch_size(trained, size) == pytest.approx(one, abs=1e-6), size


def test_the_numbers_are_those_worked_out_beside_the_trainer(trained):
    data = trained.eval_dataset
    scores, losses, right, lengths = [], [], [], []
    with torch.no_grad():
        for row in data:
            batch = GroupCollator(trained.processing_class.pad_token_id)([row])  # padded rows
            values = candidate_scores(trained.model.eval(), batch["input_ids"], batch["attention_mask"])
            ratings = batch["ratings"][0]
            scores += values.tolist()
            losses += plackett_luce(values[None], batch["ratings"], batch["group_mask"]).tolist()
            pairs = [(i, j) for i in range(len(values)) for j in range(len(values)) if ratings[i] > ratings[j]]
            if pairs:
                right.append(np.mean([float(values[i] > values[j]) for i, j in pairs]))
                counts = batch["completion_lengths"][0]
                lengths.append(np.mean([float(counts[i] > counts[j]) for i, j in pairs]))
    found = at_batch_size(trained, 4)
    assert found["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert found["eval_accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    assert found["eval_length_accuracy"] == pytest.approx(np.mean(lengths), abs=1e-6)
    assert found["eval_mean_reward"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert found["eval_min_reward"] == pytest.approx(min(scores), abs=1e-6)  # of the whole set, not of batches
    assert found["eval_max_reward"] == pytest.approx(max(scores), abs=1e-6)
    assert -1 <= found["eval_length_correlation"] <= 1


def test_the_length_baseline_is_seen_through(base, tmp_path):
    """The better answer is always the longer one; a fresh model that has learnt that shows it."""
    rows = [{**row, "chosen": row["chosen"] * 3, "rejected": " bad."} for row in pair_rows(24)]
    args = config(tmp_path, max_steps=20, learning_rate=3e-3)
    trainer = trainer_for(base, args, rows, eval_dataset=Dataset.from_list(rows[:9]))
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_length_accuracy"] == 1.0
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_length_correlation"] > 0.9


def test_a_dictionary_of_data_sets(base, tmp_path):
    sets = {"near": Dataset.from_list(pair_rows(6, seed=1)), "far": Dataset.from_list(pair_rows(5, seed=2))}
    args = config(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, metric_for_best_model="far_accuracy")
    trainer = trainer_for(base, args, eval_dataset=sets)
    trainer.train()
    for name in ("near", "far"):
        assert len(history(trainer, f"eval_{name}_accuracy")) == 2
        alone = trainer.evaluate(sets[name])
        assert history(trainer, f"eval_{name}_loss")[-1] == pytest.approx(alone["eval_loss"], abs=1e-6)
        assert history(trainer, f"eval_{name}_margin")[-1] == pytest.approx(alone["eval_margin"], abs=1e-6)
    both = trainer.evaluate(sets)
    assert {"eval_near_loss", "eval_far_loss"} <= set(both)


def test_a_new_data_set_after_training_and_a_chosen_prefix(trained):
    data = Dataset.from_list(pair_rows(5, seed=9))
    metrics = trained.evaluate(data, metric_key_prefix="held_out")
    assert {"held_out_loss", "held_out_accuracy"} <= set(metrics)
    assert trained.evaluate(data)["eval_loss"] == pytest.approx(metrics["held_out_loss"], abs=1e-7)
    with pytest.raises(DataError, match="eval data.*column 'chosen'"):
        trained.evaluate(Dataset.from_list([{"text": "no pair"}]))


def test_predict_scores_rows_in_order_and_leaves_no_trace(trained, base, tmp_path):
    rows = ranked_rows(7, k=4, ragged=True, seed=11)
    before = at_batch_size(trained, 4)
    output = trained.predict(Dataset.from_list(rows))
    assert output.predictions.shape == (7, 4)
    assert {"test_loss", "test_accuracy", "test_kendall_tau"} <= set(output.metrics)
    prepared = tiny_trainer("reward", base, tmp_path, eval_rows=rows).eval_dataset
    for row, scores in zip(prepared, output.predictions, strict=True):
        batch = GroupCollator(trained.processing_class.pad_token_id)([row])  # padded rows
        with torch.no_grad():
            alone = candidate_scores(trained.model.eval(), batch["input_ids"], batch["attention_mask"])
        assert scores[: len(alone)].tolist() == pytest.approx(alone.tolist(), abs=1e-5)
        assert (scores[len(alone) :] == -100).all()
    assert at_batch_size(trained, 4) == before


def test_compute_metrics_is_given_all_scores(base, tmp_path):
    seen = []

    def compute(prediction):
        seen.append(prediction.predictions)
        return {"spread": float(prediction.predictions.std()), "accuracy": -1.0}

    rows = Dataset.from_list(pair_rows(9))
    trainer = trainer_for(base, config(tmp_path), eval_dataset=rows, compute_metrics=compute)
    metrics = trainer.evaluate()
    assert seen[0].shape == (9, 2)
    assert metrics["eval_spread"] > 0
    assert metrics["eval_accuracy"] == -1.0  # the user's word
    assert "eval_margin" in metrics


# ---------------------------------------------------------------------------------------------------------- streams
def stream(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


def endless(rows):
    def generate():
        while True:
            yield from rows

    return IterableDataset.from_generator(generate)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_trains_as_a_data_set_does(workers, base, tmp_path):
    rows = pair_rows(40)
    kwargs = dict(max_steps=8, train_sampling_strategy="sequential", dataloader_num_workers=workers)
    listed = trainer_for(base, config(tmp_path, **kwargs), rows)
    streamed = trainer_for(base, config(tmp_path, **kwargs), stream(rows))
    listed.train()
    streamed.train()
    assert history(streamed, "loss") == pytest.approx(history(listed, "loss"), abs=1e-6)


def test_an_endless_stream_without_known_columns(base, tmp_path):
    data = endless(ranked_rows(6, k=3))
    assert data.column_names is None
    args = config(tmp_path, max_steps=8, loss_type="pairwise")
    trainer = trainer_for(base, args, data, eval_dataset=stream(ranked_rows(9, k=3, seed=2)))
    trainer.train()
    assert len(history(trainer, "loss")) == 8
    listed = trainer.evaluate(Dataset.from_list(ranked_rows(9, k=3, seed=2)))
    for size in (1, 2, 8):
        assert at_batch_size(trainer, size) == pytest.approx(without_time(listed), abs=1e-6)


def test_a_stream_stops_at_a_bad_row_by_its_number(base, tmp_path):
    rows = pair_rows(12)
    rows[9]["rejected"] = ""
    rows[9]["chosen"] = None
    with pytest.raises(DataError, match="train data, row 9, column 'chosen'"):
        trainer_for(base, config(tmp_path), stream(rows)).train()


def too_long(rows, keep):
    return [{**row, "chosen": row["chosen"] * (1 if keep(number) else 8)} for number, row in enumerate(rows)]


@pytest.mark.parametrize("kept", [0, 4])
def test_a_short_stream_with_too_few_rows_ends_in_an_error(kept, base, tmp_path):
    rows = too_long(pair_rows(24), lambda number: number < kept)
    with pytest.raises(DataError, match=f"train data: found {kept} of 24 rows kept"):
        trainer_for(base, config(tmp_path, max_steps=30, max_length=48), stream(rows)).train()
    # the steps end before the stream does, so nobody knows how many rows it has
    trainer_for(
        base, config(tmp_path, max_steps=1, max_length=48), stream(too_long(pair_rows(24), lambda n: n == 9))
    ).train()


def test_a_short_stream_for_evaluation_needs_rows_too(base, tmp_path):
    streams = {"good": stream(pair_rows(8)), "bad": stream(too_long(pair_rows(8), lambda number: number == 5))}
    trainer = trainer_for(base, config(tmp_path, max_length=48), eval_dataset=streams)
    assert "eval_good_loss" in trainer.evaluate(streams["good"], metric_key_prefix="eval_good")
    with pytest.raises(DataError, match="bad data: found 1 of 8 rows kept"):
        trainer.evaluate()


# -------------------------------------------------------------------------------------------------- what was dropped
def test_dropped_rows_are_said_once_and_logged_once(base, tmp_path, caplog):
    rows = [
        {**row, "chosen": row["chosen"] * (8 if number % 4 == 0 else 1)} for number, row in enumerate(pair_rows(32))
    ]
    args = config(tmp_path, max_steps=6, max_length=48, logging_steps=2)
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        trainer = trainer_for(base, args, rows, eval_dataset=Dataset.from_list(rows[:8]))
        trainer.train()
        trainer.evaluate()
    said = [record.message for record in caplog.records if record.name == "trl_ext.data.report"]
    assert len(said) == 2
    assert "train data: 24 of 32 rows kept; 8 dropped: longer than max_length=48" in said[0]
    assert "eval data: 6 of 8 rows kept" in said[1]
    for name, value in (("data/train/rows", 32), ("data/train/kept", 24), ("data/train/dropped", 8)):
        assert history(trainer, name) == [value]
    assert history(trainer, "data/eval/dropped") == [2]


def test_too_few_surviving_rows_stop_the_construction(base, tmp_path):
    rows = [{**row, "chosen": row["chosen"] * (8 if number % 4 else 1)} for number, row in enumerate(pair_rows(16))]
    with pytest.raises(DataError, match="4 of 16 rows kept"):
        trainer_for(base, config(tmp_path, max_length=48), rows)
    assert len(trainer_for(base, config(tmp_path, max_length=48, min_survival=0.2), rows).train_dataset) == 4


def test_a_stream_counts_as_it_goes(base, tmp_path):
    rows = [
        {**row, "chosen": row["chosen"] * (8 if number % 4 == 0 else 1)} for number, row in enumerate(pair_rows(32))
    ]
    trainer = trainer_for(base, config(tmp_path, max_steps=6, max_length=48), stream(rows))
    trainer.train()
    counts = history(trainer, "data/train/rows")
    assert len(counts) == 6
    assert counts == sorted(counts)
    assert counts[-1] >= 24


# ---------------------------------------------------------------------------------------------------------- logging
def test_training_metrics_count_every_group_of_the_window(base, tmp_path):
    """With unequal batches the logged value is the mean over groups; TRL has the mean over batches."""
    rows = pair_rows(10)
    kwargs = dict(per_device_train_batch_size=4, max_steps=-1, num_train_epochs=1, learning_rate=0.0)
    seen = []

    def watching(scores, ratings, mask):
        seen.append(scores.detach().clone())
        return bradley_terry(scores, ratings, mask)

    trainer = trainer_for(base, config(tmp_path, logging_steps=3, loss_type=watching, **kwargs), rows)
    seen.clear()
    trainer.train()
    scores = torch.cat([batch for batch in seen if batch.any()])  # without the comparison with chance
    assert scores.shape == (10, 2)
    assert history(trainer, "accuracy") == pytest.approx([(scores[:, 0] > scores[:, 1]).float().mean().item()])
    assert history(trainer, "min_reward") == pytest.approx([scores.min().item()])
    assert history(trainer, "mean_reward") == pytest.approx([scores.mean().item()])


def test_steps_after_the_last_log_are_in_the_last_entry_as_in_trl(base, tmp_path):
    trainer = trainer_for(base, config(tmp_path, max_steps=7, logging_steps=5))
    trainer.train()
    last = trainer.state.log_history[-1]
    assert "train_runtime" in last
    assert "accuracy" in last
    assert last["num_tokens"] > history(trainer, "num_tokens")[0]


@pytest.mark.parametrize("steps", [8, 3])  # the first: an evaluation stands between the last step and its log entry
def test_the_metrics_of_an_epoch_are_logged_with_it(steps, base, tmp_path):
    when = {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": steps}
    args = config(tmp_path, max_steps=-1, num_train_epochs=2, **when)
    trainer = trainer_for(base, args, eval_dataset=Dataset.from_list(pair_rows(5)))
    trainer.train()
    assert len(history(trainer, "loss")) == 2
    assert len(history(trainer, "accuracy")) == len(history(trainer, "num_tokens")) == 2
    assert not any("accuracy" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_what_a_user_logs_by_hand_keeps_its_loss(base, tmp_path):
    trainer = trainer_for(base, config(tmp_path, max_steps=2, logging_strategy="no"))
    trainer.train()
    trainer.log({"loss": 5.0, "mine": 1.0})
    assert trainer.state.log_history[-1]["loss"] == 5.0
