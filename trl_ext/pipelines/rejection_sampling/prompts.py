"""The prompts of a run: read from a data set once, checked, and kept in a file that every stage reads in shards.

This module knows rows of data. It does not know models or scores.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trl_ext.data.mapping import plain_rows
from trl_ext.data.schema import template_arguments
from trl_ext.data.validation import DataError, RowChecks
from trl_ext.pipelines.generation.records import prompt_id, prompt_of
from trl_ext.pipelines.stages.cache_key import canonical
from trl_ext.pipelines.stages.store import StoreError, count_lines, read_lines, write_lines


logger = logging.getLogger(__name__)

# Columns that no reward function gets, because TRL's GRPOTrainer passes prompts and completions under these names.
NOT_PASSED = {"prompt", "prompts", "completion", "completions", "completion_ids"}
# Columns that reward functions get and that selected rows do not have: either the run adds columns of these names, or
# a trainer would take them for its data.
NOT_KEPT = {"prompt_id", "sample_index", "score", "scores", "finish_reason", "chosen", "rejected", "ratings"}
NOT_KEPT |= {"chosen_rating", "rejected_rating", "score_margin", "margin", "label", "labels", "messages", "text"}


@dataclass(frozen=True)
class PromptFile:
    """
    The prompts of a run.

    Args:
        path (`Path`): JSON lines of `prompt_id`, `row` in the data set, `prompt`, `columns`.
        count (`int`): number of prompts.
        shard_size (`int`): number of prompts in a shard; the last shard may have fewer.
        ids_key (`str`): hash of the prompts' ids in their order.
        content_key (`str`): hash of prompts and columns.
    """

    path: Path
    count: int
    shard_size: int
    ids_key: str
    content_key: str

    @property
    def sizes(self) -> list[int]:
        """Prompts of each shard."""
        whole, rest = divmod(self.count, self.shard_size)
        return [self.shard_size] * whole + ([rest] if rest else [])

    def shards(self, wanted: Iterable[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Pairs of a shard's number and its prompts for each wanted shard, ascending."""
        lines, at = read_lines(self.path), 0
        for shard in sorted(wanted):
            rows = list(islice(lines, (shard - at) * self.shard_size, (shard - at + 1) * self.shard_size))
            at = shard + 1
            yield shard, rows


def write_prompts(dataset: Iterable[dict[str, Any]], folder: Path, shard_size: int) -> PromptFile:
    """
    Check the rows of a data set and store their prompts, unless the same prompts are stored already.

    A row has a `prompt`, a text or messages, and any columns that reward functions need. Equal rows are used once.
    Rows with the same prompt and different other columns (an answer, a source) get separate completions. A warning
    counts both.

    Raises:
        ValueError: `dataset` is a dictionary of columns or splits.
        [`DataError`]: there is no row, or a row has no usable prompt or a value that JSON cannot represent.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}; needed: a number of prompts >= 1.")
    if isinstance(dataset, (Mapping, str)):
        raise ValueError(
            f"The prompts are a {type(dataset).__name__}; needed: rows, e.g. `Dataset.from_dict(columns)`, a list of "
            "dictionaries with a `prompt`, or one split of a DatasetDict."
        )
    ids, content = hashlib.sha256(), hashlib.sha256()
    seen: set[str] = set()
    first: dict[str, int] = {}  # place in the records of the first row with a prompt
    repeated, again, differing, not_kept = 0, 0, set(), set()
    records: list[dict[str, Any]] = []
    for row, item in enumerate(plain_rows(dataset)):
        prompt = prompt_of(item, row)
        columns = {name: value for name, value in item.items() if name not in NOT_PASSED}
        if isinstance(columns.get("tools"), str):  # JSON, as in TRL's trainers; the id does not depend on it
            template_arguments(item, RowChecks(row, "prompt"))
            columns["tools"] = json.loads(columns["tools"])
        not_kept |= NOT_KEPT & columns.keys()
        try:
            digest = hashlib.sha256(canonical(columns)).digest()
            json.dumps([prompt, columns], allow_nan=False)  # a hash can be made of NaN, and a file cannot hold it
        except (TypeError, ValueError) as error:
            name = next(name for name, value in {"prompt": prompt, **columns}.items() if not _is_json(value))
            raise DataError(
                f"a value that is not JSON ({error})",
                "texts, finite numbers, lists and objects, which can be stored",
                f"Correct the value (None can stand for NaN), or remove the column: dataset.remove_columns({name!r}).",
                row=row,
                column=name,
            ) from error
        name = prompt_id(prompt, columns)
        content_id = f"{name} {digest.hex()}"
        if content_id in seen:
            repeated += 1
            continue
        seen.add(content_id)
        if name in first:
            again += 1
            other = records[first[name]]["columns"]
            differing |= {key for key in {*columns, *other} if columns.get(key) != other.get(key)}
            name = hashlib.sha256(content_id.encode()).hexdigest()[:16]
        else:
            first[name] = len(records)
        ids.update(name.encode())
        content.update(name.encode() + digest)
        records.append({"prompt_id": name, "row": row, "prompt": prompt, "columns": columns})
    if not records:
        raise DataError("no row", "at least one prompt", "Give another data set or split.")
    if repeated:
        logger.warning(f"{repeated} of {repeated + len(records)} rows repeat an earlier row and are ignored.")
    if again:
        logger.warning(
            f"{again} rows repeat the prompt of an earlier row with other values in {sorted(differing)}. Each gets "
            "separate completions and scores. To generate once for each prompt, remove these columns, because equal "
            "rows are used once."
        )
    if not_kept:
        logger.info(
            f"Reward functions get the columns {sorted(not_kept)}; the selected rows do not have them, because "
            "trainers would take them for their data."
        )
    path = folder / f"{content.hexdigest()[:16]}.jsonl"
    if not path.is_file() or not _is_whole(path, len(records)):
        write_lines(path, records)
    return PromptFile(path, len(records), shard_size, ids.hexdigest()[:16], content.hexdigest()[:16])


def prompts_digest(dataset: Iterable[dict[str, Any]]) -> str:
    """A hash of the prompts and of the columns that reward functions get."""
    digest = hashlib.sha256()
    for row in plain_rows(dataset):
        seen = {name: value for name, value in row.items() if name == "prompt" or name not in NOT_PASSED}
        digest.update(json.dumps(seen, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def columns_of(dataset: Iterable[dict[str, Any]]) -> set[str]:
    """The columns that reward functions get, read from the first row."""
    return set(next(iter(plain_rows(dataset)), {})) - NOT_PASSED


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _is_whole(path: Path, count: int) -> bool:
    try:
        return count_lines(path) == count
    except StoreError:
        return False
