"""The prompts of a run: read from a data set once, checked, and kept in a file that every stage reads in shards.

Knows rows of data. Knows nothing of models or scores.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.records import prompt_id, prompt_of
from trl_ext.pipelines.stages.cache_key import canonical
from trl_ext.pipelines.stages.store import StoreError, count_lines, read_lines, write_lines


logger = logging.getLogger(__name__)

# Columns that stand for what a run makes, or that trainers would take for their data: left out of its rows.
RESERVED = {"prompt", "prompt_id", "sample_index", "score", "scores", "finish_reason"}
RESERVED |= {"completion", "completions", "completion_ids", "chosen", "rejected", "ratings", "messages", "text"}
RESERVED |= {"chosen_rating", "rejected_rating", "score_margin", "margin", "label", "labels"}


@dataclass(frozen=True)
class PromptFile:
    """
    The prompts of a run.

    Args:
        path (`Path`): JSON lines of `prompt_id`, `row` in the data set, `prompt`, `columns`.
        count (`int`): prompts.
        shard_size (`int`): prompts of a shard; the last one may have fewer.
        ids_key (`str`): hash of the prompts' identities in their order.
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
        """(shard, its prompts) for each wanted shard, ascending."""
        lines, at = read_lines(self.path), 0
        for shard in sorted(wanted):
            rows = list(islice(lines, (shard - at) * self.shard_size, (shard - at + 1) * self.shard_size))
            at = shard + 1
            yield shard, rows


def write_prompts(dataset: Iterable[dict[str, Any]], folder: Path, shard_size: int) -> PromptFile:
    """
    Check the rows of a data set and keep their prompts, unless the same are there already.

    A row has a `prompt`, a text or messages, and any columns that reward functions want. Rows that are there twice
    are used once, and counted.

    Raises:
        [`DataError`]: there is no row; a row has no usable prompt; two rows have one prompt and different columns.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}; needed: a number of prompts >= 1.")
    ids, content = hashlib.sha256(), hashlib.sha256()
    seen: dict[str, tuple[int, bytes]] = {}
    repeated, left_out = 0, set()
    records = []
    for row, item in enumerate(dataset):
        prompt = prompt_of(item, row)
        columns = {name: value for name, value in item.items() if name not in RESERVED}
        left_out |= {name for name in item if name in RESERVED} - {"prompt"}
        try:
            digest = hashlib.sha256(canonical(columns)).digest()
        except (TypeError, ValueError) as error:
            name = next(name for name, value in columns.items() if not _is_json(value))
            raise DataError(
                f"a value that is no JSON ({error})",
                "texts, numbers, lists and objects, which a store can keep",
                f"Remove the column: dataset.remove_columns({name!r}).",
                row=row,
                column=name,
            ) from error
        name = prompt_id(prompt, columns)
        if name in seen:
            first, other = seen[name]
            if digest != other:
                raise DataError(
                    f"the prompt of row {first} with other columns",
                    "each prompt once",
                    "Keep one of the rows, or make the prompts different.",
                    row=row,
                    column="prompt",
                )
            repeated += 1
            continue
        seen[name] = (row, digest)
        ids.update(name.encode())
        content.update(name.encode() + digest)
        records.append({"prompt_id": name, "row": row, "prompt": prompt, "columns": columns})
    if not records:
        raise DataError("no row", "at least one prompt", "Give another data set or split.")
    if repeated:
        logger.warning(f"{repeated} of {repeated + len(records)} rows repeat an earlier one and are left out.")
    if left_out:
        logger.warning(f"The columns {sorted(left_out)} stand for what sampling makes and are left out.")
    path = folder / f"{content.hexdigest()[:16]}.jsonl"
    if not path.is_file() or not _is_whole(path, len(records)):
        write_lines(path, records)
    return PromptFile(path, len(records), shard_size, ids.hexdigest()[:16], content.hexdigest()[:16])


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_whole(path: Path, count: int) -> bool:
    try:
        return count_lines(path) == count
    except StoreError:
        return False
