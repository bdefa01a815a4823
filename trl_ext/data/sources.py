"""Loads the data set that a command line names: a Hub id, a folder or one local file.

It knows where rows are stored and in which file format. It does not know what their columns mean.
"""

import glob
import hashlib
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError


FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Maps a file extension to the name of the `datasets` builder that reads it."""

_SAVED_MARKERS = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes to a folder


def file_format(name: str) -> str | None:
    """The `datasets` builder for a local data file; `None` if `name` is not a local data file.

    Args:
        name (`str`): a path, or any other name of a data set.

    Raises:
        FileNotFoundError: `name` ends like a data file, and no such file exists. The Hub is not asked.
        ValueError: `name` is a file, and its extension is not in `FILE_FORMATS`.

    Example:

    >>> file_format("trl-lib/ultrafeedback_binarized") is None
    True
    """
    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(
                f"Cannot tell the format of the data file '{name}' from its extension '{path.suffix}'. "
                f"Known: {', '.join(FILE_FORMATS)}."
            )
        return FILE_FORMATS[path.suffix]
    if path.suffix in FILE_FORMATS and not path.is_dir():
        raise FileNotFoundError(f"No data file at '{name}' (seen from {Path.cwd()}). Check the path.")
    return None


def load_source(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Load a dataset by name.

    Args:
        name (`str`):
            One of: a local `.jsonl`, `.json`, `.parquet` or `.csv` file (it becomes the split `train`); a folder that
            `save_to_disk` wrote; any other folder, in which [`~datasets.load_dataset`] finds files and takes the
            splits from their names (`train.jsonl`, `test.jsonl`); or the id of a data set on the Hub.
        config (`str`, *optional*):
            Configuration of a Hub data set. Local files and saved folders have none, so it raises an error for them.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows lazily.

    Returns:
        `DatasetDict` or `IterableDatasetDict`: maps split names to rows.

    Raises:
        FileNotFoundError: neither a local file or folder nor a data set on the Hub has this name.
        ValueError: a file has an unknown format or damaged content, a data file is empty, or local data was given a
            `config`.
    """
    builder = file_format(name)
    saved = any((Path(name) / marker).is_file() for marker in _SAVED_MARKERS)
    if config is not None and (builder is not None or saved):
        raise ValueError(f"'{name}' is local data and has no configurations, but dataset_config={config!r} was given.")
    if saved:
        return _load_saved(name, streaming)
    try:
        if builder is not None:
            # a name is no pattern: `x[1].jsonl` would mean `x1.jsonl`
            return load_dataset(builder, data_files={"train": glob.escape(name)}, streaming=streaming)
        if Path(name).is_dir():
            name = str(Path(name).resolve())  # else a folder named `json` would mean the builder `json`
            if glob.escape(name) != name:
                raise ValueError(
                    f"The folder '{name}' has one of the characters * ? [ in its path, which `datasets` reads as a "
                    "pattern. Rename it, or give one of its files."
                )
        return load_dataset(name, name=config, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"'{name}' cannot be read as a data set: {error.__cause__ or error}") from error
    except StopIteration as error:
        raise ValueError(
            f"'{name}' has an empty data file. Needed: at least one row in each file. Remove the empty file."
        ) from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"'{name}' is neither a folder nor a file here (seen from {Path.cwd()}), and could not be loaded "
            f"from the Hub as a data set of that name: {error}"
        ) from error


def content_key(name: str | Path) -> str | None:
    """
    The cache key of a local data set: a hash of the names (in the folder) and the contents of its files.

    `None` if there is no file or folder of this name, as for the id of a data set on the Hub.
    """
    path = Path(name)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        relative = file.name if path.is_file() else file.relative_to(path).as_posix()
        with open(file, "rb") as content:
            digest.update(f"{relative} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def select_split(splits: DatasetDict | IterableDatasetDict, split: str, argument: str) -> Dataset | IterableDataset:
    """Returns one split. The error for a missing split lists those that exist.

    Args:
        splits (`DatasetDict` or `IterableDatasetDict`): what [`load_source`] returned.
        split (`str`): name of the split.
        argument (`str`): the command-line argument that chooses it, for the message.

    Raises:
        ValueError: there is no such split.
    """
    if split not in splits:
        raise ValueError(
            f"The dataset has no split '{split}'; it has {sorted(splits)}. Choose one with `{argument}`. (A folder "
            "with train.jsonl and test.jsonl has the splits train and test.)"
        )
    return splits[split]


def _load_saved(folder: str, streaming: bool) -> DatasetDict | IterableDatasetDict:
    saved = load_from_disk(folder)
    splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    if streaming:
        return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
    return splits
