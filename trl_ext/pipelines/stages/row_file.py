"""A file of rows that a command writes in the order of its input, and that a rerun continues.

The output holds the input rows with added columns. A manifest beside the file holds everything that it depends on. A
rerun compares the manifest and the existing rows with its arguments and input, and cuts off an incomplete last line.
This module knows rows of JSON. It does not know what the added columns mean.
"""

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.pipelines.stages.cache_key import StaleError
from trl_ext.pipelines.stages.store import StoreError, check_manifest


Row = dict[str, Any]

FIX = "Give another --output, or delete this one to start again."


@dataclass
class RowFile:
    """
    An output of rows.

    ```python
    output = RowFile(Path("scored.jsonl"), {"model_sha256": ..., "max_length": 512}, added=("score",))
    done = output.resume(rows, "rows.jsonl")  # skips the rows of the iterator that the output holds
    output.append(row | {"score": 1.0} for _, row in islice(rows, 64))
    ```

    Args:
        path (`Path`): the JSONL file.
        manifest (`dict`): JSON-ready; everything except the rows that the added columns depend on.
        added (`Collection[str]`): columns that the command adds. Input rows must not have them.
        places (`dict[str, str]`, *optional*):
            Entries of the manifest that only name a place, with the entry for its content:
            `{"model": "model_sha256"}`. If the content changes, the error names both places.
        block (`int`, *optional*, defaults to `1`):
            How many rows are computed together, so that an unfinished block is computed again.
    """

    path: Path
    manifest: dict[str, Any]
    added: Collection[str]
    places: dict[str, str] | None = None
    block: int = 1

    @property
    def manifest_path(self) -> Path:
        """The file with the manifest, beside the output."""
        return self.path.with_name(self.path.name + ".manifest.json")

    def resume(self, rows: Iterable[tuple[int, Row]], name: str, total: int | None = None) -> int:
        """
        Check the existing output, and advance `rows` past the rows that it holds.

        Args:
            rows (iterator of `tuple[int, dict]`): line number and row of the input.
            name (`str`): name of the input in errors.
            total (`int`, *optional*): number of input rows; the last block may be shorter than `block`.

        Returns:
            `int`: number of rows that the output holds and keeps.

        Raises:
            [`StaleError`]: the output was made with other settings or from other rows.
            [`StoreError`]: the output was not made by this command, or a line is not JSON.
        """
        if not self.path.exists() or self.path.stat().st_size == 0:
            self.manifest_path.unlink(missing_ok=True)
        elif not self.manifest_path.is_file():
            raise StoreError(
                f"{self.path} holds data that this command did not write ({self.manifest_path.name} is missing). {FIX}"
            )
        fix = f"Its rows cannot be continued. {FIX}"
        check_manifest(self.manifest_path, self.manifest, f"{self.path} was", fix, places=self.places or {})
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            whole = sum(line.endswith(b"\n") for line in file)
        if total is not None and whole > total:
            raise StaleError(f"{self.path} was", [f"it has {whole} rows, and the input {total}"], fix)
        keep = whole if whole == total else whole // self.block * self.block
        remaining, end = iter(rows), 0
        with open(self.path, "r+b") as file:
            for number, line in enumerate(file, start=1):
                if number > keep:
                    break
                self.compare(number, line, *next(remaining, (None, None)), name)
                end += len(line)
            file.truncate(end)
        return keep

    def compare(self, number: int, line: bytes, at: int | None, row: Row | None, name: str) -> None:
        """Raise [`StaleError`] unless line `number` of the output was made from this row, line `at` of the input."""
        try:
            written = json.loads(line)
        except ValueError as error:
            raise StoreError(f"{self.path}, line {number}: not valid JSON ({error}). {FIX}") from error
        if row is not None:
            written = {column: value for column, value in written.items() if column not in self.added or column in row}
        if row is None or _text(row) != _text(written):
            where = f"line {at} of {name}" if row is not None else f"any line of {name}, which is shorter"
            raise StaleError(
                f"{self.path} was", [f"line {number}: this row is not {where}; it was made from another row"], FIX
            )

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and wait until they are on the disk. The first rows create the file."""
        with open(self.path, "ab") as file:
            file.write(b"".join(map(line_of, rows)))
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: str) -> list[Row]:
    """The rows of a JSONL file. Raises `ValueError` for a line that is no JSON object; it names the line."""
    rows = []
    # split at line feeds only: str.splitlines would also split at other characters, which may be part of a text
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not valid JSON ({error}). Correct or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number} holds a {type(row).__name__}; needed: a JSON object with columns."
            )
        rows.append(row)
    return rows


def line_of(row: Row) -> bytes:
    """A row as a line of JSON."""
    # half a surrogate pair is valid in a JSON escape and not in UTF-8, so it is written as an escape
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _text(row: Row) -> str:
    return json.dumps(row, sort_keys=True)  # as text, NaN equals NaN
