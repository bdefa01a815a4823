"""`MemberTraining`: the part that all ensemble trainers add to the trainer of one model.

It makes the stacked model, gives each member its rows, clips gradients for each member, and saves a folder for each.
`trl_ext.models.ensemble.stacked_model` runs all members in one pass; `data.py` decides which rows each member gets. It
knows nothing of losses or scores.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from trl_ext.data.mapping import plain_rows
from trl_ext.losses.distillation import LogConfRanking, LogConfToken
from trl_ext.models.bases import check_base_is_saved
from trl_ext.models.ensemble.member_config import branch_at
from trl_ext.models.ensemble.stacked_lora import clip_by_member
from trl_ext.models.ensemble.stacked_model import MEMBER, StackedRewardModel
from trl_ext.models.loading import how_to_merge, is_language_adapter
from trl_ext.models.sidecar import get_sidecar
from trl_ext.trainers.common.checkpoint import EnsembleWriter
from trl_ext.trainers.common.model_card import ensemble_card, name_in_card, reward_card, write_card
from trl_ext.trainers.common.setup import TrainableModel, is_template_file, set_up_model, uses_fsdp
from trl_ext.trainers.ensemble.config import EnsembleFields
from trl_ext.trainers.ensemble.data import COLUMN_PREFIX, RowWeights, member_dataloader


logger = logging.getLogger(__name__)


class MemberTraining:
    """
    The first base class of an ensemble trainer, before the trainer of one model: `class X(MemberTraining, Y)`.

    In training, the loss must be the sum of the members' losses, each over the rows that the member counts. Then no
    member influences another.
    """

    _writer_class = EnsembleWriter

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: EnsembleFields,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        **kwargs: Any,
    ):
        self._own_batches = args.data_strategy == "shuffle"
        if self._own_batches and data_collator is not None:
            raise ValueError(
                "data_strategy='shuffle' needs its own collator, which joins the batches of the members. Leave "
                "`data_collator` out, or use data_strategy='shared'."
            )
        weighted = args.data_strategy not in ("shuffle", "shared")
        self._weights = RowWeights(args.data_strategy, args.seeds, args.seed) if weighted else None
        if weighted and self._weights.column is not None and train_dataset is not None:
            with PartialState().main_process_first():
                train_dataset = plain_rows(train_dataset)  # a transform may make the column
            self._weights.read_column(train_dataset, "train")
        super().__init__(model=model, args=args, data_collator=data_collator, train_dataset=train_dataset, **kwargs)
        self._clipping = MemberClipping()
        self.add_callback(self._clipping)

    @classmethod
    def check_arguments(
        cls, args: EnsembleFields, train_dataset: Dataset | IterableDataset | None = None, *more: Any
    ) -> Any:
        """As of one model; and what members cannot do."""
        _check_arguments(args, train_dataset)
        return super().check_arguments(args, train_dataset, *more)

    def _set_up(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: EnsembleFields,
        processing_class: PreTrainedTokenizerBase | None,
        quantization_config: BitsAndBytesConfig | None,
        peft_config: PeftConfig | None,
        **head_kwargs: Any,
    ) -> TrainableModel:
        check_adapter(peft_config)
        if isinstance(model, PeftModel) or (isinstance(model, str) and Path(model, "adapter_config.json").is_file()):
            if isinstance(model, str) and is_language_adapter(model):
                raise ValueError(how_to_merge(model))
            raise ValueError("The model has an adapter already. Merge it first (`merge_reward_model`).")
        if args.chat_template_path is not None and not is_template_file(args.chat_template_path):
            raise ValueError(
                f"chat_template_path={args.chat_template_path!r} may add tokens, and each member would have to train "
                "their embeddings. Give a Jinja file."
            )
        if not isinstance(model, str):
            check_base_is_saved(model)
        base, tokenizer, head = set_up_model(model, args, processing_class, quantization_config, None, **head_kwargs)
        if args.branch_at is not None:
            peft_config = branch_at(base, peft_config, args.branch_at)
        stacked = StackedRewardModel(base, peft_config, head, args.num_members, args.seeds)
        layers = base.config.get_text_config().num_hidden_layers
        logger.info(f"{args.num_members} members; {stacked.branch_layer} of {layers} layers run once for all members.")
        return TrainableModel(stacked, tokenizer, head)

    def get_train_dataloader(self) -> DataLoader:
        if not self._own_batches or self.train_dataset is None:
            return super().get_train_dataloader()
        data_seed = self.args.data_seed
        seeds = self.args.seeds if data_seed is None else [data_seed + m for m in range(self.args.num_members)]
        self._set_signature_columns_if_needed()
        return member_dataloader(self, self._signature_columns, seeds)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return super().training_step(*args, **kwargs) / self.args.num_members  # log the mean over the members
        finally:
            self.model.use_rows()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with self._member_clipping(), _without_best_model_warning():
            output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            for member in range(self.args.num_members):
                self.model.load_member(member, Path(self.state.best_model_checkpoint, MEMBER.format(member)))
        return output

    @contextmanager
    def _member_clipping(self) -> Iterator[None]:
        """Pass `max_grad_norm` to the callback, which sets it to 0 for Trainer, and restore it after training."""
        max_norm = self._clipping.max_norm = self.args.max_grad_norm
        try:
            yield
        finally:
            self.args.max_grad_norm = max_norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a folder per member, each an ordinary reward model, and `reward_ensemble.json`."""
        during_training = self.args.max_grad_norm
        self.args.max_grad_norm = self._clipping.max_norm if during_training == 0.0 else during_training
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.args.max_grad_norm = during_training

    def _write_cards(self, folder: Path, **metadata: Any) -> None:
        """A card for the ensemble, and one for each member."""
        if not self.args.should_save:
            return
        facts, name, members = self._facts(), name_in_card(self, folder), self.args.num_members
        sidecar = get_sidecar(self.model)
        write_card(folder, ensemble_card(self, sidecar, facts, name, members, **metadata))
        for member in map(MEMBER.format, range(members)):
            if Path(folder, member).is_dir():
                write_card(folder / member, reward_card(self, sidecar, facts, f"{name}/{member}", **metadata))


