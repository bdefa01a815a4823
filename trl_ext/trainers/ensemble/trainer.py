"""`RewardEnsembleTrainer`: M reward models on one base in one run, each as if it were trained alone.

The loss is the sum of the members' losses, and gradients are clipped for each member, so no member influences another.
`member_training.py` has the parts that all ensembles share.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from trl_ext.metrics.disagreement import group_disagreement
from trl_ext.metrics.ranking import pair_accuracy
from trl_ext.trainers.common.health import check_finite
from trl_ext.trainers.common.tracking import log_disagreement
from trl_ext.trainers.ensemble.config import RewardEnsembleConfig
from trl_ext.trainers.ensemble.member_training import MemberTraining, for_members
from trl_ext.trainers.ranking.recording import ScoredBatch, signed_ratings
from trl_ext.trainers.ranking.trainer import RewardTrainer, in_groups


PER_GROUP = ("ratings", "group_mask", "completion_lengths", "row_index", "margin", "target")
"""Tensors of a batch that the loss and its checks read."""


class RewardEnsembleTrainer(MemberTraining, RewardTrainer):
    """
    Trainer for M reward models that share one base. Each has a LoRA adapter and a head; all train in one run.

    It takes the arguments of [`RewardTrainer`], with a `RewardEnsembleConfig`. `peft_config` is required. Member i
    ends as `RewardTrainer` would with `seed=member_seeds[i]`, on the same rows in the same order (apart from dropout,
    which is off by default). `save_model()` and every checkpoint write one ordinary adapter folder per member and
    `reward_ensemble.json`.

    If only the last layers have LoRA (`branch_at`, or `layers_to_transform` of the LoRA config), the layers below run
    without a gradient. If the members also share their batches, these layers run once for all members.

    In training, metrics are means over the members. In evaluation, the metrics are those of the members' mean score;
    only `loss` is the mean of the members' losses. `predict` returns the scores of all members, (rows, K, M).

    Raises:
        `ValueError`: for set-ups in which members cannot train together: FSDP, DeepSpeed, adapters other than plain
            LoRA, or a model family that mixes rows.
    """

    _tag_names = ["trl", "reward-trainer", "reward-ensemble", "trl-ext"]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardEnsembleConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RewardEnsembleConfig(f"{Path(name).name}-Reward-Ensemble")
        elif not isinstance(args, RewardEnsembleConfig):
            args = RewardEnsembleConfig.from_trl(args)
        self._disagreements: list[tuple[float, float]] = []
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **kwargs,
        )

    # -------------------------------------------------------------------------------------------------------- data
    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one optimizer step, and the number of groups that each member counts, (M,)."""
        batches, groups = super().get_batch_samples(epoch_iterator, num_batches, device)
        members = self.args.num_members
        if self._weights is None:
            return batches, (groups / members if self._own_batches else groups).expand(members)
        counts = torch.zeros(members, device=device)
        for batch in batches:  # empty at the end of a stream
            batch["member_weights"] = self._weights(batch["row_index"])  # (M, B)
            counts = counts + batch["member_weights"].sum(1).to(device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    # -------------------------------------------------------------------------------------------------------- loss
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
        batch = inputs if shares is not None else {**inputs, **for_members(inputs, PER_GROUP, members)}
        mask = batch["group_mask"]  # (M * B, K)
        scores = in_groups(self._candidate_scores(model, inputs), mask)  # (M * B, K)
        losses = ranking_losses = self._objective(scores, batch)  # (M * B,)
        weights = inputs.get("member_weights")  # (M, B)
        if self.model.training:
            losses = self._objective.with_batch_penalty(losses, scores, mask, members, weights)
        if self.model.training and num_items_in_batch is not None:
            each = losses.view(members, -1) if weights is None else losses.view(members, -1) * weights
            # a member that counts no group in this step has the loss 0
            counts = num_items_in_batch.to(each.device).clamp(min=1)
            loss = (each.sum(1) * (self.accelerator.num_processes / counts)).sum()
        else:
            loss = losses.mean()
        with torch.no_grad():
            if self.model.training:
                self._observe_training(scores.detach(), losses.detach(), batch, weights, ranking_losses.detach())
            else:
                self._observe_evaluation(scores, losses, inputs)
        if not return_outputs:
            return loss
        by_member = scores.masked_fill(~mask, -100.0).view(members, -1, mask.shape[1])
        return loss, {"scores": by_member.permute(1, 2, 0)}  # (B, K, M)

    def _observe_training(
        self,
        scores: torch.Tensor,
        losses: torch.Tensor,
        batch: dict[str, Any],
        weights: torch.Tensor | None,
        ranking_losses: torch.Tensor,
    ) -> None:
        """Check and record a training pass, separately for each member."""
        self._watch_training(scores, losses, batch, ranking_losses)
        mask, rows, recorder = batch["group_mask"], batch["row_index"], self._recorders["train"]
        ratings = signed_ratings(batch)
        members = self.args.num_members
        whose = torch.arange(members, device=losses.device).repeat_interleave(len(losses) // members)
        accuracy = pair_accuracy(scores, ratings, mask)
        more = {}
        for name, values in (("loss", losses.float()), ("accuracy", accuracy)):
            more |= {f"{name}_member_{m}": values.where(whose == m, torch.nan) for m in range(members)}
        observed = ScoredBatch(scores, ratings, mask, batch["completion_lengths"], losses, rows, more)
        if weights is not None:
            counted = weights.flatten() > 0
            observed = ScoredBatch(
                *(tensor[counted] for tensor in observed[:-1]), {name: value[counted] for name, value in more.items()}
            )
        recorder.add(observed)

    def _observe_evaluation(self, scores: torch.Tensor, losses: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Check and record a pass: the members' mean score, and how members differ."""
        members, mask, rows = self.args.num_members, inputs["group_mask"], inputs["row_index"]
        check_finite(scores, losses, rows.repeat(members))
        scores, losses = scores.view(members, *mask.shape), losses.view(members, -1)  # (M, B, K), (M, B)
        mean, ratings = scores.mean(0), signed_ratings(inputs)
        self._keep_samples(mean, inputs)
        spread = group_disagreement(scores, mask)
        more = {"disagreement": spread}
        for member in range(members):
            more[f"loss_member_{member}"] = losses[member].float()
            more[f"accuracy_member_{member}"] = pair_accuracy(scores[member], ratings, mask)
        recorder = self._recorders["eval"]
        recorder.add(ScoredBatch(mean, ratings, mask, inputs["completion_lengths"], losses.mean(0), rows, more))
        if "wandb" in self.args.report_to and self.is_world_process_zero():
            errors = 1 - pair_accuracy(mean, ratings, mask)
            self._disagreements.extend(zip(spread.tolist(), errors.tolist(), strict=True))

    # ------------------------------------------------------------------------------------- training and evaluation
    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._disagreements = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        log_disagreement(self, self._disagreements, metric_key_prefix)
        return output
