"""Every argument of `TrainingArguments` and `trl.RewardConfig` has an effect, is refused, or is warned about."""

import logging
from dataclasses import fields

import pytest
import torch
import trl

from tests.trainers.helpers import APPLIED_BY_TRAINER, config
from tests.trainers.table import TABLE, TOKEN, rows_of, tiny_trainer
from trl_ext.trainers.common.inherited_arguments import FULL_EVALUATION, WITHOUT_EFFECT


def names(text):
    return text.split()


# Where an argument takes effect. "Trainer": in code of transformers or TRL that our trainers call and do not replace.
TRAINER = APPLIED_BY_TRAINER + names(
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps batch_eval_metrics"
)
# Read by our code too, which has tests of its own.
OURS = names(
    """
    per_device_train_batch_size max_grad_norm label_smoothing_factor neftune_noise_alpha
    include_num_input_tokens_seen include_for_metrics seed data_seed accelerator_config dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy length_column_name fsdp
    deepspeed model_init_kwargs trust_remote_code chat_template_path disable_dropout dataset_num_proc eos_token
    max_length pad_to_multiple_of pad_token center_rewards_coefficient activation_offloading
    """
)
# For scripts to read, as the documentation of transformers says: no Trainer looks at them.
SCRIPTS = ["do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"]

OTHER_VALUES = {"label_names": ["labels"], "average_tokens_across_devices": False, "logging_nan_inf_filter": False}


def test_the_table_has_every_argument():
    known = [*TRAINER, *OURS, *SCRIPTS, *WITHOUT_EFFECT, *FULL_EVALUATION]
    assert len(known) == len(set(known))
    assert {field.name for field in fields(trl.RewardConfig)} == set(known)
    assert OTHER_VALUES.keys() == WITHOUT_EFFECT.keys()


@pytest.mark.parametrize("kind", TABLE)
def test_arguments_without_effect_are_warned_about(kind, base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        trainer = tiny_trainer(kind, base, tmp_path, **OTHER_VALUES)
        for name in WITHOUT_EFFECT:
            assert f"{name}=" in caplog.text and "has no effect" in caplog.text
        trainer.train()  # and they change nothing that breaks
        caplog.clear()
        tiny_trainer(kind, base, tmp_path)
        assert "has no effect" not in caplog.text


@pytest.mark.parametrize("name", FULL_EVALUATION)
@pytest.mark.parametrize("kind", TABLE)
def test_an_evaluation_leaves_the_weights_as_they_are(kind, name, base, tmp_path, caplog):
    trainer = tiny_trainer(kind, base, tmp_path, eval_rows=rows_of(kind, 4), **{name: True})
    assert f"{name}=True has no effect: an evaluation has the precision of training" in caplog.text
    trainer.evaluate()
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}


def test_a_batch_size_beside_a_token_budget_is_warned_about(base, tmp_path, caplog):
    tiny_trainer("reward", base, tmp_path, max_tokens_per_batch=200)
    assert "per_device_train_batch_size=4 has no effect: max_tokens_per_batch decides" in caplog.text


@pytest.mark.parametrize("kind", TOKEN)
@pytest.mark.parametrize("name", ["center_rewards_coefficient", "activation_offloading"])
def test_what_token_rewards_do_not_have_is_refused(name, kind, tmp_path):
    with pytest.raises(ValueError, match=f"{name} does not apply"):
        config(tmp_path, TABLE[kind].config, **{name: 1})
