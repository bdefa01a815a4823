"""Data loaders whose rows stay identifiable: evaluation reads rows in order, and every process reads a whole stream.

It knows data sets, streams and a trainer's arguments. It does not know what a row contains.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_ext.data.report import DataReport
from trl_ext.data.token_batches import RowSize


logger = logging.getLogger(__name__)

BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Values of `train_sampling_strategy` for which Trainer needs a column with the length of each row."""


def with_lengths(dataset: Dataset, column: str, sizes: Sequence[RowSize]) -> Dataset:
    """Add a column with the number of tokens of each row's longest sequence. An existing column stays as it is."""
    if column in dataset.column_names:
        return dataset
    return dataset.add_column(column, [size.longest for size in sizes])


@contextmanager
def rows_of_evaluation(args: TrainingArguments, stream: bool) -> Iterator[None]:
    """
    While this is active, Trainer makes evaluation loaders that give every row once and in order.

    Otherwise `train_sampling_strategy` would change the order of the rows, while predictions must have the order of
    the data set. Several workers would split the shards of a stream, and each would number its rows from 0.
    """
    strategy, workers = args.train_sampling_strategy, args.dataloader_num_workers
    args.train_sampling_strategy = "random"  # evaluation loaders ignore this value
    if stream:
        args.dataloader_num_workers = min(1, workers)
    try:
        yield
    finally:
        args.train_sampling_strategy, args.dataloader_num_workers = strategy, workers


def note_on_rows(dataset: Any, args: TrainingArguments) -> str:
    """
    What a message about rows of training data must add; empty where each row number belongs to one row.

    If DataLoader workers or processes share the shards of a stream, each of them counts the rows that it reads from 0.
    """
    shards = dataset.num_shards if isinstance(dataset, IterableDataset) else 1
    readers = min(shards, max(1, args.dataloader_num_workers) * args.world_size)
    if readers == 1:
        return ""
    return (
        f" The data are a stream of {shards} shards, and {readers} readers (DataLoader workers, processes) may share "
        "them. Each reader counts its rows from 0, so that a number can belong to several rows. One reader "
        "(dataloader_num_workers=0, one process) gives each row a number of its own."
    )


class WholeStream(TorchStream):
    """
    A stream whose shards stay together, so that each `row_index` belongs to one row.

    If a stream has enough shards, Accelerate gives each process different ones. Every process then numbers its rows
    from 0, and one process may have more batches than the others, which then wait forever. Accelerate sees no shards
    in this class, so every process reads all rows and keeps its part of each batch.
    """

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.stream)


class StreamResumeCallback(TrainerCallback):
    """
    Warns if a run that resumes on a stream gets other batches than an uninterrupted run would get.

    To resume, Trainer skips as many batches as the finished steps had, within one pass. If the checkpoint comes from a
    later pass over the stream, this leads past the end of the stream, and the run starts a new pass.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # for a stream, `epoch` is the number of finished passes plus the share of `max_steps` in the current pass
        if state.global_step > 0 and (state.epoch or 0) > 1 and not args.ignore_data_skip:
            logger.warning(
                f"The checkpoint of step {state.global_step} was saved in pass {int(state.epoch) + 1} over a stream, "
                f"whose length is not known. From step {state.global_step + 1} on, the batches differ from those of "
                "an uninterrupted run, because the stream starts again. To resume exactly, load the data without "
                "`streaming`."
            )


class StreamSurvivalCallback(TrainerCallback):
    """
    Checks how many rows of a stream are used at the end of a pass over it, when its length is known.

    While rows are read, [`~trl_ext.data.report.DataReport`] checks it from the 256th row on. DataLoader workers count
    the rows that they read themselves, so nothing is known here of a stream that they read.

    Args:
        reports (`list` of [`~trl_ext.data.report.DataReport`]): of the data for training, "train", and for evaluation.
        min_survival (`float`): smallest share of the rows that must be used.

    Raises:
        DataError: less than this share of the rows is used, or none.
    """

    def __init__(self, reports: Sequence[DataReport], min_survival: float):
        self._reports = reports
        self._min_survival = min_survival

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stopped = control.should_epoch_stop or control.should_training_stop
        if not stopped or state.global_step == 0:  # Trainer stops by itself if a pass has no batch
            self._check("train")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        read = {name.removesuffix("_runtime") for name in kwargs["metrics"]}
        self._check(*read, *(name.removeprefix("eval_") for name in read))

    def _check(self, *names: str) -> None:
        latest = {report.name: report for report in self._reports}  # `evaluate` may have got other rows
        for report in latest.values():
            if report.streaming and report.name in names:
                report.check_seen()
                report.check_survival(self._min_survival)
