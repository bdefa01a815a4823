"""What the trainer tests share: a tiny run of our trainer or of TRL's, and what came out of it."""

from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback

from tests.tiny import pair_rows
from trl_ext import RewardConfig, RewardTrainer
from trl_ext.models.heads import head_parameters


def config(folder: Path, config_class: type = RewardConfig, **kwargs: Any) -> trl.RewardConfig:
    """A small fp32 CPU configuration that logs every step."""
    defaults: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return config_class(**(defaults | kwargs))


def lora(**kwargs: Any) -> LoraConfig:
    """LoRA as a TRL user has to write it: with the task type and the head in `modules_to_save`."""
    defaults = dict(task_type="SEQ_CLS", modules_to_save=["score"], target_modules=["q_proj", "v_proj"], r=4)
    return LoraConfig(**(defaults | kwargs))


def trainer_for(
    model: Any, args: trl.RewardConfig, rows: Any = None, trainer_class: type = RewardTrainer, **kwargs: Any
) -> trl.RewardTrainer:
    """A trainer on `rows` (a list of rows or a data set) that prints nothing."""
    rows = pair_rows(32) if rows is None else rows
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    model = str(model) if isinstance(model, Path) else model
    trainer = trainer_class(model=model, args=args, train_dataset=data, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def history(trainer: trl.RewardTrainer, name: str) -> list[float]:
    """The logged values of one metric."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: RewardTrainer) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def head_of(trainer: RewardTrainer) -> dict[str, torch.Tensor]:
    """A copy of the head."""
    return {name: p.detach().clone() for name, p in head_parameters(trainer.model, ["score"]).items()}


def states(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """A copy of everything that is trained, for each member of an ensemble or for the one model."""
    if hasattr(trainer.model, "member_state"):
        return [trainer.model.member_state(member) for member in range(trainer.args.num_members)]
    return [weights(trainer) | head_of(trainer)]


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation that do not depend on the clock."""
    clock = ("runtime", "per_second", "preparation_time")
    return {name: value for name, value in metrics.items() if not name.endswith(clock)}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    assert one
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


class StopAt(TrainerCallback):
    """Kills the training after a step, as a crash would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
