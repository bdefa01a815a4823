"""Merges the outputs of a command that several machines made in parts (`--shard i/n`) into one file of rows.

It checks that no part is missing or there twice, that all were made with the same settings, and that their rows are
those of the input. This module knows rows of JSON. It does not know what the added columns mean.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from trl_ext.pipelines.stages.cache_key import StaleError, changes_between
from trl_ext.pipelines.stages.parts import Part
from trl_ext.pipelines.stages.row_file import FIX, Row, RowFile
from trl_ext.pipelines.stages.store import StoreError, read_json, whole_file, write_json


def merge_rows(output: RowFile, parts: Sequence[Path], rows: Iterator[tuple[int, Row]], name: str, total: int) -> None:
    """
    Write the rows of all parts to the output, in the order of the input. The file appears only when it is complete.

    Args:
        output ([`~trl_ext.pipelines.stages.row_file.RowFile`]): the merged output, with the manifest of the command.
        parts (sequence of `Path`): the outputs of the parts, in any order.
        rows (iterator of `tuple[int, dict]`): line number and row of the input.
        name (`str`): name of the input in errors.
        total (`int`): number of input rows.

    Raises:
        [`~trl_ext.pipelines.stages.cache_key.StaleError`]: a part was made with other settings or from other rows.
        [`~trl_ext.pipelines.stages.store.StoreError`]: a part is missing, unfinished, there twice, or no part.
    """
    if output.path.exists():
        kept = output.resume(rows, name, total)
        if kept == total:
            return  # merged before
        raise StoreError(f"{output.path} holds {kept} of {total} rows already. {FIX}")
    found: dict[int, Path] = {}
    count = 0
    for path in parts:
        part = _part_of(output, path)
        if part.number in found:
            raise StoreError(f"{found[part.number]} and {path} are both part {part}. Give every part once.")
        found[part.number], count = path, count or part.count
        if part.count != count:
            raise StoreError(f"{path} is part {part}, and {parts[0]} one of {count} parts. Give the parts of one run.")
    absent = [f"{number}/{count}" for number in range(1, count + 1) if number not in found]
    if absent:
        raise StoreError(f"Part {', '.join(absent)} is missing. Give the output of every part of `--shard`.")
    advice = "Free some disk space, then run the same command again."
    with whole_file(output.path, advice) as file:
        for number, path in sorted(found.items()):
            part, written = replace(output, path=path), 0
            with open(path if path.exists() else os.devnull, "rb") as lines:  # a part of no rows has no file
                whole = takewhile(lambda line: line.endswith(b"\n"), lines)  # a kill may cut the last line
                for written, line in enumerate(whole, start=1):
                    part.compare(written, line, *next(rows, (None, None)), name)
                    file.write(line)
            own = Part(number, count)
            needed = len(own.rows(total))
            if written != needed:
                raise StoreError(
                    f"{path} (part {own}) holds {written} of {needed} whole rows. Run its command again, which "
                    "continues."
                )
    write_json(output.manifest_path, output.manifest)


def _part_of(output: RowFile, path: Path) -> Part:
    """Which part a file is. Raises an error unless the command made it with the settings of the output."""
    part = replace(output, path=path)
    if not part.manifest_path.is_file():
        what = f"has no {part.manifest_path.name} beside it" if path.is_file() else "is not there"
        raise StoreError(f"{path} {what}. Needed: an output of `--shard i/n` with its manifest.")
    before: dict[str, Any] = read_json(part.manifest_path)
    shard = before.pop("shard", None)
    if shard is None:
        raise StoreError(f"{path} was made without --shard. Needed: the outputs of `--shard i/n`.")
    changes = changes_between(before, output.manifest, ignore=output.places or {})
    if changes:
        raise StaleError(f"{path} was", changes, "Make every part with the arguments of the merge.")
    return Part.parse(shard)
