"""Map a function over the rows of a data set in batches, count, and drop rows by their counts.

`formats` and `spans` share it. It knows `datasets` and the counts that travel with each row. It does not know what a
row means.
"""

import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Json, List, Value

from trl_ext.data.report import DROPPING, UNSEEN, DataReport, stream_reader
from trl_ext.data.validation import DataError


Rows = Dataset | IterableDataset
# A column that a mapped function adds: one count for each reason of the report. The result does not have it.
COUNTS = "row_counts"
# How many rows are tokenized in one call, and of how many rows the counts are read at a time.
_BATCH_ROWS = 1000
_COUNTED_ROWS = 65_536


def plain_rows(dataset: Rows) -> Rows:
    """The rows as their user sees them, as plain Python values.

    A transform (`with_transform`, `set_transform`) is applied to all rows once, and `datasets` caches the result. The
    result has the columns that the transform returns. A format that only changes types (torch, numpy) is removed, and
    so are the columns that it hides. Plain rows are returned unchanged, so you may call this function twice. A value
    that is not a data set, such as a list of rows, is returned unchanged too.

    Raises:
        `DataError`: the transform fails, or returns values that no column can hold.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if not isinstance(dataset, Dataset):
        return dataset
    shown, hides = dataset.format["columns"], not dataset.format["output_all_columns"]
    if dataset.format["type"] != "custom" or not len(dataset):
        if hides and len(shown) < len(dataset.column_names):
            dataset = dataset.select_columns(shown)
        return dataset.with_format(None)
    try:
        types = {name: _type_of(values) for name, values in dataset[:_BATCH_ROWS].items()}
        dataset = dataset.map(
            _same_batch,
            batched=True,
            batch_size=_BATCH_ROWS,
            fn_kwargs={"bools": [name for name, kind in types.items() if _holds_bools(kind)]},
            remove_columns=dataset.column_names,
            features=Features(types),
            desc="Applying the transform",
        )
    except Exception as error:
        raise DataError(
            f"a transform (set_transform, with_transform) that cannot be applied to all rows: {error}",
            "a transform that returns the same columns for every row, each of one type",
            "Correct the transform, or apply it yourself with dataset.map.",
        ) from error
    return dataset.with_format(None)


def _type_of(values: Sequence[Any]) -> Any:
    """The type of a column. Dictionaries become JSON, because in a column of structs each row has the keys of all."""
    if _holds_dictionaries(values):
        return Json()
    return Dataset.from_dict({"values": list(values)}).features["values"]


def _holds_dictionaries(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_dictionaries, value))
    return isinstance(value, dict)


def _holds_bools(kind: Any) -> bool:
    """Whether a type is that of bools, or of lists of them."""
    while isinstance(kind, List):
        kind = kind.feature
    return kind == Value("bool")


def _same_batch(batch: MutableMapping[str, list[Any]], bools: list[str]) -> MutableMapping[str, list[Any]]:
    """The batch, after a look at the columns of bools: to write a number there would make it True."""
    for name in bools:
        found = next((value for value in _leaves(batch[name]) if not isinstance(value, (bool, np.bool_))), None)
        if found is not None:
            raise TypeError(f"column '{name}' has bools at first, and later {found!r}")
    return batch


def _leaves(value: Any) -> Iterator[Any]:
    """The values in nested lists, without nulls."""
    if isinstance(value, (list, tuple, np.ndarray)):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def open_rows(
    dataset: Rows, report: DataReport, written: set[str], decisive: Sequence[str] = ()
) -> tuple[Rows, list[str], dict[str, Any]] | None:
    """The data set as `plain_rows` gives it, its columns and its first row; `None` if it was prepared before.

    The rows of a stream with unknown columns may differ in their columns. A later row gets null for each column of the
    first row that it lacks.

    Args:
        written (`set[str]`): the columns by which a prepared data set is known.
        decisive (sequence of `str`, *optional*): columns that a later row may not have if the first has not.

    Raises:
        `DataError`: there is no row, or a dictionary of data sets. When a row of a stream is read: it has one of the
            columns `decisive`.
    """
    if isinstance(dataset, dict):  # a DatasetDict too
        raise DataError(
            f"a dictionary of data sets ({', '.join(map(str, dataset))})",
            "one data set",
            "Pass one of them, such as dataset['train'].",
            dataset=report.name,
        )
    if dataset.column_names is not None and written.issubset(dataset.column_names):
        return _already_prepared(dataset, report)
    dataset = plain_rows(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("no rows", "at least one row", "Check the path and the filters.", dataset=report.name)
    if isinstance(dataset, IterableDataset) and (plain := python_values(first)) is not first:
        dataset, first = dataset.map(python_values), plain
    columns = list(first) if dataset.column_names is None else dataset.column_names
    if written.issubset(columns):
        return _already_prepared(dataset, report)
    if dataset.column_names is None:
        arguments = {"columns": columns, "decisive": decisive, "name": report.name}
        dataset = dataset.map(_missing_columns, with_indices=True, fn_kwargs=arguments)
    return dataset, columns, first


def python_values(value: Any) -> Any:
    """
    A row of a generator with its numbers and arrays of numpy as numbers and lists of Python; the same object if it has
    none.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (dict, list, tuple)):
        keys, values = (list(value), value.values()) if isinstance(value, dict) else (None, value)
        plain = [python_values(item) for item in values]
        if any(new is not old for new, old in zip(plain, values, strict=True)):
            return plain if keys is None else dict(zip(keys, plain, strict=True))
    return value


