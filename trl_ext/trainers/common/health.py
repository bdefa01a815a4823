"""Health checks of a training run: an error for numbers that are not finite, warnings if the model does not learn.

It knows scores, losses and gradients. It knows nothing of text, the content of rows, or where metrics go.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_ext.models.heads import head_parameters


CHANCE_STEPS = 100
"""The mean loss over this many optimizer steps is compared with chance. A difference below 1 % gives a warning."""

LOOK_EVERY = 4
"""One in this many forward passes is compared with chance, because the comparison computes a second loss."""

FLAT_LOOKS = 5
"""If the scores deviate by less than 1e-3 in this many compared passes in a row, a warning is given."""

STILL_STEPS = 3
"""A head gradient of 0 in this many optimizer steps in a row gives a warning. A single one may be a batch of ties."""


class RewardTrainingWarning(UserWarning):
    """Training runs, but its numbers show that the model does not learn."""


class NotFiniteError(FloatingPointError):
    """A score, loss or gradient is NaN or infinite."""


def check_finite(scores: torch.Tensor, losses: torch.Tensor, rows: torch.Tensor, note: str = "") -> None:
    """
    Raise [`NotFiniteError`] if a score or loss is NaN or infinite. The message names the rows of the data set.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`): scores, 0 where there is no candidate.
        losses (`torch.Tensor` of shape `(B,)`): loss of each group.
        rows (`torch.Tensor` of shape `(B,)`): row number of each group in its data set.
        note (`str`, *optional*): ends the message.
    """
    for what, values in (("score", scores), ("loss", losses)):
        bad = ~torch.isfinite(values).reshape(len(values), -1).all(dim=1)
        if bool(bad.any()):
            raise NotFiniteError(
                f"The {what} of data set {_named(rows[bad].tolist())} is NaN or infinite. Training stops before the "
                "weights are damaged. Usual causes: a learning rate that is too high, fp16 (use bf16), or broken base "
                f"weights.{note}"
            )


def _named(rows: list[int]) -> str:
    return f"row(s) {rows[:8]}{f' and {len(rows) - 8} more' if len(rows) > 8 else ''}"


class HealthMonitor:
    """
    Checks every forward pass of a training run. It raises an error for NaN and gives each warning once.

    Args:
        note (`str`, *optional*): what an error about rows adds.
    """

    def __init__(self, note: str = ""):
        self.note = note
        self._passes = 0
        self._flat = 0
        self._still = 0
        self._block = 0  # number of the current block of CHANCE_STEPS steps
        self._sums = [0.0, 0.0]  # sums over the block: the loss, and the loss of equal scores
        self._rows: list[torch.Tensor] = []
        self._warned: set[str] = set()

    def update(
        self,
        step: int,
        scores: torch.Tensor,
        mask: torch.Tensor,
        losses: torch.Tensor,
        rows: torch.Tensor,
        chance: Callable[[], torch.Tensor],
    ) -> None:
        """
        Check one forward pass before its backward pass. It waits for the GPU once.

        Args:
            step (`int`): number of optimizer steps so far.
            scores, mask (`torch.Tensor` of shape `(B, K)`): scores, 0 where there is no candidate.
            losses, rows (`torch.Tensor` of shape `(B,)`): loss of each group and its row in the data set.
            chance (`Callable`): computes the losses (B,) of the same groups if all scores were equal.
        """
        self._rows.append(rows)
        # a finite sum has only finite terms; a sum that is not finite may be an overflow, so look at the terms again
        if not math.isfinite((scores.sum() + losses.sum()).item()):
            check_finite(scores, losses, rows, self.note)
        self._passes += 1
        if self._passes % LOOK_EVERY == 1:
            self._look(step, scores, mask, losses, chance())

    def _look(
        self, step: int, scores: torch.Tensor, mask: torch.Tensor, losses: torch.Tensor, chance: torch.Tensor
    ) -> None:
        count = mask.sum()
        variance = ((scores - scores.sum() / count) * mask).square().sum() / count
        loss, at_chance, spread = torch.stack([losses.mean(), chance.mean(), variance]).tolist()
        self._flat = self._flat + 1 if spread < 1e-3**2 else 0
        if self._flat >= FLAT_LOOKS:
            self.warn(
                "flat scores",
                f"The scores of {FLAT_LOOKS} batches in a row deviate by less than 1e-3: the model tells no candidate "
                "from another. Usual causes: a frozen or zero head, identical candidates, a learning rate near zero.",
            )
        if step // CHANCE_STEPS != self._block:
            self._judge()
            self._block, self._sums = step // CHANCE_STEPS, [0.0, 0.0]
        self._sums = [self._sums[0] + loss, self._sums[1] + at_chance]

    def _judge(self) -> None:
        mean, chance = self._sums
        if chance > 0 and abs(mean - chance) <= 0.01 * chance:
            self.warn(
                "loss at chance",
                f"Over {CHANCE_STEPS} steps the mean loss was within 1 % of the loss of equal scores: nothing is "
                "learnt yet. Usual causes: labels in the wrong column or order, a learning rate that is too low "
                "(LoRA: try 1e-4), or a frozen backbone.",
            )

    def rows_of_step(self) -> list[int]:
        """Row numbers of all forward passes since the last optimizer step."""
        return [row for rows in self._rows for row in rows.tolist()]

    def end_step(self, head_moves: bool) -> None:
        """Called before each optimizer step. `head_moves`: the head has a gradient that is not 0."""
        self._rows.clear()
        self._still = 0 if head_moves else self._still + 1
        if self._still >= STILL_STEPS:
            self.warn(
                "head without gradient",
                f"The reward head received a gradient of exactly 0 in {STILL_STEPS} steps in a row. Usual causes: "
                "every group is tied or has identical candidates, or something detached the scores from the model.",
            )

    def warn(self, name: str, message: str) -> None:
        """Warn once per name."""
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(message, RewardTrainingWarning, stacklevel=2)


class GradientCallback(TrainerCallback):
    """Raises an error before an optimizer step whose gradients are not finite, and watches the head's gradient."""

    def __init__(self, monitor: HealthMonitor, head: list[str]):
        self.monitor = monitor
        self.head = head
        self._parameters: list[nn.Parameter] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self._parameters = list(head_parameters(model, self.head).values())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        head = [p.grad for p in self._parameters if p.grad is not None]
        # Clipping has run already. It spreads a NaN to every gradient, and for an infinite gradient it sets all others
        # to 0. So if the head's gradient is neither NaN nor 0, all gradients are finite.
        if head and all(type(gradient) is torch.Tensor for gradient in head):
            size = sum(gradient.abs().sum().item() for gradient in head)
            if 0 < size < math.inf:
                self.monitor.end_step(head_moves=True)
                return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:  # DeepSpeed keeps gradients to itself
            self.monitor.end_step(head_moves=True)
            return
        if not args.fp16 and not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            raise NotFiniteError(
                f"A gradient of step {state.global_step + 1} (data set {_named(self.monitor.rows_of_step())}) is NaN "
                "or infinite. Training stops before the weights are damaged. Usual causes: a learning rate that is "
                f"too high, or a margin or rating of extreme size.{self.monitor.note}"
            )
        self.monitor.end_step(head_moves=any(bool(gradient.any()) for gradient in head))
