"""A confidence loss that is given to a trainer is told of every optimizer step."""

from datasets import Dataset

from tests.tiny import pair_rows, save_tiny_model
from tests.trainers.helpers import config, trainer_for
from trl_ext import ORMConfig, ORMTrainer
from trl_ext.losses.distillation import LogConfRanking, LogConfToken


def test_a_reward_trainer_tells_its_loss(tmp_path):
    loss = LogConfRanking(alpha=0.5, warmup=0.5)
    base = save_tiny_model(tmp_path / "base")
    args = config(tmp_path / "run", loss_type=loss, max_steps=4, gradient_accumulation_steps=2)
    trainer_for(base, args, pair_rows(8)).train()
    assert loss.confidence.progress == 1.0 and loss.confidence.weight == 0.5


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
