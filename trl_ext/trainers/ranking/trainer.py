"""`RewardTrainer`: TRL's reward trainer for groups of any size, with a head that is trained, saved and exact.

A pair is a group of two. Everything that is not defined here (arguments, callbacks, PEFT, Accelerate, model cards)
comes from TRL.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, has_length

from trl_ext.data.collators import GroupCollator
from trl_ext.data.formats import prepare_groups
from trl_ext.data.mapping import plain_rows, rename_old_columns
from trl_ext.data.report import DataReport
from trl_ext.data.token_batches import RowSize, group_sizes
from trl_ext.data.tokenization import TokenizationSettings, common_prefix_length
from trl_ext.models.building import is_quantized
from trl_ext.models.heads import candidate_scores, head_inputs
from trl_ext.models.inputs import InputLimits
from trl_ext.models.shared_prefix import flat_scores
from trl_ext.trainers.common.batching import flat_rows_support, make_train_dataloader, set_up_batching, wants_flat_rows
from trl_ext.trainers.common.head_training import HeadTraining, hidden, without_trl_collator
from trl_ext.trainers.common.health import check_finite
from trl_ext.trainers.common.setup import is_template_file
from trl_ext.trainers.common.summary import with_arguments
from trl_ext.trainers.common.tracking import ScoredGroup, log_evaluation, without_missing_wandb
from trl_ext.trainers.ranking.config import RewardConfig
from trl_ext.trainers.ranking.language_loss import language_head_of, language_loss
from trl_ext.trainers.ranking.objective import RankingObjective
from trl_ext.trainers.ranking.recording import GroupRecorder, RecordingCallback, ScoredBatch, signed_ratings


EvalDataset = Dataset | IterableDataset

GROUP_COLUMNS = ["candidate_ids", "candidate_ratings", "row_index", "group_margin", "group_target"]


class RewardTrainer(HeadTraining, trl.RewardTrainer):
    """
    Trainer for reward models from pairs, K-way rankings, ratings, margins and soft preferences.

    A drop-in superset of `trl.RewardTrainer`: it takes the same arguments and has the same losses and metrics on plain
    pairs. These differences are intended:

    - The score is read at the last *real* token. (TRL does not see the final EOS if the pad token is EOS.)
    - The head and the LoRA weights are fp32, also on a quantized base.
    - LoRA always trains and saves the head, whatever `task_type` is.
    - Dropped rows are counted and shown.
    - Evaluation metrics are means over groups, not over batches.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            Hub id or folder of a language model, an encoder or a reward model, or an instance of a
            sequence-classification model with one label. An adapter that this trainer saved is trained further.
        args ([`RewardConfig`] or `trl.RewardConfig`, *optional*):
            Arguments.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`):
            Preference rows (`chosen`, `rejected`, and optionally `prompt`, `margin`, `preference_probability` or
            `chosen_rating` with `rejected_rating`) or ranked rows (`prompt`, `completions`, and `ratings` or `ranks`),
            as text or chat messages. Tokenized rows are accepted too (`chosen_ids` and `rejected_ids`, or
            `candidate_ids`).
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantization of the backbone. The head stays fp32.
        peft_config (`PeftConfig`, *optional*):
            The adapter. The trainer sets its task type, head modules and excluded modules.
        data_collator, processing_class, compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs,
        preprocess_logits_for_metrics:
            As in TRL. A custom collator must return what [`GroupCollator`] returns.

    Raises:
        [`DataError`]: if a row is malformed. The message names the row, the column and the fix.
        [`HeadError`]: if the head is frozen, quantized or missing.
        [`NotFiniteError`]: if a score, loss or gradient is NaN or infinite.
    """

    _tag_names = ["trl", "reward-trainer", "trl-ext"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RewardConfig(f"{Path(name).name}-Reward")
        elif not isinstance(args, RewardConfig):
            args = RewardConfig.from_trl(args)
        self._objective = self.check_arguments(args, train_dataset)
        self._reports: list[DataReport] = []
        self._tokenization: TokenizationSettings | None = None
        self._flat_rows = False
        without_missing_wandb(args)
        data_collator = without_trl_collator(data_collator)

        set_seed(args.seed)  # the next call draws the head: the same seed gives the same head as in TRL
        model, processing_class, head = self._set_up(model, args, processing_class, quantization_config, peft_config)
        self._limits = InputLimits.of(model)
        # TRL casts the trainable weights of a quantized model to bf16, so copy them before and restore them after
        exact = (
            {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            if is_quantized(model)
            else {}
        )
        used_up = ["model_init_kwargs", "chat_template_path"]
        if args.chat_template_path is not None and not is_template_file(args.chat_template_path):
            used_up.append("eos_token")  # the template's tokenizer has the last word, as in TRL
        with hidden(args, used_up):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        for name, parameter in self.model.named_parameters():
            if name in exact:
                parameter.data = exact.pop(name).to(parameter.device)
        self._language_head = language_head_of(self)
        training = {"loss_type": self._objective.name, "loss_kwargs": self._objective.loss_kwargs}
        self._writer = self._writer_class(
            self, head, self._tokenization, loss_type=self._objective.name, training=training
        )
        if data_collator is None:
            self._shared_prefix = flat_rows_support(self)
            self._flat_rows = self._shared_prefix.supported
            pad_token_id, multiple = self.processing_class.pad_token_id, args.pad_to_multiple_of
            self.data_collator = GroupCollator(pad_token_id, multiple, self._flat_rows)
        self._recorders = {
            "train": GroupRecorder(self.accelerator, evaluation=False),
            "eval": GroupRecorder(self.accelerator, evaluation=True),
        }
        self._sample: tuple[list[dict], list[float]] = ([], [])
        self._watch(head, RecordingCallback(self._recorders["train"]))

    @classmethod
    def check_arguments(
        cls, args: RewardConfig, train_dataset: Dataset | IterableDataset | None = None
    ) -> RankingObjective:
        """
        Make the loss that the arguments name.

        Raises `ValueError` for arguments that cannot work with any model or data.
        """
        set_up_batching(args, train_dataset)
        wants_flat_rows(args)
        return RankingObjective(
            args.loss_type,
            args.loss_kwargs,
            args.center_rewards_coefficient,
            args.label_smoothing_factor,
            args.batch_sum_to_zero_coefficient,
        )

    def _loss_in_words(self) -> str:
        args = self.args
        return with_arguments(
            self._objective.name,
            **self._objective.loss_kwargs,
            center_rewards_coefficient=args.center_rewards_coefficient,
            batch_sum_to_zero_coefficient=args.batch_sum_to_zero_coefficient,
            sft_coefficient=args.sft_coefficient,
            label_smoothing_factor=args.label_smoothing_factor,
        )

    # -------------------------------------------------------------------------------------------------------- data
    @property
    def _data_reports(self) -> list[DataReport]:
        return self._reports

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if self._tokenization is None:
            self._tokenization = TokenizationSettings.for_training(processing_class)
        state = PartialState()
        with state.main_process_first(), state.local_main_process_first():
            dataset = rename_old_columns(plain_rows(dataset))
            prepared, report = prepare_groups(
                dataset,
                processing_class,
                tokenization=self._tokenization,
                max_length=args.max_length,
                dataset_name=dataset_name,
                num_proc=args.dataset_num_proc,
                min_survival=args.min_survival,
                loss_needs_ratings=self._objective.needs_ratings,
                use_pair_ratings=self._objective.uses_pair_ratings,
                pair_columns=True,
                vocab_size=self._limits.vocab_size,
                max_positions=self._limits.max_positions,
            )
            self._objective.check_data(prepared, dataset_name)
        if "row_index" not in (dataset.column_names or []):  # otherwise these rows were prepared and reported before
            self._reports.append(report)
        return prepared

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*GROUP_COLUMNS, self.args.length_column_name]

    def _row_sizes(self) -> list[RowSize]:
        return group_sizes(self.train_dataset, self._flat_rows)

    def get_train_dataloader(self) -> DataLoader:
        if self.args.max_tokens_per_batch is None or self.train_dataset is None:
            return super().get_train_dataloader()
        return make_train_dataloader(self, self._row_sizes(), GROUP_COLUMNS, self._flat_rows)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one optimizer step, and the number of groups in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        groups = torch.tensor(sum(len(batch["ratings"]) for batch in batches), device=device)
        if self.accelerator.num_processes > 1:
            groups = self.accelerator.reduce(groups, reduction="sum")
        return batches, groups

    # -------------------------------------------------------------------------------------------------------- loss
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask = inputs["group_mask"]
        with head_inputs(model) as states:
            scores = in_groups(self._candidate_scores(model, inputs), mask)  # (B, K)
        losses = ranking_losses = self._objective(scores, inputs)  # (B,)
        if self.model.training:
            losses = self._objective.with_batch_penalty(losses, scores, mask)
            if self._language_head is not None:
                losses = losses + self.args.sft_coefficient * language_loss(states[0], self._language_head, inputs)
        if self.model.training and num_items_in_batch is not None:
            # divide by the groups of the whole accumulation window; DDP averages over processes
            loss = losses.sum() * (self.accelerator.num_processes / num_items_in_batch)
        else:
            loss = losses.mean()
        with torch.no_grad():
            self._observe(scores.detach(), losses.detach(), inputs, ranking_losses.detach())
        # pad outputs with -100, as Trainer pads them across batches
        return (loss, {"scores": scores.masked_fill(~mask, -100.0)}) if return_outputs else loss

    def _candidate_scores(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The score of each candidate of the batch, (N,), from a flat row or from padded rows."""
        if "prefix_layout" not in inputs:
            return candidate_scores(model, inputs["input_ids"], inputs["attention_mask"])
        with self._forward():
            return flat_scores(model, inputs["prefix_layout"].to(inputs["group_mask"].device))[:, 0]

    def _observe(
        self,
        scores: torch.Tensor,
        losses: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        ranking_losses: torch.Tensor,
    ) -> None:
        """Check and record the scores of a forward pass, its losses, and these without what options add to them."""
        mask, rows = inputs["group_mask"], inputs["row_index"]
        if self.model.training:
            self._watch_training(scores, losses, inputs, ranking_losses)
        else:
            check_finite(scores, losses, rows)
            self._keep_samples(scores, inputs)
        mode = "train" if self.model.training else "eval"
        lengths = inputs["completion_lengths"]
        self._recorders[mode].add(ScoredBatch(scores, signed_ratings(inputs), mask, lengths, losses, rows))

    def _watch_training(
        self,
        scores: torch.Tensor,
        losses: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        ranking_losses: torch.Tensor,
    ) -> None:
        """Pass scores and losses of a training pass to the monitor, and count its tokens. Arguments as `_observe`."""
        # a NaN of an addition must be seen, and a loss at chance is one of the ranking
        watched = torch.where(losses.isfinite(), ranking_losses, losses)
        self._monitor.update(
            self.state.global_step,
            scores,
            inputs["group_mask"],
            watched,
            inputs["row_index"],
            chance=lambda: self._objective(torch.zeros_like(scores), inputs),
        )
        layout = inputs.get("prefix_layout")
        tokens = inputs["attention_mask"].sum() if layout is None else layout.sequence_tokens
        self._recorders["train"].count_tokens(tokens)

    def _keep_samples(self, scores: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """On the main process, keep all scores for the histogram and the first groups for the table."""
        groups, all_scores = self._sample
        if "wandb" not in self.args.report_to or not self.is_world_process_zero():
            return
        mask = inputs["group_mask"]
        all_scores.extend(scores[mask].tolist())
        if "prefix_layout" in inputs:
            sequences = iter(inputs["prefix_layout"].sequences())
        else:
            rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
            sequences = (ids[real].tolist() for ids, real in rows)
        for b in range(min(len(mask), self.args.log_table_size - len(groups))):
            k = int(mask[b].sum())
            ids = list(islice(sequences, k))
            groups.append({"ids": ids, "scores": scores[b, :k].tolist(), "ratings": inputs["ratings"][b, :k].tolist()})

    # ------------------------------------------------------------------------------------- training and evaluation
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Trainer's step. If `compute_metrics` gets inputs, they have one row per group, as the scores do."""
        output = super().prediction_step(model, inputs, *args, **kwargs)
        if "inputs" in self.args.include_for_metrics:
            ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
            inputs["input_ids"] = candidates_in_rows(ids, real, inputs["group_mask"])  # Trainer reads it after this
        return output

    def predict(
        self, test_dataset: EvalDataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Score a data set with the columns of the training data.

        `predictions` are the scores (rows, K), with -100 where a row has no candidate. Dropped rows have no
        prediction. `metrics` are those of `evaluate`.
        """
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop. All metrics, `loss` too, count every group once, with any batch size and any processes."""
        recorder = GroupRecorder(self.accelerator, evaluation=True, stream=not has_length(dataloader.dataset))
        self._recorders["eval"], self._sample = recorder, ([], [])
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        recorder.flush()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in recorder.summary().items()}
        metrics[f"{metric_key_prefix}_num_tokens"] = float(self._total_train_tokens)
        own = {name: value for name, value in output.metrics.items() if name != f"{metric_key_prefix}_loss"}
        output.metrics.update({**metrics, **own})  # the values of the user's `compute_metrics` win
        groups, scores = self._sample
        log_evaluation(self, [self._as_text(group) for group in groups], scores, metric_key_prefix)
        return output

    def _as_text(self, group: dict[str, list]) -> ScoredGroup:
        prefix = common_prefix_length(group["ids"])
        decode = self.processing_class.decode
        return ScoredGroup(
            prompt=decode(group["ids"][0][:prefix]),
            completions=[decode(ids[prefix:]) for ids in group["ids"]],
            scores=group["scores"],
            ratings=group["ratings"],
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            recorder = self._recorders["train"]
            if self.accelerator.num_processes == 1:  # otherwise RecordingCallback has flushed in all processes
                recorder.flush()
            self._total_train_tokens = recorder.tokens // self._tp_size
            summary = recorder.summary()
            if summary:
                summary.pop("loss")  # keep Trainer's loss, which counts every optimizer step once
                logs.update(summary)
                logs["num_tokens"] = float(self._total_train_tokens)
                logs.update(self._data_counts())
        super().log(logs, start_time)

    def _data_counts(self) -> dict[str, int]:
        """The counts of used and dropped rows, once. For a stream each time, because its counts grow."""
        return {name: count for report in self._reports for name, count in report.news().items()}


def candidates_in_rows(ids: torch.Tensor, real: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Put the token ids of all candidates of a group in one row, with -100 after each candidate and as padding.

    Args:
        ids, real (`torch.Tensor` of shape `(N, T)`): padded sequences, and True for their real tokens.
        mask (`torch.BoolTensor` of shape `(B, K)`): True for a real candidate.

    Returns:
        `torch.Tensor` of shape `(B, L)`.

    Example:

    ```python
    >>> ids, mask = torch.tensor([[5, 6], [7, 0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> candidates_in_rows(ids, ids > 0, mask)
    tensor([[   5,    6, -100,    7, -100]])
    ```
    """
    ended = [torch.cat([row[kept], row.new_full((1,), -100)]) for row, kept in zip(ids, real, strict=True)]
    sizes = mask.sum(1).tolist()
    groups = [torch.cat(ended[end - size : end]) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    return nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=-100)


def in_groups(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Arrange the scores (N,) of all candidates as (B, K), by the mask (B, K). Masked places are 0."""
    if scores.numel() == mask.numel():  # every group has K candidates
        return scores.view(mask.shape)
    return torch.zeros(mask.shape, device=scores.device).masked_scatter(mask, scores)
