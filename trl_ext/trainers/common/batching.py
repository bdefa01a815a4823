"""Training batches of all trainers: flat or padded rows, a limit on tokens, rows of one prompt kept together.

It knows arguments, loaders and processes. `trl_ext.data.token_batches` decides which rows form a batch.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import trl
from datasets import Dataset, IterableDataset
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer

from trl_ext.data.token_batches import (
    RowSize,
    fill_processes,
    order_rows,
    pack_by_rows,
    pack_by_tokens,
    tokens_alone,
)
from trl_ext.models.shared_prefix import SharedPrefixSupport, is_granted, is_wanted, supports_shared_prefix


logger = logging.getLogger(__name__)


def set_up_batching(
    args: trl.RewardConfig, train_dataset: Dataset | IterableDataset | None, group_by_prompt: bool = False
) -> None:
    """
    Let every process load its own batches, so that no batch is split between processes.

    Raises `ValueError` if other arguments are incompatible with `max_tokens_per_batch` or `group_by_prompt`.
    """
    if args.accelerator_config.dispatch_batches:
        logger.warning("`dispatch_batches=True` would split batches between processes, so it is set to False.")
    args.accelerator_config.dispatch_batches = False
    if args.max_tokens_per_batch is None and not group_by_prompt:
        return
    name = "group_by_prompt" if args.max_tokens_per_batch is None else "max_tokens_per_batch"
    if args.max_tokens_per_batch is not None and args.max_tokens_per_batch < 1:
        raise ValueError(f"max_tokens_per_batch={args.max_tokens_per_batch} is too small. Needed: 1 token or more.")
    if isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"{name} needs the lengths of all rows before training, but train_dataset is a stream. Load it without "
            f"`streaming`, or leave {name} out and set per_device_train_batch_size."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            f"auto_find_batch_size searches for a number of rows, but {name} fixes the batches. Set only one of the "
            "two."
        )
    if args.accelerator_config.split_batches:
        raise ValueError(
            f"`split_batches=True` would split batches between processes, which {name} does not allow. Leave it out."
        )
    known = ("random", "sequential") if group_by_prompt else ("random", "sequential", "group_by_length")
    if args.train_sampling_strategy not in known:
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} and "
            f"{'group_by_prompt' if group_by_prompt else name} both decide which rows form a batch. Needed: one of "
            f"{', '.join(known)}."
        )


def wants_flat_rows(args: trl.RewardConfig, sharded: bool = False) -> bool:
    """
    Whether the arguments ask for flat rows and allow them.

    Raises `ValueError` if `shared_prefix=True` meets an argument that needs padded rows.
    """
    # The numerical check cannot run on sharded weights. Neuron compiles once for each padded shape. NEFTune scales its
    # noise by the length of a row. Metrics that get inputs, and Trainer's count of input tokens, expect padded rows.
    plain = sharded or args.pad_to_multiple_of is not None or args.neftune_noise_alpha is not None
    plain = plain or "inputs" in args.include_for_metrics or args.include_num_input_tokens_seen != "no"
    if plain and args.shared_prefix is True:
        raise ValueError(
            "shared_prefix=True does not work with FSDP, DeepSpeed, pad_to_multiple_of, neftune_noise_alpha, "
            "include_num_input_tokens_seen or 'inputs' in include_for_metrics. Leave it at 'auto'."
        )
    return is_wanted(args.shared_prefix) and not plain


def flat_rows_support(trainer: Trainer) -> SharedPrefixSupport:
    """Whether batches may be flat rows, and why: from the trainer's `shared_prefix`, its arguments and its model."""
    args = trainer.args
    if not wants_flat_rows(args, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        wished = args.shared_prefix is False
        return SharedPrefixSupport(False, "shared_prefix=False" if wished else "another argument needs padded rows")
    support = supports_shared_prefix(trainer.model, args.max_length)
    is_granted(args.shared_prefix, support)  # raises if the model does not support True
    return support


class FixedBatches(BatchSampler):
    """
    Batches that are formed once. Each epoch only changes their order.

    Their number is known from the start, and a resumed run gets the same batches. `sampler` draws the order.
    Accelerate seeds it by the epoch and gives each process every n-th batch, as it does with ordinary batches.

    Args:
        batches (`Sequence[list[int]]`): the row numbers of each batch.
        shuffle (`bool`): whether their order is random.
    """

    batch_size = None  # tells Accelerate that the sizes of batches differ
    drop_last = False

    def __init__(self, batches: Sequence[list[int]], shuffle: bool):
        self.batches = batches
        self.sampler = RandomSampler(batches) if shuffle else SequentialSampler(batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.batches[number] for number in self.sampler)

    def __len__(self) -> int:
        return len(self.batches)


def make_train_dataloader(
    trainer: Trainer, sizes: Sequence[RowSize], columns: Sequence[str], flat_rows: bool, group_by_prompt: bool = False
) -> DataLoader:
    """
    The training loader for `max_tokens_per_batch` and `group_by_prompt`.

    Args:
        trainer (`Trainer`): the loader uses its arguments, data set, collator and accelerator.
        sizes (`Sequence[RowSize]`): the sizes of the rows of its training data.
        columns (`Sequence[str]`): the columns that the collator reads.
        flat_rows (`bool`): whether the collator makes flat rows.
        group_by_prompt (`bool`): whether rows of one prompt stay together.
    """
    args, strategy = trainer.args, trainer.args.train_sampling_strategy
    seed = args.seed if args.data_seed is None else args.data_seed
    order = order_rows(sizes, strategy, seed, group_by_prompt)
    if args.max_tokens_per_batch is None:
        batches = pack_by_rows(order, args.train_batch_size, args.dataloader_drop_last)
    else:
        limit, multiple = args.max_tokens_per_batch, args.pad_to_multiple_of
        batches = pack_by_tokens(sizes, order, limit, flat_rows, multiple)
        _log_sizes([tokens_alone(size, flat_rows, multiple) for size in sizes], batches, limit)
    batches = fill_processes(batches, trainer.accelerator.num_processes, args.dataloader_drop_last)
    sampler = FixedBatches(batches, shuffle=strategy != "sequential")
    return make_loader(trainer, columns, batch_sampler=sampler)


def make_loader(
    trainer: Trainer,
    columns: Sequence[str],
    wrap_rows: Callable[[Dataset], TorchDataset] = lambda dataset: dataset,
    **how: Any,
) -> DataLoader:
    """
    A loader of the training rows, with the loader settings of the trainer's arguments.

    Args:
        trainer (`Trainer`): the loader uses its arguments, data set, collator and accelerator.
        columns (`Sequence[str]`): the columns that the collator reads.
        wrap_rows (`Callable`, *optional*): turns the data set into one that the sampler's items can index.
        how: more arguments of `DataLoader`, such as the sampler or another `collate_fn`.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if args.remove_unused_columns:
        dataset = dataset.select_columns([name for name in columns if name in dataset.column_names])
    loader = DataLoader(
        wrap_rows(dataset),
        **{"collate_fn": trainer.data_collator, **how},
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
    )
    return trainer.accelerator.prepare(loader)


def _log_sizes(alone: Sequence[int], batches: Sequence[list[int]], max_tokens: int) -> None:
    logger.info(f"max_tokens_per_batch={max_tokens}: {len(alone)} rows in {len(batches)} batches.")
    longer = [tokens for tokens in alone if tokens > max_tokens]
    if longer:
        logger.warning(
            f"{len(longer)} of {len(alone)} rows have more than max_tokens_per_batch={max_tokens} tokens (the longest "
            f"{max(longer)}). Each of them forms its own batch. Lower `max_length` if memory is short."
        )
