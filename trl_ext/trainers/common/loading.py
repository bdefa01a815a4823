"""The loaders that Trainer makes, with rows that can be told apart: of a data set in order, of a stream all of them.

It knows data sets, streams and a trainer's arguments, and nothing of what a row holds.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_ext.data.token_batches import RowSize


logger = logging.getLogger(__name__)

BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Values of `train_sampling_strategy` for which Trainer wants a column with the length of each row."""


def with_lengths(dataset: Dataset, column: str, sizes: Sequence[RowSize]) -> Dataset:
    """The data set with the tokens of each row's longest sequence as a column; one that the user gave stays."""
    if column in dataset.column_names:
        return dataset
    return dataset.add_column(column, [size.longest for size in sizes])


@contextmanager
def rows_of_evaluation(args: TrainingArguments, stream: bool) -> Iterator[None]:
    """
    Have Trainer make a loader of an evaluation, whose rows come in their order and once.

    `train_sampling_strategy` would put rows in another order than the predictions are expected in. Several workers
    would split the shards of a stream, and each would number its rows from 0.
    """
    strategy, workers = args.train_sampling_strategy, args.dataloader_num_workers
    args.train_sampling_strategy = "random"  # which evaluations do not look at
    if stream:
        args.dataloader_num_workers = min(1, workers)
    try:
        yield
    finally:
        args.train_sampling_strategy, args.dataloader_num_workers = strategy, workers


class WholeStream(TorchStream):
    """
    A stream whose shards stay together, so that `row_index` names one row.

    Accelerate gives each process shards of its own if the data set has enough of them; the processes then number their
    rows from 0 each, and one may have more batches than another, for which the others wait forever. Of this class it
    knows no shards: every process reads all rows and keeps its share of each batch.
    """

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.stream)


class StreamResumeCallback(TrainerCallback):
    """
    Warns where a run that resumes on a stream cannot meet the batches of the uninterrupted run.

    Trainer counts steps, and skips as many batches as they had, in one pass. Where the first pass over the stream had
    ended before the checkpoint, that leads past the end of the stream: the run begins a pass anew.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # `epoch` of a stream is the number of passes that ended, plus the share of `max_steps` in the current one
        if state.global_step > 0 and (state.epoch or 0) > 1 and not args.ignore_data_skip:
            logger.warning(
                f"The checkpoint of step {state.global_step} was saved in pass {int(state.epoch) + 1} over a stream, "
                f"whose length is not known. The batches from step {state.global_step + 1} on are not those of an "
                "uninterrupted run: the stream begins anew. To resume exactly, load the data without `streaming`."
            )