def _missing_columns(
    row: dict[str, Any], index: int, columns: list[str], decisive: Sequence[str], name: str
) -> dict[str, None]:
    """Null for each of the first row's `columns` that a row lacks."""
    for column in decisive:
        if column not in columns and row.get(column) is not None:
            raise DataError(
                "a column that the first row does not have",
                "one set of columns",
                "Give the first row that column too, or split the stream.",
                row=index,
                column=column,
                dataset=name,
                reader=stream_reader(),
            )
    return {column: None for column in columns if column not in row}


def _already_prepared(dataset: Rows, report: DataReport) -> None:
    if isinstance(dataset, Dataset):
        report.rows = report.kept = len(dataset)


def map_rows(
    dataset: Rows,
    prepare_rows: Callable[..., dict[str, list[Any]]],
    arguments: dict[str, Any],
    features: dict[str, Any],
    report: DataReport,
    min_survival: float,
    num_proc: int | None,
    unseen_text: Callable[[dict[str, Any]], str] | None = None,
) -> Rows:
    """Add the columns that ``prepare_rows(batch, indices, **arguments)`` returns, and drop rows as their counts say.

    The counts travel with the rows. So they are right if worker processes map the rows, and if the cache is read. A
    stream is mapped lazily, row by row, and its rows are counted as they pass.

    Args:
        prepare_rows (`Callable`): returns the new columns, `row_index` and `COUNTS` among them.
        features (`dict`): types of the new columns, without `COUNTS`.
        report (`DataReport`): is filled and, for a `Dataset`, shown.
        unseen_text (`Callable`, *optional*): returns the text that the model does not see of a row with a count of
            `UNSEEN`; the report shows the first one.
    """
    if isinstance(dataset, IterableDataset):
        one_row = {"prepare_rows": prepare_rows, "arguments": arguments}
        dataset = dataset.map(_prepare_one, with_indices=True, fn_kwargs=one_row)
        return dataset.filter(_counter(report, min_survival)).remove_columns(COUNTS)
    rows = dataset
    dataset = dataset.map(
        _prepare_batch,
        with_indices=True,
        batched=True,
        batch_size=_BATCH_ROWS,
        fn_kwargs={"prepare_rows": prepare_rows, "arguments": arguments},
        features=Features({**dataset.features, **features, COUNTS: List(Value("int32"))}),
        num_proc=num_proc,
        desc=f"Tokenizing {report.name} dataset",
    )
    reasons = list(report.reasons)
    dropping = [column for column, reason in enumerate(reasons) if reason in DROPPING]
    unseen_columns = [column for column, reason in enumerate(reasons) if reason in UNSEEN]
    survives, unseen = [], []
    for batch in dataset.select_columns([COUNTS]).with_format("arrow").iter(batch_size=_COUNTED_ROWS):
        counts = batch[COUNTS].combine_chunks().flatten().to_numpy().reshape(-1, len(reasons))  # (rows, reasons)
        survives.append((counts[:, dropping] == 0).all(axis=1))
        unseen += (report.rows + np.flatnonzero(counts[:, unseen_columns].any(axis=1))[:1]).tolist()
        report.add(counts.sum(axis=0).tolist(), rows=len(counts), kept=int(survives[-1].sum()))
    if unseen and unseen_text is not None:
        report.first_unseen = (unseen[0], unseen_text(rows[unseen[0]]))
    report.check_seen()
    report.check_survival(min_survival)
    report.show()
    kept = np.flatnonzero(np.concatenate(survives))
    if len(kept) < len(dataset):
        dataset = dataset.select(kept)
    return dataset.remove_columns(COUNTS)


def _prepare_batch(
    batch: MutableMapping[str, list[Any]],
    indices: list[int],
    prepare_rows: Callable[..., dict[str, list[Any]]],
    arguments: dict[str, Any],
) -> dict[str, list[Any]]:
    """The new columns of a batch."""
    # `datasets` writes a column again, from Python values, if it was read in the mapping that it gave us
    return prepare_rows(copy(batch), indices, **arguments)


def _prepare_one(
    row: dict[str, Any], index: int, prepare_rows: Callable[..., dict[str, list[Any]]], arguments: dict[str, Any]
) -> dict[str, Any]:
    """The new columns of a single row of a stream."""
    try:
        new = prepare_rows({name: [value] for name, value in row.items()}, [index], **arguments)
    except DataError as error:
        reader = stream_reader()
        if reader is None:
            raise
        raise DataError(
            error.found, error.needed, error.fix, error.row, error.column, error.dataset, reader
        ) from error
    return {name: values[0] for name, values in new.items()}


def _counter(report: DataReport, min_survival: float) -> Callable[[dict[str, Any]], bool]:
    # A closure, not an object: a stream is deep-copied by some of its methods, and functions are shared by copies.
    def count(row: dict[str, Any]) -> bool:
        counts = row[COUNTS]
        kept = not any(count for reason, count in zip(report.reasons, counts, strict=True) if reason in DROPPING)
        report.add_streamed(row["row_index"], counts, kept, min_survival)
        return kept

    return count


def rename_old_columns(dataset: Rows) -> Rows:
    """Rename the columns of tokenized pairs from before TRL 1.0, with TRL's deprecation warning."""
    columns = set(dataset.column_names or [])
    if not {"chosen_input_ids", "rejected_input_ids"} <= columns or columns & {"chosen_ids", "rejected_ids"}:
        return dataset
    warnings.warn(
        "The columns `chosen_input_ids` and `rejected_input_ids` are deprecated, as in TRL. Rename them to "
        "`chosen_ids` and `rejected_ids`.",
        FutureWarning,
        stacklevel=2,
    )
    return dataset.rename_columns({"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"})
