"""`ORMEnsembleTrainer`, `PRMEnsembleTrainer`, `SegmentEnsembleTrainer`: M token-level reward models in one run.

Each member ends as if it were trained alone: the loss is the sum of the members' losses, each over the labels that the
member counts. `member_training.py` has the parts that all ensembles share. Rows, labels and metrics are those of the
trainer of one model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from trl_ext.trainers.common.tracking import log_disagreement
from trl_ext.trainers.ensemble.config import (
    EnsembleFields,
    ORMEnsembleConfig,
    PRMEnsembleConfig,
    SegmentEnsembleConfig,
)
from trl_ext.trainers.ensemble.member_recording import MemberEvaluator, MemberTrainingRecorder, by_member
from trl_ext.trainers.ensemble.member_training import MemberTraining, for_members
from trl_ext.trainers.token.data import Rows
from trl_ext.trainers.token.objective import TokenObjective
from trl_ext.trainers.token.orm_trainer import ORMTrainer
from trl_ext.trainers.token.prm_trainer import PRMTrainer
from trl_ext.trainers.token.segment_trainer import SegmentRewardTrainer
from trl_ext.trainers.token.trainer import TokenRewardTrainer


PER_ROW = ("token_labels", "label_mask", "attention_mask", "row_index")
"""Tensors of a batch that the loss and its checks read."""


class TokenEnsembleTrainer(MemberTraining, TokenRewardTrainer):
    """
    The base class of the token-level ensemble trainers. Use [`ORMEnsembleTrainer`], [`PRMEnsembleTrainer`] or
    [`SegmentEnsembleTrainer`].

    Rows and arguments are those of the trainer of one model. The configuration also has [`EnsembleFields`], and
    `peft_config` is required. Member i ends as the trainer of one model would with `seed=member_seeds[i]`, on the same
    rows in the same order (apart from dropout). `save_model()` and every checkpoint write one ordinary adapter folder
    per member and `reward_ensemble.json`. Branching and errors are as in [`RewardEnsembleTrainer`].

    In training, `loss` is the mean of the members' losses, and `accuracy` is over the labels of all members. In
    evaluation, the metrics are those of the members' mean output; only `loss` is the mean of the members' losses.
    `predict` returns, and `compute_metrics` gets, the outputs of all members: the shape of one model with an axis of M
    at the end. The metrics are those of `predictions.mean(-1)`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: EnsembleFields | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | None = None,
        **kwargs: Any,
    ):
        args = self._complete_arguments(args, model)
        super().__init__(model, args, data_collator, train_dataset, **kwargs)
        self._evaluator: MemberEvaluator | None = None

    @classmethod
    def check_arguments(cls, args: EnsembleFields, *rows: Any) -> TokenObjective:
        """The checks of one model, and those of ensembles."""
        if args.data_strategy == "shuffle" and args.group_by_prompt:
            raise ValueError(
                "data_strategy='shuffle' decides the order of rows for each member, so group_by_prompt does not work "
                "with it: use data_strategy='shared' or another strategy with shared batches."
            )
        return super().check_arguments(args, *rows)

    def _items(self, batch: dict[str, Any]) -> torch.Tensor:
        """What a batch adds to the divisor of each member's loss, (M,)."""
        items = self._objective.items(batch["label_mask"])
        if self._own_batches:
            return items.view(self.args.num_members, -1).sum(1)
        return (items * self._row_weights(batch)).sum(1)

    def _row_weights(self, batch: dict[str, Any]) -> torch.Tensor:
        """How often each member counts its rows of the batch, (M, B)."""
        rows = batch["row_index"]
        if self._weights is not None:
            return self._weights(rows)
        members = self.args.num_members
        return torch.ones(members, len(rows) // members if "member_shares" in batch else len(rows), device=rows.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the members' losses in training. In evaluation, their mean."""
        members, shares = self.args.num_members, inputs.get("member_shares")
        self.model.use_rows(shares)
        batch = inputs if shares is not None else {**inputs, **for_members(inputs, PER_ROW, members)}
        mask = batch["label_mask"]  # (M * B, T, G)
        logits = self._outputs_of(model, inputs)  # (M * B, T, G, C)
        sums = self._objective.sums(logits, batch)  # (M * B,)
        if self.model.training and num_items_in_batch is not None:
            weights = self._row_weights(inputs)  # (M, B)
            losses = (self._objective.terms(sums, mask).view(members, -1) * weights).sum(1)  # (M,)
            # a member that counts no label in this step has the loss 0
            counts = num_items_in_batch.to(losses.device).clamp(min=1)
            loss = (losses * (self.accelerator.num_processes / counts)).sum()
            with torch.no_grad():
                self._observe_members(logits.detach(), sums.detach(), losses.detach(), batch, weights)
                tokens = inputs["attention_mask"].sum()
                counted = {**batch, "label_mask": mask & (weights.flatten() > 0)[:, None, None]}
                self._observe(logits.detach(), sums.detach() * (weights.flatten() > 0), counted, tokens)
        else:
            loss = self._objective.mean(sums, mask)
        if not return_outputs:
            return loss
        together = logits.unflatten(0, (members, -1)).movedim(0, -2).flatten(-2)  # (B, T, G, M * C)
        return loss, {"logits": together, "sums": sums.view(members, -1).T}

    def _observe_members(
        self,
        logits: torch.Tensor,
        sums: torch.Tensor,
        losses: torch.Tensor,
        batch: dict[str, torch.Tensor],
        weights: torch.Tensor,
    ) -> None:
        """Record a training pass, separately for each member."""
        mask = batch["label_mask"]
        hits = self._objective.hits(logits, batch) & mask
        each = (self._objective.items(mask), hits.flatten(1).sum(1), mask.flatten(1).sum(1))  # (M * B,)
        self._training.add_members(losses, *((values.view(weights.shape) * weights).sum(1) for values in each))

    def _make_recorder(self) -> MemberTrainingRecorder:
        return MemberTrainingRecorder(self.accelerator, self._objective.is_number)

    def _one_output(self, logits: torch.Tensor) -> torch.Tensor:
        return by_member(logits, self.args.num_members).mean(0)

    def _predicted(self, logits: torch.Tensor) -> torch.Tensor:
        return by_member(logits, self.args.num_members).movedim(0, -1)  # (B, T, G, C, M)

    def _make_evaluator(self) -> MemberEvaluator:
        self._evaluator = MemberEvaluator(super()._make_evaluator, self._objective, self.args.num_members)
        return self._evaluator

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        log_disagreement(self, self._evaluator.disagreements, metric_key_prefix)
        self._evaluator = None
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            if self.accelerator.num_processes == 1:  # otherwise RecordingCallback has flushed in all processes
                self._training.flush()
            logs.update(self._training.of_members())
        super().log(logs, start_time)


class ORMEnsembleTrainer(TokenEnsembleTrainer, ORMTrainer):
    """
    Trainer for M outcome reward models that share one base; see [`TokenEnsembleTrainer`] and [`ORMTrainer`].

    Example:

    ```python
    trainer = ORMEnsembleTrainer(
        model="Qwen/Qwen3-0.6B",
        args=ORMEnsembleConfig(output_dir="outputs/orms", num_members=4),
        train_dataset=Dataset.from_list([{"prompt": "2 + 2 =", "completion": " 4", "label": True}, ...]),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl-ext", "orm", "reward-ensemble"]
    config_class = ORMEnsembleConfig


class PRMEnsembleTrainer(TokenEnsembleTrainer, PRMTrainer):
    """Trainer for M process reward models that share one base; see [`TokenEnsembleTrainer`] and [`PRMTrainer`]."""

    _tag_names = ["trl-ext", "prm", "reward-ensemble"]
    config_class = PRMEnsembleConfig


class SegmentEnsembleTrainer(TokenEnsembleTrainer, SegmentRewardTrainer):
    """
    Trainer for M fine-grained reward models that share one base; see [`TokenEnsembleTrainer`] and
    [`SegmentRewardTrainer`].
    """

    _tag_names = ["trl-ext", "segment-reward", "reward-ensemble"]
    config_class = SegmentEnsembleConfig
