"""Tells a [`ConfidenceLoss`](trl_ext.losses.distillation) where training stands. Knows steps and processes only."""

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_ext.losses.distillation import ConfidenceLoss, LogConfRanking, LogConfToken


class ConfidenceCallback(TrainerCallback):
    """
    Ends the loss's step with every optimizer step, with the predictions of all processes.

    The loss's memory of earlier steps is not part of a checkpoint: after a resume the threshold is taken from the
    steps that follow, and for one step the weak labels stand alone.

    Args:
        loss ([`~trl_ext.losses.distillation.ConfidenceLoss`]): the loss, e.g. `LogConfRanking(...).confidence`.
    """

    def __init__(self, loss: ConfidenceLoss):
        self._loss = loss

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._loss.reset()
        self._loss.progress = state.global_step / max(1, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        values = self._loss.step_values()
        if args.world_size > 1:
            values = torch.cat([torch.as_tensor(part) for part in gather_object([values.tolist()])])
        self._loss.end_step(state.global_step / max(1, state.max_steps), values.reshape(-1, 2))


def follow_confidence(trainer: Trainer) -> None:
    """Give a trainer whose `loss_type` is a `LogConfRanking` or `LogConfToken` the callback that such a loss needs."""
    loss = trainer.args.loss_type
    if isinstance(loss, (LogConfRanking, LogConfToken)):
        trainer.add_callback(ConfidenceCallback(loss.confidence))
