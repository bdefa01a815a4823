"""Batches by tokens and by prompt in training: the same losses, every row once, resumed, split between processes."""

import logging
import re

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader

from tests.tiny import ranked_rows, save_tiny_model
from tests.trainers.helpers import StopAt, history, largest_difference, weights
from tests.trainers.table import outcome_rows, segment_rows, step_rows, tiny_trainer
from trl_ext.trainers.common.batching import FixedBatches


def same_size_rows(n):
    """Groups of three candidates that all have the same lengths, as token ids."""
    rows = []
    for number in range(n):
        prompt = [5 + number % 40] * 12
        rows.append({"candidate_ids": [prompt + [60 + number % 9, 70 + k] for k in range(3)], "ratings": [2, 1, 0]})
    return rows


OF_KIND = {  # how a run of a kind is made, its rows, and a budget of tokens that a few of the rows fill
    "reward": ({"optim": "sgd", "learning_rate": 1e-2}, ranked_rows(22, k=4, ragged=True), 190),
    "orm": ({}, outcome_rows(22, questions=6), 50),
}


def make(kind, base, folder, rows, callbacks=None, **arguments):
    arguments = OF_KIND[kind][0] | arguments
    return tiny_trainer(kind, base, folder, rows, trainer_kwargs={"callbacks": callbacks}, **arguments)


class Watch:
    """A collator that notes the rows of every batch and the tokens that go through the model."""

    def __init__(self, trainer):
        self.collator, self.rows, self.tokens = trainer.data_collator, [], []
        trainer.data_collator = self

    def __call__(self, rows):
        batch = self.collator(rows)
        flat = "prefix_layout" in batch
        self.rows.append(batch["row_index"].tolist())
        self.tokens.append(batch["prefix_layout"].num_tokens if flat else batch["input_ids"].numel())
        return batch


@pytest.mark.parametrize("shared", ["auto", False])
@pytest.mark.parametrize("kind", OF_KIND)
def test_every_row_comes_once_an_epoch_and_no_batch_is_too_large(kind, shared, base, tmp_path):
    _, rows, budget = OF_KIND[kind]
    arguments = dict(shared_prefix=shared, num_train_epochs=3, max_steps=-1)
    trainer = make(kind, base, tmp_path, rows, max_tokens_per_batch=budget, **arguments)
    watch = Watch(trainer)
    batches = len(trainer.get_train_dataloader())
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 3 * batches
    assert trainer.state.epoch == 3 and len(history(trainer, "loss")) == 3 * batches
    assert len(watch.rows) == 3 * batches and 4 < batches < 15
    assert all(tokens <= budget for tokens in watch.tokens) and max(watch.tokens) > budget / 2
    assert len({len(rows) for rows in watch.rows}) > 1
    epochs = [watch.rows[start : start + batches] for start in (0, batches, 2 * batches)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(22))
    assert epochs[0] != epochs[1] != epochs[2]  # another order
    assert sorted(epochs[0]) == sorted(epochs[1])  # of the same batches


@pytest.mark.parametrize("shared", [True, False])
def test_batches_of_the_same_rows_have_the_same_loss(shared, base, tmp_path):
    """A budget that two such groups fill is a batch size of two."""
    rows = same_size_rows(13)
    arguments = dict(shared_prefix=shared, train_sampling_strategy="sequential", gradient_accumulation_steps=2)
    budget = {"max_tokens_per_batch": 2 * (12 + 3 * 2) if shared else 2 * 3 * 14}
    tokens = make("reward", base, tmp_path / "a", rows, max_steps=7, **arguments, **budget)
    by_rows = make("reward", base, tmp_path / "b", rows, max_steps=7, **arguments, per_device_train_batch_size=2)
    for trainer in (tokens, by_rows):
        trainer.train()
    assert len(history(tokens, "loss")) == 7
    for metric in ("loss", "accuracy", "num_tokens", "mean_reward"):
        assert history(tokens, metric) == pytest.approx(history(by_rows, metric), abs=1e-6), metric
    assert tokens.state.epoch == by_rows.state.epoch
    assert largest_difference(weights(tokens), weights(by_rows)) < 1e-6


