"""Tells a [`ConfidenceLoss`](trl_ext.losses.distillation) how far training is, and stores its state in checkpoints.

It knows optimizer steps, processes and the trainer's state. It does not know what the loss computes.
"""

import logging

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_ext.losses.distillation import ConfidenceLoss, LogConfRanking, LogConfToken


logger = logging.getLogger(__name__)

# The entry in `trainer_state.json`, which Trainer writes and reads as it is.
STATE = "confidence_loss"


class ConfidenceCallback(TrainerCallback):
    """
    After every optimizer step, gives the loss the predictions of all processes.

    The loss takes its threshold from earlier steps. Each checkpoint stores what it remembers of them
    (`trainer_state.json`), so that a resumed run continues exactly.

    Args:
        loss ([`~trl_ext.losses.distillation.ConfidenceLoss`]): the loss, e.g. `LogConfRanking(...).confidence`.
    """

    def __init__(self, loss: ConfidenceLoss):
        self._loss = loss

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._loss.reset()
        self._loss.progress = state.global_step / max(1, state.max_steps)
        saved = state.stateful_callbacks.get(STATE)
        if saved is not None and saved["step"] == state.global_step:
            self._loss.load_state_dict(saved["loss"])
        elif state.global_step > 0:
            logger.warning(
                "The checkpoint has no state of the confidence loss. The loss starts with an empty history, so the "
                "next steps differ a little from those of an uninterrupted run."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        values = self._loss.step_values()
        if args.world_size > 1:
            values = torch.cat([torch.as_tensor(part) for part in gather_object([values.tolist()])])
        self._loss.end_step(state.global_step / max(1, state.max_steps), values.reshape(-1, 2))
        self._keep(state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._keep(state, control)

    def _keep(self, state: TrainerState, control: TrainerControl) -> None:
        if control.should_save:  # Trainer writes the state after these events
            state.stateful_callbacks[STATE] = {"step": state.global_step, "loss": self._loss.state_dict()}


def follow_confidence(trainer: Trainer) -> None:
    """Give a trainer whose `loss_type` is a `LogConfRanking` or `LogConfToken` the callback that such a loss needs."""
    loss = trainer.args.loss_type
    if isinstance(loss, (LogConfRanking, LogConfToken)):
        trainer.add_callback(ConfidenceCallback(loss.confidence))
