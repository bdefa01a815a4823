"""The part that all trainers of reward heads share: checks, callbacks, loaders and saving. Rows and losses differ.

It makes sure that the head trains, checks scores and gradients, opens one W&B run, and saves a sidecar with the
weights.

The contract between [`HeadTraining`] and the trainers
------------------------------------------------------

A trainer is `class X(HeadTraining, Trainer)`, an ensemble `class Y(MemberTraining, X)`. `__init__` runs in this order:

1. Before `super().__init__`. `check_arguments` makes `_objective` (the loss; it needs a `name`). `_set_up` loads the
   model, puts head and adapter on it, and returns the names of the head's modules; `MemberTraining` replaces it and
   returns a stacked model. `RewardTrainer` sets `_reports`, `_tokenization`, `_limits` and `_flat_rows`, because TRL's
   `__init__` calls `_prepare_dataset`, which reads them. `TokenRewardTrainer` has no TRL class above it: it makes
   `_data` (a `LabelledData`) and prepares the data sets itself. `MemberTraining` sets `_own_batches` and `_weights`.
2. `super().__init__`. `_set_up` has already applied some arguments. TRL's `__init__` would apply them again, or warn
   that it ignores them for a model instance. So [`hidden`] sets these arguments to None during that call and restores
   them after it.
3. After `super().__init__`, when `model` is on its device and `accelerator` exists. The trainer sets `_writer` (of the
   class `_writer_class`), `_flat_rows`, `data_collator`, and its recorders (`_recorders` and `_sample`, or
   `_training`). The last call is [`HeadTraining._watch`], which sets `_attention` and `_monitor` and adds the
   callbacks. `MemberTraining` adds `_clipping` after it.

During training, `_row_sizes()` returns the [`RowSize`] of each row of `train_dataset`. For the start-up summary and
the model card, `_loss_in_words()` says what the loss is and `_data_reports` what became of the rows, and the trainer
sets `_shared_prefix` beside `_flat_rows`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForTokenClassification, PretrainedConfig, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PredictionOutput, TrainOutput
from trl.trainer.reward_trainer import DataCollatorForPreference

from trl_ext.logs import follow_transformers
from trl_ext.models.frozen_trunk import FrozenTrunk
from trl_ext.models.heads import check_head_trains, unwrap
from trl_ext.models.rope import original_context
from trl_ext.models.shared_prefix import SharedPrefixSupport, current_attention, select_attention
from trl_ext.models.sidecar import get_sidecar
from trl_ext.trainers.common.checkpoint import PushCallback, SidecarWriter, picklable_loss
from trl_ext.trainers.common.health import GradientCallback, HealthMonitor
from trl_ext.trainers.common.inherited_arguments import (
    warn_of_arguments_without_effect,
    without_effect_on_heads,
    without_full_evaluation,
)
from trl_ext.trainers.common.loading import (
    BY_LENGTH,
    StreamResumeCallback,
    StreamSurvivalCallback,
    WholeStream,
    note_on_rows,
    rows_of_evaluation,
    with_lengths,
)
from trl_ext.trainers.common.model_card import name_in_card, reward_card, write_card
from trl_ext.trainers.common.setup import TrainableModel, set_up_model
from trl_ext.trainers.common.summary import log_start, run_facts
from trl_ext.trainers.common.tracking import open_run, use_safe_callback
from trl_ext.trainers.common.trunk import keep_trunk_states, trunk_states
from trl_ext.trainers.weak_to_strong.confidence import follow_confidence


logger = logging.getLogger(__name__)


@contextmanager
def hidden(args: TrainingArguments, names: Sequence[str]) -> Iterator[None]:
    """Set arguments to None while TRL's `__init__` runs, because `_set_up` has already applied them."""
    values = {name: getattr(args, name) for name in names}
    for name in names:
        setattr(args, name, None)
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(args, name, value)


def without_trl_collator(data_collator: Callable | None) -> Callable | None:
    """The user's collator, or `None` for the default one of TRL's trainers: ours pads in the same way."""
    if isinstance(data_collator, (DataCollatorForPreference, DataCollatorForTokenClassification)):
        logger.info(
            f"`data_collator` is TRL's {type(data_collator).__name__}; the trainer's own is used in its place."
        )
        return None
    return data_collator


def warn_of_rope(config: PretrainedConfig, max_length: int | None) -> None:
    """Warn if rows may be so long that the loss of a row depends on the longest row of its batch, as in TRL."""
    context = original_context(config)
    if context is not None and (max_length is None or max_length > context):
        logger.warning(
            f"The rotary positions of this model (dynamic or longrope) depend on the longest row of a batch if that "
            f"row has more than {context} tokens, so that the losses of its other rows depend on it. Scoring does not "
            f"have this effect. max_length={context} or per_device_train_batch_size=1 avoids it."
        )


