"""Divides the rows of a weak-to-strong experiment into splits, so that each prompt is in one split only.

It knows rows and their hashes. It knows no models.
"""

import hashlib
import logging
from collections.abc import Sequence
from itertools import takewhile

from datasets import Dataset, IterableDataset

from trl_ext.data.mapping import plain_rows
from trl_ext.pipelines.generation.records import canonical
from trl_ext.pipelines.weak_to_strong.config import TASKS, WeakToStrongArguments
from trl_ext.pipelines.weak_to_strong.tasks import Row


logger = logging.getLogger(__name__)


def group_of(row: Row) -> str:
    """
    The group of a row; rows of one group stay in one split. The group is the prompt. For pairs without a prompt it is
    the messages that both sides begin with, or the whole pair if the sides are texts. For other rows it is all values.
    """
    key = row.get("prompt")
    if key in (None, "", []):
        key = row
        if "chosen" in row and "rejected" in row:
            key = _shared_messages(row) or {side: row[side] for side in ("chosen", "rejected")}
    return hashlib.sha256(canonical(key)).hexdigest()


def _shared_messages(row: Row) -> list[dict]:
    """The messages that both sides of a pair begin with; none if the sides are texts."""
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        return []
    pairs = zip(row["chosen"], row["rejected"], strict=False)
    return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def content_hash(rows: Sequence[Row]) -> str:
    """A hash of the rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical(row))
    return digest.hexdigest()


def make_splits(
    config: WeakToStrongArguments,
    train_dataset: Dataset | IterableDataset,
    test_dataset: Dataset | IterableDataset | None,
) -> dict[str, list[Row]]:
    """
    Make split A (`"weak"`), split B (`"labelled"`) and `"test"`. A hash of the prompt decides its split. If the
    weights of weak models are learned, a part of A becomes `"fusion"`.

    Raises:
        ValueError: a column is missing, a split is empty, a prompt of the test split is also trained on, a label is
            not a probability, or a split of right and wrong rows has only one class.
    """
    task = TASKS[config.task].make()
    train_dataset = plain_rows(train_dataset)
    test_dataset = None if test_dataset is None else plain_rows(test_dataset)
    for name, data in (("train", train_dataset), ("test", test_dataset)):
        names = [] if data is None else data.column_names or list(next(iter(data), {}))  # a stream may not know them
        missing = [column for column in task.columns if data is not None and column not in names]
        if missing:
            raise ValueError(f"The {name} data set has no column {missing}. {config.task} rows need {task.columns}.")
        unused = task.unused_columns(names)
        if unused:
            logger.warning(f"These columns of the {name} data set are not used: {', '.join(unused)}.")
    splits: dict[str, list[Row]] = {"weak": [], "labelled": [], "test": []}
    for row in train_dataset:
        digest = hashlib.sha256(f"{config.split_seed} {group_of(row)}".encode()).digest()
        place, other = (int.from_bytes(digest[k : k + 6], "big") / 2**48 for k in (0, 6))
        if test_dataset is None and place < config.test_share:
            splits["test"].append(row)
        else:
            splits["weak" if other < config.weak_share else "labelled"].append(row)
    if test_dataset is not None:
        splits["test"] = list(test_dataset)
    if config.weak_ensemble == "learned":
        whole, splits["weak"], splits["fusion"] = splits["weak"], [], []
        for row in whole:
            digest = hashlib.sha256(f"{config.split_seed} fusion {group_of(row)}".encode()).digest()
            held_back = int.from_bytes(digest[:6], "big") / 2**48 < config.fusion_share
            splits["fusion" if held_back else "weak"].append(row)
    splits = {name: task.usable(rows, name) for name, rows in splits.items()}
    check_splits(splits)
    for name, rows in splits.items():
        task.check_split(rows, name)
    return splits


def check_splits(splits: dict[str, list[Row]]) -> None:
    """Raise `ValueError` for an empty split, or a prompt that is in two of them."""
    groups = {}
    for name, rows in splits.items():
        if not rows:
            raise ValueError(f"The split '{name}' has no rows. Give more prompts, or change weak_share or test_share.")
        groups[name] = {group_of(row) for row in rows}
    names = list(groups)
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            shared = groups[first] & groups[second]
            if shared:
                raise ValueError(
                    f"The splits '{first}' and '{second}' share {len(shared)} prompts, so the test would use training "
                    "prompts. Remove them from one data set."
                )
