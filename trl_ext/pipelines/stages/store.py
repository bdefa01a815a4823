"""Files that survive a crash: shards of JSON lines, and the manifest with everything that a result depends on.

A store is a folder that is named after its cache key, the hash of its manifest. Its shards are numbered, and each
holds a known number of records, each line with a checksum. A shard is written to a temporary file, synced and renamed,
so a kill at any moment leaves it either missing or complete. This module does not know what records mean.
"""

import json
import logging
import os
import shutil
import socket
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trl_ext.pipelines.stages.cache_key import Change, StaleError, changes_between, key_of


logger = logging.getLogger(__name__)

_CHECKSUM = len(b'{"crc": "00000000", ')
_FULL = (
    "Everything that was finished before is kept. Free some disk space or give another output_dir (and copy this one "
    "there), then run the same command again."
)


class StoreError(RuntimeError):
    """Stored data cannot be read or written. The message says what was found, what was kept and what to do."""


class DamagedError(StoreError):
    """A file that is truncated or changed."""


def write_lines(path: Path, records: Iterable[dict[str, Any]], checksums: bool = True) -> int:
    """
    Write records as lines of JSON, each with a checksum if `checksums` is true. The file appears only when it is
    complete.

    Returns:
        `int`: number of records.

    Raises:
        [`StoreError`]: the disk is full or the folder cannot be written to.
    """
    count = 0
    with whole_file(path, _FULL) as file:
        for record in records:
            file.write(checked_line(record) if checksums else _json(record) + b"\n")
            count += 1
    return count


def read_lines(path: Path, places: Collection[int] | None = None) -> Iterator[dict[str, Any]]:
    """
    The records of a file of `write_lines`; with `places` only the records with these numbers, from 0.

    Raises:
        [`DamagedError`]: a line is truncated or was changed.
    """
    wanted = None if places is None else set(places)
    for place, body in enumerate(_bodies(path)):
        if wanted is None or place in wanted:
            yield json.loads(body)


def count_lines(path: Path) -> int:
    """Number of records, after checking each line's checksum. Raises [`DamagedError`]."""
    return sum(1 for _ in _bodies(path))


