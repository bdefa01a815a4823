"""Decides which rows each member of an ensemble trains on: separate batches, or weights for the rows of shared ones.

It knows row numbers, seeds and columns. It knows nothing of models, scores or losses.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer

from trl_ext.data.validation import DataError
from trl_ext.trainers.common.batching import make_loader


STRATEGIES = ("shuffle", "shared", "bootstrap", "kfold")
COLUMN_PREFIX = "column:"

# Poisson(1): the probability of at most 0, 1, 2, ... draws. More than 12 draws have the probability 6e-11.
_POISSON = np.cumsum([np.exp(-1.0) / np.prod(np.arange(1.0, k + 1)) for k in range(13)])


class RowWeights:
    """
    How often each member counts a row of a shared batch. It depends only on the seeds and the row number.

    Args:
        strategy (`str`): `"bootstrap"`, `"kfold"` or `"column:<name>"`.
        seeds (`Sequence[int]`): a seed for each member.
        seed (`int`): decides the folds.
    """

    def __init__(self, strategy: str, seeds: Sequence[int], seed: int):
        self.column = strategy.removeprefix(COLUMN_PREFIX) if strategy.startswith(COLUMN_PREFIX) else None
        self._strategy = strategy
        self._seeds = seeds
        self._seed = seed
        self._by_row: np.ndarray | None = None  # (rows, M), of a column

    def read_column(self, dataset: Dataset | IterableDataset, name: str) -> None:
        """Read which members train on which row. Raises [`DataError`] if the column cannot be used for this."""
        need = f"a column with {len(self._seeds)} distinct values, one per member"
        if isinstance(dataset, IterableDataset):
            raise DataError(
                "a stream, whose values are not known before training", "a data set that is not streamed",
                f"Load it without `streaming`, or use another data_strategy than '{self._strategy}'.",
                column=self.column, dataset=name,
            )  # fmt: skip
        if self.column not in dataset.column_names:
            raise DataError(
                "no such column", need, "Add it, or use another data_strategy.", column=self.column, dataset=name
            )
        values = [v if isinstance(v, list) or v is None else [v] for v in dataset[self.column]]
        known = sorted({value for row in values for value in row or []})
        if len(known) != len(self._seeds):
            raise DataError(
                f"{len(known)} distinct values ({', '.join(map(repr, known[:6]))})", need,
                f"Set num_members={len(known)}.", column=self.column, dataset=name,
            )  # fmt: skip
        rows = dataset["row_index"] if "row_index" in dataset.column_names else range(len(dataset))
        self._by_row = np.zeros((max(rows, default=0) + 1, len(known)))
        for row, members in zip(rows, values, strict=True):
            self._by_row[row] = [members is None or value in members for value in known]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The weights (M, B), fp32, of the rows (B,), on the same device."""
        numbers = rows.cpu().numpy()
        if self._by_row is not None:
            weights = self._by_row[numbers].T
        elif self._strategy == "kfold":
            fold = _uniform(self._seed, numbers) * len(self._seeds)
            weights = np.stack([fold.astype(int) != member for member in range(len(self._seeds))])
        else:
            weights = np.stack([np.searchsorted(_POISSON, _uniform(seed, numbers)) for seed in self._seeds])
        return torch.from_numpy(weights.astype(np.float32)).to(rows.device)


def _uniform(seed: int, numbers: np.ndarray) -> np.ndarray:
    """A pseudo-random number in [0, 1) for each row, by SplitMix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95) + numbers.astype(np.uint64)
        state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


class MemberSampler(Sampler):
    """
    Yields tuples of row positions, one for each member. Member m has the order of a trainer with the member's seed.

    Args:
        number (`int`): number of rows of the data set.
        seeds (`Sequence[int]`): a seed for each member.
    """

    def __init__(self, number: int, seeds: Sequence[int]):
        self._number = number
        self._seeds = seeds
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        orders = []
        for seed in self._seeds:  # as Accelerate's SeedableRandomSampler does
            generator = torch.Generator().manual_seed(seed + self.epoch)
            orders.append(torch.randperm(self._number, generator=generator).tolist())
        yield from zip(*orders, strict=True)


class MemberRows(TorchDataset):
    """A data set whose items are tuples of rows, one for each member."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, places: list[tuple[int, ...]]) -> list[list[dict[str, Any]]]:
        members = len(places[0])
        rows = self.dataset.__getitems__([place for both in places for place in both])
        return [rows[start : start + members] for start in range(0, len(rows), members)]


class MemberCollator:
    """
    Turns tuples of rows into one batch. All rows of member 0 come first.

    Each row gets the number of its `member`. The batch has the collator's tensors and `member_shares`: the number of
    sequences of a padded batch, or of tokens of a flat row, that belong to each member.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: list[list[dict[str, Any]]]) -> dict[str, Any]:
        members = list(zip(*items, strict=True))
        batch = self.collator([{**row, "member": m} for m, rows in enumerate(members) for row in rows])
        # a group has several sequences, a labelled row is one
        shares = [sum(len(row["candidate_ids"]) if "candidate_ids" in row else 1 for row in rows) for rows in members]
        if "prefix_layout" in batch:
            completions = batch["prefix_layout"].completions
            ends = [completions[sequences - 1].end for sequences in accumulate(shares)]
            shares = [end - start for start, end in pairwise([0, *ends])]
        return {**batch, "member_shares": shares}


def member_dataloader(trainer: Trainer, columns: Sequence[str], seeds: Sequence[int]) -> DataLoader:
    """The training loader for `data_strategy="shuffle"`, where each member has a different order of rows."""
    args, sampler = trainer.args, MemberSampler(len(trainer.train_dataset), seeds)
    # may be smaller than in the arguments, because `auto_find_batch_size` reduces it
    batch_size = trainer.get_total_train_batch_size(args) // (args.gradient_accumulation_steps * args.world_size)
    loader = make_loader(
        trainer,
        columns,
        wrap_rows=MemberRows,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=MemberCollator(trainer.data_collator),
        drop_last=args.dataloader_drop_last,
    )
    # with several processes, a resumed run's loader finds the sampler only like this, to tell it the epoch
    loader.set_sampler(sampler)
    return loader