@pytest.mark.parametrize("kind", OF_KIND)
def test_a_window_of_uneven_batches_is_one_large_batch(kind, base, tmp_path):
    """The loss is an average over groups or labels of the whole step, however they were cut."""
    _, rows, budget = OF_KIND[kind]
    arguments = dict(optim="sgd", learning_rate=1e-2, num_train_epochs=2, max_steps=-1)
    cut = make(
        kind, base, tmp_path / "a", rows, max_tokens_per_batch=budget, gradient_accumulation_steps=99, **arguments
    )
    whole = make(kind, base, tmp_path / "b", rows, per_device_train_batch_size=22, **arguments)
    assert len(cut.get_train_dataloader()) > 4
    for trainer in (cut, whole):
        trainer.train()
    assert len(history(cut, "loss")) == 2
    assert history(cut, "loss") == pytest.approx(history(whole, "loss"), abs=1e-5)
    assert history(cut, "grad_norm") == pytest.approx(history(whole, "grad_norm"), rel=1e-4)
    assert largest_difference(weights(cut), weights(whole)) < 1e-5


@pytest.mark.parametrize(("kind", "way"), [("reward", "tokens"), ("orm", "tokens"), ("orm", "prompts")])
def test_kill_and_resume_equals_an_uninterrupted_run(kind, way, base, tmp_path):
    _, rows, budget = OF_KIND[kind]
    arguments = dict(max_steps=8, gradient_accumulation_steps=2, save_strategy="steps", save_steps=5, optim="sgd")
    arguments |= {"max_tokens_per_batch": budget} if way == "tokens" else {"group_by_prompt": True}
    whole = make(kind, base, tmp_path / "whole", rows, **arguments)
    whole.train()
    assert 1 < whole.state.epoch < 8  # the fifth step is in the second epoch or later
    with pytest.raises(KeyboardInterrupt):
        make(kind, base, tmp_path / "killed", rows, callbacks=[StopAt(6)], **arguments).train()
    resumed = make(kind, base, tmp_path / "killed", rows, **arguments)
    watch = Watch(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), abs=1e-6)
    assert largest_difference(weights(resumed), weights(whole)) < 1e-6
    assert len(watch.rows) < 2 * 8  # what was trained on is skipped without being read


def test_rows_of_a_prompt_are_in_one_batch(base, tmp_path):
    rows = outcome_rows(24, questions=6)
    rows = [{**row, "prompt": row["prompt"] * 6} for row in rows]
    tokens = {}
    for together in (True, False):
        trainer = make(
            "orm",
            base,
            tmp_path,
            rows,
            group_by_prompt=together,
            num_train_epochs=2,
            max_steps=-1,
            per_device_train_batch_size=8,
        )
        watch = Watch(trainer)
        trainer.train()
        assert trainer.state.global_step == 6
        for epoch in (watch.rows[:3], watch.rows[3:]):
            assert sorted(sum(epoch, [])) == list(range(24))
            assert {len(batch) for batch in epoch} == {8}
        prompts = {len({row % 6 for row in batch}) for batch in watch.rows}
        assert prompts == {2} if together else max(prompts) > 3
        tokens[together] = sum(watch.tokens)
    assert tokens[True] < 0.8 * tokens[False]


def test_nothing_changes_by_default(base, tmp_path):
    """The batches are those of TRL's trainer, whose loader this is."""
    rows = ranked_rows(22, k=2)
    seen = []
    for arguments in ({}, {"shared_prefix": False}):
        trainer = make("reward", base, tmp_path, rows, loss_type="bradley_terry", **arguments)
        assert not isinstance(trainer.get_train_dataloader().batch_sampler, FixedBatches)
        watch = Watch(trainer)
        trainer.train()
        seen.append(watch.rows)
    assert seen[0] == seen[1]


def test_a_group_above_the_budget_is_a_batch_of_its_own_and_is_said(base, tmp_path, caplog):
    rows = same_size_rows(6)
    rows[2] = {"candidate_ids": [[7] * 60 + [8], [7] * 60 + [9]], "ratings": [1, 0]}
    trainer = make("reward", base, tmp_path, rows, max_tokens_per_batch=40, max_steps=2)
    watch = Watch(trainer)
    with caplog.at_level(logging.WARNING):
        loader = trainer.get_train_dataloader()
    (record,) = [record for record in caplog.records if "rows have more than" in record.message]
    assert "1 of 6 rows have more than max_tokens_per_batch=40 tokens (the longest 62)" in record.message
    list(loader)
    assert [2] in watch.rows and sorted(sum(watch.rows, [])) == list(range(6))