class HeadTraining:
    """The first base class of every trainer of a reward head: `class X(HeadTraining, Trainer)`. See the module."""

    loss_is_scaled_for_ga = True
    _writer_class = SidecarWriter
    _shared_prefix = SharedPrefixSupport(False, "the data collator is not ours")  # until the trainer makes its own
    _told_start = False
    _trunk: FrozenTrunk | None = None  # with `trunk_cache`

    dataset_name: str | list[str] | None = None
    """Hub id or file of the training data, for the model card."""

    def _set_up(self, *args: Any, **kwargs: Any) -> TrainableModel:
        """Load the model, its tokenizer and its head. The arguments are those of [`set_up_model`]."""
        trainable = set_up_model(*args, **kwargs)
        check_head_trains(trainable.model, trainable.head)
        return trainable

    def _watch(self, head: tuple[str, ...], recording: TrainerCallback) -> None:
        """Register the health, metric and W&B callbacks; the last step of a trainer's `__init__`."""
        follow_transformers(self.args.get_process_log_level())
        warn_of_arguments_without_effect(self.args, without_effect_on_heads(self.args))
        without_full_evaluation(self.args)
        self._head = head
        self._attention = current_attention(self.model)
        self._monitor = HealthMonitor(note_on_rows(self.train_dataset, self.args))
        warn_of_rope(unwrap(self.model).config, self.args.max_length)
        self.add_callback(GradientCallback(self._monitor, head))
        self.add_callback(recording)
        self.add_callback(PushCallback())
        if isinstance(self.train_dataset, IterableDataset):
            self.add_callback(StreamResumeCallback())
        self.add_callback(StreamSurvivalCallback(self._data_reports, self.args.min_survival))
        follow_confidence(self)
        keep_trunk_states(self)
        use_safe_callback(self)

    # -------------------------------------------------------------------------------------------------------- loaders
    def get_train_dataloader(self) -> DataLoader:
        """Trainer's loader. It adds a column with the lengths of the rows if the sampling strategy needs them."""
        if self.args.train_sampling_strategy in BY_LENGTH and isinstance(self.train_dataset, Dataset):
            column = self.args.length_column_name
            self.train_dataset = with_lengths(self.train_dataset, column, self._row_sizes())
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        """Trainer's loader, with the rows in the order of the data set."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        if isinstance(rows, IterableDataset):
            return self.get_test_dataloader(rows)
        with rows_of_evaluation(self.args, stream=False):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        """Trainer's loader, with the rows in the order of the data set. Every process reads all shards of a stream."""
        stream = isinstance(test_dataset, IterableDataset)
        with rows_of_evaluation(self.args, stream):
            return super().get_test_dataloader(WholeStream(test_dataset) if stream else test_dataset)

    # ------------------------------------------------------------------------------------------ training, evaluation
    @contextmanager
    def _forward(self) -> Iterator[None]:
        """Wrap a forward pass. It may select the attention of flat rows; this selects the usual attention again."""
        try:
            yield
        finally:
            if not self.model.training:  # in training, the backward pass may run the layers again (checkpointing)
                select_attention(self.model, self._attention)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return super().training_step(*args, **kwargs)
        finally:
            select_attention(self.model, self._attention)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if not self.args.report_to and self.is_world_process_zero():
            logger.warning("Metrics are not reported (`report_to` is 'none'). Set report_to='wandb' to keep them.")
        if not self._told_start:
            self._told_start = True
            log_start(self, self._facts())
        open_run(self)
        with self.trunk_states():
            return super().train(*args, **kwargs)

    def trunk_states(self) -> AbstractContextManager[None]:
        """
        A context in which the states of `trunk_cache` are used and kept, by a scorer of `trainer.model` for example.

        `train` opens it. Without `trunk_cache` it changes nothing.
        """
        return trunk_states(self._trunk)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's evaluation. It restores the model's mode afterwards, because `log` reads it."""
        for callback in self.callback_handler.callbacks:
            # EvaluationCallback logs through its trainer; it belongs to a layer above and cannot be imported here
            getattr(callback, "follow", lambda trainer: None)(self)
        open_run(self)
        training = self.model.training
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.model.train(training)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        open_run(self)
        return super().predict(*args, **kwargs)

    # --------------------------------------------------------------------------------------------- telling and saving
    def _facts(self) -> dict[str, str]:
        """What the run is, for the log and the model card. The trainer answers `_loss_in_words`, `_data_reports`."""
        support, outputs = self._shared_prefix, unwrap(self.model).config.num_labels
        plural = "s" if outputs > 1 else ""
        return run_facts(
            self,
            loss=self._loss_in_words(),
            reports=self._data_reports,
            head=f"{', '.join(self._head)}: {outputs} output{plural}, trained and saved in float32",
            shared_prefix=f"{'on' if support.supported else 'off'}: {support.reason}",
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model (or adapter), the tokenizer, `reward_model.json` and a model card.

        Raises [`HeadError`] if a head tensor is not in the saved files.
        """
        with picklable_loss(self.args, self._objective.name):
            super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        self._writer.write(self, folder)
        self._write_cards(Path(folder))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """
        Write `README.md` into the output folder; every `save_model` writes one too.

        Arguments are those of TRL's and transformers' trainers; of `metadata`, `license` and `language` are used.
        """
        self.dataset_name = dataset_name or metadata.pop("dataset", None) or self.dataset_name
        self._write_cards(Path(self.args.output_dir), tags=tags, **metadata)

    def _write_cards(self, folder: Path, **metadata: Any) -> None:
        """Write the model card of what is saved in a folder, on the process that saves."""
        if self.args.should_save:
            card = reward_card(self, get_sidecar(self.model), self._facts(), name_in_card(self, folder), **metadata)
            write_card(folder, card)
