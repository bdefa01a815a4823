"""The splits of a weak-to-strong experiment: every prompt in one of them, labels that can be learnt from.

Knows rows and hashes of them. Knows no models.
"""

import hashlib
import logging
import numbers
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from datasets import Dataset, IterableDataset

from trl_ext.pipelines.generation.records import canonical
from trl_ext.pipelines.weak_to_strong.config import WeakToStrongArguments
from trl_ext.pipelines.weak_to_strong.tasks import TASKS, Row


logger = logging.getLogger(__name__)


def group_of(row: Row) -> str:
    """
    What keeps rows together: the prompt; of pairs without one the messages that both sides begin with, or, where they
    are texts, the pair itself; of other rows all that they hold.
    """
    key = row.get("prompt")
    if key in (None, "", []):
        key = row
        if "chosen" in row and "rejected" in row:
            key = _shared_messages(row) or {side: row[side] for side in ("chosen", "rejected")}
    return hashlib.sha256(canonical(key)).hexdigest()


def _shared_messages(row: Row) -> list[dict]:
    """The messages that both sides of a pair begin with; none where they are texts."""
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        return []
    pairs = zip(row["chosen"], row["rejected"], strict=False)
    return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def content_hash(rows: Sequence[Row]) -> str:
    """The identity of rows, in their order."""
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
    Split A (`"weak"`), split B (`"labelled"`) and `"test"`: every prompt is in one of them, by a hash of its content.
    Where the weights of weak models are learnt, a part of A is `"fusion"`.

    Raises:
        ValueError: a column is missing, a split is empty, a test row's prompt is also trained on, or a split of right
            and wrong rows has one class.
    """
    task = TASKS[config.task]()
    for name, data in (("train", train_dataset), ("test", test_dataset)):
        names = [] if data is None else data.column_names or list(next(iter(data), {}))  # a stream may not know them
        missing = [column for column in task.columns if data is not None and column not in names]
        if missing:
            raise ValueError(f"The {name} data set has no column {missing}. {config.task} rows need {task.columns}.")
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
    if config.task == "steps":
        for name, rows in splits.items():
            labelled = [row for row in rows if any(label is not None for label in row["labels"])]
            if len(labelled) < len(rows):
                logger.warning(f"{len(rows) - len(labelled)} rows of the split '{name}' have no label: left out.")
            splits[name] = labelled
    check_splits(splits)
    if config.task in ("outcome", "steps"):
        for name, rows in splits.items():
            labels = [label for row in rows for label in _probabilities(task, row, name)]
            if len({label > 0.5 for label in labels}) == 1:
                raise ValueError(
                    f"All {len(labels)} labels of the split '{name}' are {'right' if labels[0] > 0.5 else 'wrong'}: "
                    "nothing to learn or to test. Give both."
                )
    return splits


def _probabilities(task: Any, row: Row, split: str) -> list[float]:
    """The labels of a row that are known. Raises `ValueError` for one that is no number from 0 to 1."""
    known = [label for label in task.gold_labels(row) if label is not None]
    wrong = [label for label in known if not isinstance(label, numbers.Real) or not 0.0 <= label <= 1.0]
    if wrong or not known:
        found = f"the label {wrong[0]!r}" if wrong else "no label"
        raise ValueError(
            f"A row of the split '{split}' has {found} (prompt: {str(row['prompt'])[:60]!r}). Needed: true, false "
            "or a probability. Map the labels, or drop the row."
        )
    return known


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
                    f"The splits '{first}' and '{second}' share {len(shared)} prompts, so what is tested was trained "
                    "on. Remove them from one data set."
                )
