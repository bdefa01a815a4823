"""Rows of a training by length, rows of an evaluation in order and once (streams with shards too), resumed streams."""

import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from tests.tiny import pair_rows, ranked_rows
from tests.trainers.helpers import config, history, trainer_for, without_time
from tests.trainers.table import ENSEMBLES, TABLE, rows_of, tiny_trainer
from trl_ext.trainers.ranking.recording import GroupRecorder, ScoredBatch


def members(kind):
    """Members see every row of a step."""
    return {"data_strategy": "shared"} if kind in ENSEMBLES else {}


@pytest.mark.parametrize("budget", [None, 300], ids=["rows", "tokens"])
@pytest.mark.parametrize("kind", TABLE)
def test_rows_come_by_length_in_training_and_in_order_in_evaluation(kind, budget, base, tmp_path):
    data = Dataset.from_list(rows_of(kind, 22))
    arguments = dict(train_sampling_strategy="group_by_length", max_tokens_per_batch=budget, max_steps=2)
    trainer = tiny_trainer(kind, base, tmp_path, data, **arguments, **members(kind))
    trainer.eval_dataset = trainer.train_dataset
    seen, collator = [], trainer.data_collator
    trainer.data_collator = lambda batch: seen.append(batch) or collator(batch)
    loader = trainer.get_train_dataloader()
    batches = [batch["row_index"].tolist() for batch in loader]
    assert sorted(sum(batches, [])) == list(range(22))

    def longest(row):
        return max(map(len, row["candidate_ids"])) if "candidate_ids" in row else len(row["span_input_ids"])

    lengths = [list(map(longest, batch)) for batch in seen]
    if budget is None:  # Trainer sorts a few batches' rows together, with the longest row of all in front
        assert lengths[0][0] == max(sum(lengths, []))
        assert all(batch[1:] == sorted(batch[1:], reverse=True) for batch in lengths)
    else:  # made of rows in order of length, taken in random order
        lengths.sort(reverse=True)
        assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)
    trainer.data_collator = collator
    trainer.train()
    grouped = trainer.predict(data)
    trainer.args.train_sampling_strategy = "random"
    plain = trainer.predict(data)
    assert np.array_equal(grouped.predictions, plain.predictions)
    assert without_time(trainer.evaluate()).keys() >= {"eval_loss"}


def test_a_length_column_of_the_user_is_used(base, tmp_path):
    rows = [{**row, "size": number} for number, row in enumerate(pair_rows(12))]
    args = config(tmp_path, train_sampling_strategy="group_by_length", length_column_name="size")
    trainer = trainer_for(base, args, rows)
    batches = [batch["row_index"].tolist() for batch in trainer.get_train_dataloader()]
    assert sorted(sum(batches, [])) == [*range(12)] and batches[0][0] == 11
    assert all(batch[1:] == sorted(batch[1:], reverse=True) for batch in batches)


@pytest.mark.parametrize("kind", ["reward", "orm"])
def test_a_stream_with_shards_is_evaluated_as_the_data_set_is(kind, base, tmp_path):
    data = Dataset.from_list(rows_of(kind, 22)[:11])
    trainer = tiny_trainer(kind, base, tmp_path)
    wanted = without_time(trainer.evaluate(data))
    for shards in (2, 3):
        for workers in (0, 2):
            trainer.args.dataloader_num_workers = workers
            found = without_time(trainer.evaluate(data.to_iterable_dataset(num_shards=shards)))
            assert found == pytest.approx(wanted, abs=1e-6), (shards, workers)
            assert trainer.args.dataloader_num_workers == workers
    trainer.args.dataloader_num_workers = 0
    scores = trainer.predict(data.to_iterable_dataset(num_shards=2)).predictions
    assert np.allclose(scores, trainer.predict(data).predictions, atol=1e-6)


def test_streams_by_name_are_evaluated(base, tmp_path):
    data = Dataset.from_list(pair_rows(9))
    both = {"list": data, "stream": data.to_iterable_dataset(num_shards=2)}
    trainer = trainer_for(base, config(tmp_path, dataloader_num_workers=2), eval_dataset=both)
    found = without_time(trainer.evaluate())
    assert found["eval_stream_loss"] == pytest.approx(found["eval_list_loss"], abs=1e-6)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_compute_metrics_gets_every_candidate_of_its_row(loss, base, tmp_path):
    given = {}
    k = 2 if loss == "bradley_terry" else 4

    def keep(prediction):
        given.update(inputs=prediction.inputs, scores=prediction.predictions)
        return {}

    rows = ranked_rows(11, k=k, ragged=k > 2)
    args = config(tmp_path, loss_type=loss, include_for_metrics=["inputs"])
    trainer = trainer_for(base, args, rows, eval_dataset=Dataset.from_list(rows), compute_metrics=keep)
    trainer.evaluate()
    assert len(given["inputs"]) == len(given["scores"]) == 11
    for ids, row in zip(given["inputs"], trainer.eval_dataset, strict=True):
        found = [[]]
        for token in ids.tolist():
            if token != -100:
                found[-1].append(token)
            elif found[-1]:
                found.append([])
        assert found[:-1] == row["candidate_ids"]


def test_a_resumed_stream_is_exact_in_its_first_pass_and_warns_after_it(base, tmp_path, caplog):
    def run(**arguments):
        args = config(tmp_path, max_steps=6, save_strategy="steps", save_steps=1, logging_steps=1, **arguments)
        return trainer_for(base, args, Dataset.from_list(pair_rows(12)).to_iterable_dataset())  # a pass has 3 steps

    whole = run()
    whole.train()
    losses = history(whole, "loss")
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        for step in (2, 3):
            resumed = run()
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert history(resumed, "loss") == pytest.approx(losses, abs=1e-6)
        assert "over a stream" not in caplog.text
        run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "saved in pass 2 over a stream" in caplog.text and "From step 5 on" in caplog.text


def test_metrics_of_training_count_rows_of_several_readers_with_one_number():
    """Several workers of a stream number their rows from 0 each. Training counts them all; nothing is a repeat."""
    recorder = GroupRecorder(Accelerator(cpu=True), evaluation=False)
    ratings, mask = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    for scores in ([[1.0, 0.0]], [[0.0, 1.0]]):
        loss, row, lengths = torch.zeros(1), torch.tensor([7]), torch.tensor([[3, 4]])
        recorder.add(ScoredBatch(torch.tensor(scores), ratings, mask, lengths, loss, row))
    recorder.flush()
    assert recorder.summary()["accuracy"] == 0.5