def _bodies(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            body = checked_body(line)
            if body is None:
                raise DamagedError(f"{path}, line {number}: truncated or changed (its checksum does not match).")
            yield body


def checked_body(line: bytes) -> bytes | None:
    """The JSON of a line of [`checked_line`]; `None` if the line is truncated or was changed."""
    body = b"{" + line[_CHECKSUM:-1]
    return body if line.endswith(b"\n") and line[9:17] == b"%08x" % zlib.crc32(body) else None


def checked_line(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON with a checksum."""
    body = _json(record)
    return b'{"crc": "%08x", %b\n' % (zlib.crc32(body), body[1:])


def _json(record: dict[str, Any]) -> bytes:
    # half a surrogate pair is valid in a Python text and not in UTF-8, so it is written as an escape
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, if the system supports it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_manifest(
    path: Path, manifest: dict[str, Any], where: str, fix: str, places: Mapping[str, str] | None = None
) -> None:
    """
    Store a manifest in a file, or compare it with the stored one.

    Args:
        path (`Path`): the file.
        manifest (`dict`): JSON-ready; everything that the result beside it depends on.
        where (`str`): the result, as the start of a sentence in errors: `"The rounds in runs/1 were"`.
        fix (`str`): what the user should do if they differ.
        places (`Mapping[str, str]`, *optional*):
            Entries that only name a place, with the entry for its content: `{"model": "model_sha256"}`. A moved model
            is the same model. If its content changed, the error names both places.

    Raises:
        [`StaleError`]: the manifests differ; it names every entry that does, with both values.
        [`StoreError`]: the file is damaged.
    """
    manifest = json.loads(json.dumps(manifest))
    if not path.is_file():
        write_json(path, manifest)
        return
    before, places = read_json(path), places or {}
    contents = {content: place for place, content in places.items()}
    changes: list[Change | str] = []
    for change in changes_between(before, manifest, ignore=places):
        place = contents.get(change.name)
        shown = f"another {place} at {before.get(place)}, now {manifest[place]}" if place in manifest else change
        changes.append(shown)
    if changes:
        raise StaleError(where, changes, fix)


@dataclass
class ShardStore:
    """
    Numbered shards in the folder `root/<hash of the manifest>`.

    Args:
        root (`Path`): folder of all stores of this kind.
        manifest (`dict`): JSON-ready; everything that the content depends on.
        sizes (`list[int]`): number of records of each shard.

    Attributes:
        folder (`Path`): where the shards are.
    """

    root: Path
    manifest: dict[str, Any]
    sizes: list[int]
    folder: Path = field(init=False)
    _complete: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = self.root / key_of(self.manifest)

    @classmethod
    def at(cls, folder: Path, sizes: list[int]) -> "ShardStore":
        """The store that [`~ShardStore.create`] made at this place."""
        store = cls(folder.parent, read_json(folder / "manifest.json"), sizes)
        if store.folder.name != folder.name:
            raise StoreError(f"{folder}/manifest.json was changed, so it does not fit its folder. Delete {folder}.")
        return store

    def create(self) -> None:
        """
        Create the folder with its manifest, or check the existing one.

        Stores of other configurations stay beside it. A warning names once how the nearest of them differs.
        """
        path = self.folder / "manifest.json"
        if path.is_file():
            ShardStore.at(self.folder, self.sizes)
            return
        near = self.nearest()
        if near is not None:
            logger.warning(
                f"{self.root} already holds {near[0].name}, made with {near[1]}. It is kept and not used; this "
                f"configuration uses the folder {self.folder.name}."
            )
        write_json(path, self.manifest)

    def nearest(self) -> tuple[Path, str] | None:
        """The store beside this one whose manifest differs least, and the differences (its value, then ours)."""
        found = []
        for path in sorted(self.root.glob("*/manifest.json")):
            if path.parent != self.folder:
                changes = changes_between(read_json(path), self.manifest)
                found.append((len(changes), path.parent, "; ".join(map(str, changes))))
        return min(found)[1:] if found else None

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard-{shard:06d}.jsonl"

    def write(self, shard: int, records: Iterable[dict[str, Any]]) -> None:
        """Write a shard. Raises [`StoreError`] if that fails or the number of records is wrong."""
        count = write_lines(self.path(shard), records)
        if count != self.sizes[shard]:
            self.path(shard).unlink()
            raise StoreError(f"Shard {shard} of {self.folder} got {count} records; needed: {self.sizes[shard]}.")
        self._complete.add(shard)

    def copy(self, shard: int, other: "ShardStore") -> None:
        """Copy a shard from another store. Raises [`StoreError`] if it is damaged there or cannot be written."""
        count = count_lines(other.path(shard))
        if count != self.sizes[shard]:
            raise DamagedError(f"{other.path(shard)} holds {count} records; needed: {self.sizes[shard]}.")
        with open(other.path(shard), "rb") as source, whole_file(self.path(shard), _FULL) as file:
            shutil.copyfileobj(source, file)
        self._complete.add(shard)

    def read(self, shard: int, places: Collection[int] | None = None) -> Iterator[dict[str, Any]]:
        """The records of a shard, or those at `places`. Raises [`StoreError`] if the shard is missing or damaged."""
        if not self.path(shard).is_file():
            raise StoreError(f"{self.path(shard)} is missing. Run again the stage that makes it.")
        needed = self.sizes[shard] if places is None else len(places)
        count = 0
        for record in read_lines(self.path(shard), places):
            count += 1
            yield record
        if count != needed:
            raise DamagedError(f"{self.path(shard)} gave {count} records; needed: {needed}.")

    def is_complete(self, shard: int) -> bool:
        """Whether a shard exists and is complete. It is checked once; a damaged shard gives a warning."""
        if shard in self._complete:
            return True
        path = self.path(shard)
        if not path.is_file():
            return False
        try:
            count = count_lines(path)
            if count != self.sizes[shard]:
                raise DamagedError(f"{path} holds {count} records; needed: {self.sizes[shard]}.")
        except DamagedError as error:
            logger.warning(f"{error} The shard is made again.")
            return False
        self._complete.add(shard)
        return True

    def missing(self, shards: Iterable[int] | None = None) -> list[int]:
        """The shards that are missing or damaged: of these, or of all."""
        return [
            shard for shard in (range(len(self.sizes)) if shards is None else shards) if not self.is_complete(shard)
        ]

    def wait(self, shards: Iterable[int] | None = None, seconds: float = 0.2) -> None:
        """Wait until these shards, or all, exist, including those that other processes make."""
        while self.missing(shards):
            time.sleep(seconds)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, which appears only when it is complete. Raises [`StoreError`]."""
    with whole_file(path, "Free some disk space and run again.") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def staging_of(path: Path) -> Path:
    """Where this process writes a file before it is complete; processes of several machines may make the same one."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


@contextmanager
def whole_file(path: Path, advice: str) -> Iterator[BinaryIO]:
    """A file to write to. It is renamed to `path` when it is complete and synced. Raises [`StoreError`]."""
    staging = staging_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(staging, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path} could not be written: {error.strerror or error}. {advice}") from error
    finally:
        staging.unlink(missing_ok=True)  # of a writer that failed


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of [`write_json`]. Raises [`StoreError`] if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(
            f"{path} is not valid JSON ({error}). Delete {path.parent} to make its content again."
        ) from error
