"""A confidence loss that is given to a trainer is told of every optimizer step."""

import pytest
import torch
from datasets import Dataset

from tests.tiny import pair_rows, save_tiny_model
from tests.trainers.helpers import config, history, trainer_for
from trl_ext import ORMConfig, ORMTrainer
from trl_ext.losses.distillation import LogConfRanking, LogConfToken


def test_a_reward_trainer_tells_its_loss(tmp_path):
    loss = LogConfRanking(alpha=0.5, warmup=0.5)
    base = save_tiny_model(tmp_path / "base")
    args = config(tmp_path / "run", loss_type=loss, max_steps=4, gradient_accumulation_steps=2)
    trainer_for(base, args, pair_rows(8)).train()
    assert loss.confidence.progress == 1.0 and loss.confidence.weight == 0.5


def test_the_loss_of_an_evaluation_does_not_move_with_the_weight(tmp_path):
    args = config(
        tmp_path / "run",
        loss_type=LogConfRanking(warmup=0.9),
        max_steps=3,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
    )
    rows = pair_rows(8)
    trainer = trainer_for(save_tiny_model(tmp_path / "base"), args, rows, eval_dataset=Dataset.from_list(rows))
    trainer.train()
    losses = history(trainer, "eval_loss")
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_a_token_trainer_tells_its_loss(tmp_path):
    loss = LogConfToken(alpha=0.5, warmup=0.5)
    rows = [{"prompt": "2+2=", "completion": str(n), "label": n == 4} for n in range(8)]
    ORMTrainer(
        str(save_tiny_model(tmp_path / "base")),
        args=config(tmp_path / "run", ORMConfig, loss_type=loss, max_steps=3),
        train_dataset=Dataset.from_list(rows),
    ).train()
    assert loss.confidence.progress == 1.0 and loss.confidence.threshold is not None
    assert not len(loss.confidence.step_values())  # what was seen is not kept for ever


def test_a_resumed_run_ends_as_one_that_did_not_stop(tmp_path, caplog):
    """The threshold comes from earlier steps, which a checkpoint did not hold: the head differed by 1.2e-2."""
    base = str(save_tiny_model(tmp_path / "base"))
    rows = [{"prompt": "2+2=", "completion": str(n), "label": (n % 10) / 10} for n in range(24)]
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}

    def run(resume=None):
        loss = LogConfToken(alpha=0.9, warmup=0.0)
        args = config(tmp_path / "run", ORMConfig, loss_type=loss, **kwargs)
        trainer = ORMTrainer(base, args=args, train_dataset=Dataset.from_list(rows))
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([value.detach().flatten() for value in trainer.model.parameters()]), loss.confidence.threshold

    (whole, threshold), checkpoint = run(), tmp_path / "run" / "checkpoint-3"
    resumed, again = run(str(checkpoint))
    assert torch.allclose(whole, resumed, atol=1e-6) and again == pytest.approx(threshold, abs=1e-6)
    assert "no state of the confidence loss" not in caplog.text