def test_encoders_pack_padded_rows_by_length(tmp_path):
    bert = save_tiny_model(tmp_path / "bert", "bert")
    rows = [{**row, "prompt": row["prompt"] * (1 + 2 * (i % 4))} for i, row in enumerate(step_rows(30))]
    cost = {}
    for strategy in ("random", "group_by_length"):
        trainer = tiny_trainer(
            "prm", bert, tmp_path, rows, max_tokens_per_batch=200, train_sampling_strategy=strategy, learning_rate=1e-3
        )
        watch = Watch(trainer)
        list(trainer.get_train_dataloader())
        assert sorted(sum(watch.rows, [])) == list(range(30)) and max(watch.tokens) <= 200
        cost[strategy] = sum(watch.tokens)
        trainer.train()
    assert cost["group_by_length"] < 0.9 * cost["random"]


def test_drop_last_and_workers(base, tmp_path):
    rows = segment_rows(23)
    trainer = tiny_trainer(
        "segment", base, tmp_path, rows, group_by_prompt=True, dataloader_drop_last=True, dataloader_num_workers=1
    )
    loader = trainer.get_train_dataloader()
    assert len(loader) == 5 and [len(batch["row_index"]) for batch in loader] == [4] * 5
    trainer.train()
    assert trainer.state.global_step == 4


WRONG = [
    ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0 is too small"),
    ({"max_tokens_per_batch": 99, "auto_find_batch_size": True}, "auto_find_batch_size .* Set only one"),
    (
        {"max_tokens_per_batch": 99, "accelerator_config": {"split_batches": True}},
        "would split batches between processes",
    ),
    ({"max_tokens_per_batch": 99, "train_sampling_strategy": "batch_rebalance"}, "Needed: one of random, sequential"),
    ({"group_by_prompt": True, "train_sampling_strategy": "group_by_length"}, "'group_by_length' and group_by_prompt"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_cannot_be_had_is_refused(arguments, message, base, tmp_path):
    for kind, (_, rows, _) in OF_KIND.items():
        if "group_by_prompt" not in arguments or kind == "orm":
            with pytest.raises(ValueError, match=message):
                make(kind, base, tmp_path, rows, **arguments)


@pytest.mark.parametrize("kind", OF_KIND)
def test_streams_are_refused(kind, base, tmp_path):
    _, rows, budget = OF_KIND[kind]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match=re.escape("max_tokens_per_batch needs the lengths of all rows")):
        make(kind, base, tmp_path, stream, max_tokens_per_batch=100)
    if kind == "orm":
        with pytest.raises(ValueError, match="group_by_prompt needs the lengths"):
            make(kind, base, tmp_path, stream, group_by_prompt=True)


def test_two_processes_load_their_own_batches_in_every_epoch_and_after_a_resume():
    """As Accelerate prepares the loader in each of two processes, and as Trainer skips and sets epochs."""
    batches = [[0, 1], [2], [3, 4, 5], [6], [7, 8], [9]]

    def loader(process):
        plain = DataLoader(torch.arange(10), batch_sampler=FixedBatches(batches, shuffle=True))
        return prepare_data_loader(
            plain, num_processes=2, process_index=process, use_seedable_sampler=True, data_seed=1
        )

    orders = []
    for epoch in (0, 1, 2):
        parts = []
        for process in (0, 1):
            ours = loader(process)
            ours.set_epoch(epoch)
            assert len(ours) == 3
            parts.append([batch.tolist() for batch in ours])
            resumed = skip_first_batches(loader(process), 2)
            resumed.set_epoch(epoch)
            assert [batch.tolist() for batch in resumed] == parts[-1][2:]
        assert sorted(parts[0] + parts[1]) == batches
        orders.append(parts)
    assert orders[0] != orders[1] != orders[2]
