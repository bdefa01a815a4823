"""Settings that transformers reads under a new name, streams, and tokenizers that do not fit the student."""

import logging

import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from tests.tiny import pair_rows
from tests.trainers.helpers import config, lora, trainer_for
from trl_ext import RewardEnsembleConfig, RewardEnsembleTrainer, WeakToStrongConfig
from trl_ext.trainers.common.setup import checkpoint_reentrantly
from trl_ext.trainers.weak_to_strong.trainer import WeakToStrongTrainer


TEXTS = [{"prompt": f"{n} + 2 =", "completion": " 4 and more" * (1 + n % 3)} for n in range(8)]


def test_reentrant_checkpointing_reaches_the_argument_that_transformers_reads(tmp_path):
    args = config(tmp_path, gradient_checkpointing=True)
    checkpoint_reentrantly(args)
    names = [name for name in vars(args) if name.endswith("checkpointing_kwargs")]
    assert names and all(getattr(args, name) == {"use_reentrant": True} for name in names)


def test_a_student_pads_with_a_token_that_it_knows(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    args = config(tmp_path, WeakToStrongConfig, max_steps=1, kd_weight=0)
    trainer = WeakToStrongTrainer(
        str(base), None, args, train_dataset=Dataset.from_list(TEXTS), processing_class=tokenizer
    )
    trainer.train()
    assert tokenizer.pad_token_id < trainer.model.config.vocab_size


def test_a_student_on_a_stream_warns_where_it_cannot_resume_exactly(base, tmp_path, caplog):
    stream = IterableDataset.from_generator(lambda: iter(TEXTS))
    args = config(tmp_path, WeakToStrongConfig, max_steps=4, kd_weight=0, save_strategy="steps", save_steps=3)
    WeakToStrongTrainer(str(base), None, args, train_dataset=stream).train()
    again = WeakToStrongTrainer(str(base), None, args, train_dataset=stream)
    with caplog.at_level(logging.WARNING, "trl_ext"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "because the stream starts again" in caplog.text


@pytest.mark.parametrize("strategy", ["bootstrap", "kfold"])
def test_members_whose_rows_would_depend_on_the_readers_are_refused(base, tmp_path, strategy):
    stream = Dataset.from_list(pair_rows(8)).to_iterable_dataset(num_shards=2)
    common = {"num_members": 2, "data_strategy": strategy}
    args = config(tmp_path, RewardEnsembleConfig, dataloader_num_workers=2, **common)
    with pytest.raises(ValueError, match="2 shards.*dataloader_num_workers"):
        trainer_for(base, args, stream, RewardEnsembleTrainer, peft_config=lora())
    args = config(tmp_path, RewardEnsembleConfig, **common)
    trainer_for(base, args, stream, RewardEnsembleTrainer, peft_config=lora())