class MemberClipping(TrainerCallback):
    """
    Clips the gradients of each member by the member's norm, before the optimizer step. Trainer would use one norm for
    all members, so its clipping is switched off.

    It is switched off when training begins, because trackers have recorded `max_grad_norm` by then. Training may begin
    several times (`auto_find_batch_size`).
    """

    def __init__(self):
        self.max_norm = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.max_grad_norm = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if self.max_norm > 0:
            clip_by_member([p for p in model.parameters() if p.requires_grad], self.max_norm)


def for_members(batch: dict[str, Any], names: tuple[str, ...], members: int) -> dict[str, torch.Tensor]:
    """The named tensors of a shared batch, repeated for each member, (M * B, ...)."""
    return {name: batch[name].repeat(members, *[1] * (batch[name].dim() - 1)) for name in names if name in batch}


def check_adapter(peft_config: PeftConfig | None) -> None:
    """Raise `ValueError` if there is no adapter."""
    if peft_config is None:
        raise ValueError("The members of an ensemble are LoRA adapters. Pass `peft_config=LoraConfig(...)`.")


def _check_arguments(args: EnsembleFields, train_dataset: Dataset | IterableDataset | None) -> None:
    if args.deepspeed_plugin is not None or uses_fsdp(args):
        raise ValueError(
            "An ensemble trains with one process or DDP: FSDP and DeepSpeed shard the stacked weights and clip all "
            "members together. Start it with plain `accelerate launch`."
        )
    loss = args.loss_type
    if isinstance(loss, (LogConfRanking, LogConfToken)) and not loss.confidence.symmetric:
        raise ValueError(
            f"{type(loss).__name__} would take one threshold from the predictions of all members, so that they would "
            "influence each other. Use another loss, or train the models one by one."
        )
    if args.data_strategy in ("bootstrap", "kfold") and isinstance(train_dataset, IterableDataset):
        _check_stream(args, train_dataset)
    if args.data_strategy != "shuffle":
        return
    shared = f"use data_strategy='shared', 'bootstrap', 'kfold' or '{COLUMN_PREFIX}<name>'"
    if isinstance(train_dataset, IterableDataset):
        raise ValueError(f"data_strategy='shuffle' needs random access to the rows, and this is a stream: {shared}.")
    if args.train_sampling_strategy != "random" or args.max_tokens_per_batch is not None:
        raise ValueError(
            "data_strategy='shuffle' decides the order of rows for each member, so train_sampling_strategy and "
            f"max_tokens_per_batch do not work with it: {shared}."
        )


def _check_stream(args: EnsembleFields, stream: IterableDataset) -> None:
    """Raise `ValueError` where several readers would each number the rows of a stream from 0."""
    readers = {"processes": args.world_size, "dataloader_num_workers": args.dataloader_num_workers}
    several = {name: number for name, number in readers.items() if number > 1}
    if stream.num_shards > 1 and several:
        raise ValueError(
            f"data_strategy='{args.data_strategy}' decides by the number of a row which members train on it. This "
            f"stream has {stream.num_shards} shards, and with {several} each reader numbers its rows from 0, so that "
            "the members' data would depend on the number of readers. Use one process and dataloader_num_workers of "
            "at most 1, load the data without `streaming`, or use data_strategy='shared'."
        )


@contextmanager
def _without_best_model_warning() -> Iterator[None]:
    """Hide Trainer's warning that the best checkpoint has no weights: they are in the members' folders."""
    upstream = logging.getLogger("transformers.trainer")

    def keep(record: logging.LogRecord) -> bool:
        return "Could not locate the best model" not in str(record.msg)

    upstream.addFilter(keep)
    try:
        yield
    finally:
        upstream.removeFilter(keep)
