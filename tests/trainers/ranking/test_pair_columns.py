"""Columns of pairs: ratings that are metadata, TRL's prepared columns, and TRL's old names."""

import logging

import pytest
from datasets import Dataset

from tests.tiny import pair_rows
from tests.trainers.helpers import config, history, trainer_for
from trl_ext.data.validation import DataError


def test_ratings_of_pairs_are_metadata_unless_the_loss_uses_them(base, tmp_path, caplog):
    rows = [{**row, "chosen_rating": 3.0, "rejected_rating": 3.0} for row in pair_rows(16)]
    rows[3]["rejected_rating"] = None
    plain, rated = trainer_for(base, config(tmp_path), pair_rows(16)), None
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        rated = trainer_for(base, config(tmp_path), rows)
    assert "`chosen_rating` and `rejected_rating` are not used by the loss 'bradley_terry'" in caplog.text
    plain.train()
    rated.train()
    assert history(rated, "loss") == history(plain, "loss")
    trainer_for(base, config(tmp_path), [{**row, "chosen_rating": 1.0} for row in pair_rows(8)])
    for arguments in ({"loss_type": "pointwise"}, {"loss_kwargs": {"margin_from_ratings": True}}):
        with pytest.raises(DataError, match="row 3, column 'rejected_rating'"):
            trainer_for(base, config(tmp_path, **arguments), rows)


def test_prepared_pairs_have_the_columns_of_trl(base, tmp_path):
    rows = pair_rows(8)
    rows[2]["chosen"] *= 40  # too long
    trainer = trainer_for(base, config(tmp_path, max_length=64), rows, eval_dataset=Dataset.from_list(pair_rows(2)))
    for data in (trainer.train_dataset, trainer.eval_dataset):
        for row in data:
            assert [row["chosen_ids"], row["rejected_ids"]] == row["candidate_ids"]
    assert len(trainer.train_dataset) == 7
    stream = trainer_for(base, config(tmp_path), Dataset.from_list(pair_rows(8)).to_iterable_dataset())
    row = next(iter(stream.train_dataset))
    assert [row["chosen_ids"], row["rejected_ids"]] == row["candidate_ids"]


def test_the_old_names_of_trl_are_taken_with_its_warning(base, tmp_path):
    prepared = trainer_for(base, config(tmp_path), pair_rows(8)).train_dataset
    new = prepared.select_columns(["chosen_ids", "rejected_ids"])
    old = new.rename_columns({"chosen_ids": "chosen_input_ids", "rejected_ids": "rejected_input_ids"})
    with pytest.warns(FutureWarning, match="chosen_input_ids"):
        trainer = trainer_for(base, config(tmp_path), old)
    assert trainer.train_dataset["chosen_ids"][:] == new["chosen_ids"][:]
    trainer.train()
