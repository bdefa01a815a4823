"""`TokenRewardTrainer`: reward models that score tokens, from labelled spans, for any number of outputs.

It trains heads of any width. `ORMTrainer`, `PRMTrainer` and `SegmentRewardTrainer` define which rows they read and
which metrics they report. It knows models, batches and processes. Labels are in `data.py`, losses in `objective.py`
and metrics in `evaluation.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, has_length

from trl_ext.data.collators import SpanCollator
from trl_ext.data.mapping import plain_rows
from trl_ext.data.report import DataReport
from trl_ext.data.span_rows import SpanKind
from trl_ext.data.token_batches import RowSize, span_sizes
from trl_ext.data.tokenization import TokenizationSettings
from trl_ext.models.heads import head_class, unwrap
from trl_ext.models.inputs import InputLimits
from trl_ext.models.sidecar import Sidecar
from trl_ext.trainers.common.batching import flat_rows_support, make_train_dataloader, set_up_batching, wants_flat_rows
from trl_ext.trainers.common.head_training import HeadTraining, without_trl_collator
from trl_ext.trainers.common.health import check_finite
from trl_ext.trainers.common.setup import finish_set_up
from trl_ext.trainers.common.summary import with_arguments
from trl_ext.trainers.common.tracking import log_table, without_missing_wandb
from trl_ext.trainers.ranking.recording import RecordingCallback
from trl_ext.trainers.token.collator import TokenRewardCollator
from trl_ext.trainers.token.config import TokenRewardConfig
from trl_ext.trainers.token.data import LabelledData, Rows
from trl_ext.trainers.token.model import as_predictions, check_token_model, known_sidecar, token_outputs
from trl_ext.trainers.token.objective import TokenObjective
from trl_ext.trainers.token.recording import (
    EvaluationRecorder,
    Evaluator,
    TrainingRecorder,
    labelled_points,
    real_scores,
)
from trl_ext.trainers.token.samples import COLUMNS, SampleTable


class TokenRewardTrainer(HeadTraining, Trainer, ABC):
    """
    The base class of the trainers of token-level reward models. Use [`ORMTrainer`], [`PRMTrainer`] or
    [`SegmentRewardTrainer`].

    The trainer tokenizes the whole text once and assigns labels to tokens through character offsets. It reads the
    head's output for every token, before any pooling: decoders keep their sequence-classification class, encoders use
    their token-classification class. The head is fp32, also on a quantized base, and always trained and saved. The
    loss is averaged over the labels (or completions) of the whole optimizer step, over all micro-batches and
    processes. Evaluation accumulates metrics batch by batch, so its memory does not grow with the number of rows.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            Hub id or folder of a language model, an encoder or a token-level reward model. Or an instance of a
            sequence-classification model (decoders) or a token-classification model, with as many labels as this
            trainer needs. An adapter that this trainer saved is trained further.
        args ([`TokenRewardConfig`], *optional*):
            An instance of the trainer's configuration class.
        data_collator (`Callable`, *optional*):
            Must return what [`~trl_ext.data.collators.SpanCollator`] returns.
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, or for evaluation a dictionary of them):
            Rows of the type that the trainer reads, as text or chat messages.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            A fast tokenizer. Defaults to the tokenizer of the model.
        model_init (`Callable`, *optional*):
            A function that returns the model. It is called once, if `model` is not given. (A search over
            hyperparameters is not supported.)
        compute_metrics (`Callable`, *optional*):
            Computes more metrics. It gets the outputs of all tokens, (N, T, C) or (N, T, G, C), and the labels, (N, T)
            or (N, T, G), with -100 where there is no label. With three classes, labels are class numbers from 0. This
            keeps the outputs of the whole data set in memory.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantization of the backbone.
        peft_config (`PeftConfig`, *optional*):
            The adapter. The trainer sets its task type, head modules and excluded modules.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics:
            As in `Trainer`.

    Raises:
        [`DataError`]: if a row is malformed. The message names the row, the column and the fix.
        [`HeadError`]: if the head is frozen, quantized, missing or of another width, or if the model's family has no
            head for tokens.
        [`NotFiniteError`]: if an output, loss or gradient is NaN or infinite.
    """

    _tag_names = ["trl-ext"]

    config_class: ClassVar[type[TokenRewardConfig]] = TokenRewardConfig
    kind: ClassVar[str]  # the kind of reward model, as the sidecar has it
    rows: ClassVar[SpanKind]  # the type of its data sets
    append_eos: ClassVar[bool] = False  # True only for trainers that give EOS a label

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: TokenRewardConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ):
        if model is None:
            if model_init is None:
                raise ValueError(f"{type(self).__name__} needs a `model`: a Hub id, a folder or an instance.")
            model = model_init()
        args = self._complete_arguments(args, model)
        known = known_sidecar(model)
        if train_dataset is not None:
            with PartialState().main_process_first():
                train_dataset = plain_rows(train_dataset)  # a transform may make the columns that are read next
        self._categories = self._find_categories(args, train_dataset, known)
        self._objective = self.check_arguments(args, train_dataset, self._categories)
        without_missing_wandb(args)
        data_collator = without_trl_collator(data_collator)
        set_seed(args.seed)  # the next call draws the head
        model, processing_class, head = self._set_up(
            model, args, processing_class, quantization_config, peft_config,
            num_labels=self._objective.categories * self._objective.outputs, head="per_token",
        )  # fmt: skip
        check_token_model(model, self._objective, self.kind, known)
        finish_set_up(model, processing_class, args)
        tokenization = TokenizationSettings.for_training(processing_class)
        tokenization = tokenization if self.append_eos else TokenizationSettings(append_eos=False)

        self._data = LabelledData(
            self.rows,
            processing_class,
            tokenization,
            args,
            self._categories,
            self._objective,
            InputLimits.of(model),
            partial(self._reading, args),
        )
        if train_dataset is not None:
            train_dataset = self._data.prepare(train_dataset, "train", training=True)
        eval_dataset = self._data.prepare_all(eval_dataset)
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
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which `Trainer` would use through `nn.DataParallel`. "
                "Launch with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self._flat_rows = False
        if data_collator is None:
            self._shared_prefix = flat_rows_support(self)
            self._flat_rows = self._shared_prefix.supported
            spans = SpanCollator(
                processing_class.pad_token_id, self._objective.categories, args.pad_to_multiple_of, self._flat_rows
            )
            cut = getattr(args, "max_completion_length", None)  # of a process model
            self.data_collator = TokenRewardCollator(spans, self.rows, cut)
        unwrap(self.model).add_model_tags(self._tag_names)
        self._writer = self._writer_class(self, head, tokenization, **self._describe())
        self._recorder: EvaluationRecorder | None = None
        self._training = self._make_recorder()
        self._samples: SampleTable | None = None
        self._watch(head, RecordingCallback(self._training))

    def _complete_arguments(self, args: TokenRewardConfig | None, model: str | nn.Module) -> TokenRewardConfig:
        """The arguments, or the defaults without any. Raises `TypeError` for another trainer's arguments."""
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            return self.config_class(f"{Path(name).name}-{type(self).__name__.removesuffix('Trainer')}")
        if not isinstance(args, self.config_class):
            raise TypeError(f"args is a {type(args).__name__}. Needed: a `{self.config_class.__name__}` of trl_ext.")
        return args

    @classmethod
    def check_arguments(
        cls, args: TokenRewardConfig, train_dataset: Rows | None = None, categories: Sequence[str] = ()
    ) -> TokenObjective:
        """
        Make the loss that the arguments name.

        Raises `ValueError` for arguments that cannot work with any model or data.
        """
        set_up_batching(args, train_dataset, args.group_by_prompt)
        wants_flat_rows(args)
        return TokenObjective(
            args.loss_type,
            args.loss_kwargs,
            args.class_weights,
            args.averaging,
            categories=max(1, len(categories)),
            outputs=cls._outputs(args),
            label_smoothing=args.label_smoothing_factor,
        )

    # -------------------------------------------------------------------------------------- hooks for the subclasses
    @classmethod
    def _outputs(cls, args: TokenRewardConfig) -> int:
        """Number of outputs of the head for each category."""
        return 1

    def _find_categories(
        self, args: TokenRewardConfig, train_dataset: Rows | None, known: Sidecar | None
    ) -> tuple[str, ...]:
        """Names of the categories. Empty if there is only one, which has no name."""
        return ()

    def _reading(self, args: TokenRewardConfig, training: bool) -> dict[str, Any]:
        """Arguments of [`prepare_spans`] that only this type of data set has."""
        return {}

    def _make_recorder(self) -> TrainingRecorder:
        """The recorder of training metrics."""
        return TrainingRecorder(self.accelerator)

    @abstractmethod
    def _make_evaluator(self) -> Evaluator:
        """New, empty metrics for one evaluation."""

    def _describe(self) -> dict[str, Any]:
        """The fields of the sidecar that describe the outputs."""
        return {
            "kind": self.kind,
            "head_class": head_class(self.model),
            "num_labels": self._objective.categories * self._objective.outputs,
            "outputs_per_category": self._objective.outputs,
            "categories": list(self._categories) or None,
            "loss_type": self._objective.name,
            "label_placement": self.args.label_placement,
            "label_meaning": self._objective.meaning,
            "training": {"loss_kwargs": self._objective.loss_kwargs, "averaging": self._objective.averaging},
        }

    def _loss_in_words(self) -> str:
        objective = self._objective
        smoothing = self.args.label_smoothing_factor
        words = with_arguments(objective.name, **objective.loss_kwargs, label_smoothing_factor=smoothing)
        return f"{words}, averaged over {'labels' if objective.averaging == 'token' else 'completions'}"

    # --------------------------------------------------------------------------------------------------------- data
    @property
    def _data_reports(self) -> list[DataReport]:
        return self._data.reports

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*self._data.columns, self.args.length_column_name]

    def _row_sizes(self) -> list[RowSize]:
        return span_sizes(self.train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        by_prompt = self.args.group_by_prompt
        if self.train_dataset is None or (self.args.max_tokens_per_batch is None and not by_prompt):
            return super().get_train_dataloader()
        return make_train_dataloader(self, self._row_sizes(), self._data.columns, self._flat_rows, by_prompt)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one optimizer step, and the divisor of their loss over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            items = items + self._items(batch).to(device)
        return batches, self.accelerator.reduce(items, reduction="sum")

    def _items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What a batch adds to the divisor."""
        return self._objective.items(batch["label_mask"]).sum()

    # --------------------------------------------------------------------------------------------------------- loss
    def _outputs_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The head's output for every token, (B, T, G, C), fp32."""
        with self._forward():
            return token_outputs(model, inputs, self._objective)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask = inputs["label_mask"]
        logits = self._outputs_of(model, inputs)  # (B, T, G, C)
        sums = self._objective.sums(logits, inputs)  # (B,)
        loss = self._objective.mean(sums, mask, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes
        if self.model.training:
            with torch.no_grad():
                self._observe(logits.detach(), sums.detach(), inputs, inputs["attention_mask"].sum())
        return (loss, {"logits": logits, "sums": sums}) if return_outputs else loss

    def _observe(
        self, logits: torch.Tensor, sums: torch.Tensor, inputs: dict[str, torch.Tensor], tokens: torch.Tensor
    ) -> None:
        """Check and record the outputs and losses of a training pass."""
        scores = self._objective.scores(logits)  # (B, T, G)
        flat, real = real_scores(scores, inputs)
        self._monitor.update(
            self.state.global_step,
            flat,
            real,
            sums,
            inputs["row_index"],
            chance=lambda: self._objective.sums(torch.zeros_like(logits), inputs),
        )
        self._training.add(self._objective.hits(logits, inputs), inputs["label_mask"], tokens)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        scores = self._objective.scores(self._one_output(outputs["logits"]))  # (B, T, G)
        check_finite(real_scores(scores, inputs)[0], outputs["sums"], inputs["row_index"])
        labels_of_row = inputs["label_mask"].flatten(1).sum(1)  # (B,)
        points = labelled_points(outputs["logits"], inputs)
        self._recorder.add(points, outputs["sums"], labels_of_row, inputs["row_index"])
        if self.is_world_process_zero() and "wandb" in self.args.report_to:
            self._samples.add(scores, inputs)
        if prediction_loss_only:
            return None, None, None
        return loss, *as_predictions(self._predicted(outputs["logits"]), inputs, self._objective)

    def _one_output(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that the evaluation metrics use, (B, T, G, C)."""
        return logits

    def _predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that `predict` returns, (B, T, G, C) or with more axes."""
        return logits

    # ------------------------------------------------------------------------------------- training and evaluation
    def evaluate(
        self,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        if not isinstance(eval_dataset, str):  # a string names a data set of `self.eval_dataset`, already prepared
            eval_dataset = self._data.prepare_all(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Rows, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Run the model on a data set with the columns of the training data.

        `predictions` are the outputs of all tokens, (N, T, C) or (N, T, G, C). `label_ids` are the labels, (N, T) or
        (N, T, G). Both are -100 where there is no value. Dropped rows have no prediction. `metrics` are those of
        `evaluate`.
        """
        test_dataset = self._data.prepare(test_dataset, metric_key_prefix)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop. All metrics, `loss` too, count every row once, with any batch size and any processes."""
        self._recorder = recorder = EvaluationRecorder(
            self.accelerator,
            self._make_evaluator(),
            by_row=self._objective.averaging == "sequence",
            stream=not has_length(dataloader.dataset),
        )
        names = [*self._categories] or [""]
        self._samples = samples = SampleTable(self.processing_class, self.args.log_table_size, names)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self._recorder = self._samples = None
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in recorder.summary().items()}
        own = {name: value for name, value in output.metrics.items() if name != f"{metric_key_prefix}_loss"}
        output.metrics.clear()
        output.metrics.update({**metrics, **own})  # the values of the user's `compute_metrics` win
        log_table(self, COLUMNS, samples.rows, samples.scores, metric_key_prefix)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            if self.accelerator.num_processes == 1:  # otherwise RecordingCallback has flushed in all processes
                self._training.flush()
            accuracy = self._training.accuracy()
            if accuracy is not None:
                if not self._objective.is_number:
                    logs["accuracy"] = accuracy
                logs["num_tokens"] = float(self._training.tokens)
                logs.update(self._data.counts())
        super().log(logs, start_time)
