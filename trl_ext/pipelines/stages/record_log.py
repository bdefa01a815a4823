"""A file that grows by one record at a time, so that a kill at any moment loses at most the records in work.

Each record has a key, such as the hash of a question. A rerun asks for the keys that are there and makes the others.
Records may come in any order. This module does not know what they mean.
"""

import json
import logging
from pathlib import Path
from typing import Any

from trl_ext.pipelines.stages.store import ShardStore, StoreError, checked_body, checked_line


logger = logging.getLogger(__name__)

FILE = "records.jsonl"


class RecordLog:
    """
    Records by key, in the folder `root/<hash of the manifest>`.

    ```python
    log = RecordLog(Path("outputs/answers"), {"model": ..., "temperature": 1.0})
    if key not in log:
        log.add(key, {"answer": ask(question)})
    log[key]
    ```

    Args:
        root (`Path`): folder of all logs of this kind. A log of another manifest stays beside this one, and a warning
            says how the nearest differs.
        manifest (`dict`): JSON-ready; everything that the records depend on, except what their keys cover.

    Raises:
        [`StoreError`]: the folder cannot be written to, or its manifest was changed.
    """

    def __init__(self, root: Path, manifest: dict[str, Any]):
        store = ShardStore(root, manifest, [])
        store.create()
        self.path = store.folder / FILE
        self._records: dict[str, dict[str, Any]] = {}
        ends_with_line = self._read()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (it stays open)
        if not ends_with_line:
            self._file.write(b"\n")  # what a kill left of the last record stays a line of its own

    def _read(self) -> bool:
        """Read the records; returns whether the file ends with a whole line."""
        if not self.path.is_file():
            return True
        damaged, line = 0, b"\n"
        with open(self.path, "rb") as file:
            for line in file:
                body = checked_body(line)
                if body is None:
                    damaged += line != b"\n"
                    continue
                record = json.loads(body)
                self._records[record.pop("key")] = record
        if damaged:
            logger.warning(f"{self.path}: {damaged} damaged records are made again; {len(self._records)} are kept.")
        return line.endswith(b"\n")

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record. Raises [`StoreError`] if it cannot be written."""
        try:
            self._file.write(checked_line({"key": key, **record}))
        except OSError as error:
            raise StoreError(
                f"{self.path} could not be written: {error.strerror or error}. {len(self)} records are kept. Free "
                "some disk space, then run the same command again."
            ) from error
        self._records[key] = record

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "RecordLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
