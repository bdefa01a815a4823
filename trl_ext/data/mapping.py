"""What `formats` and `spans` share: map a function over the rows of a data set, count, and drop rows by their counts.

Knows `datasets` and the counts that travel with each row. Does not know what a row is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value

from trl_ext.data.report import DROPPING, DataReport
from trl_ext.data.validation import DataError


Rows = Dataset | IterableDataset
# Column that a mapped function adds: one count for each reason of the report. It is gone in the result.
COUNTS = "row_counts"


def open_rows(
    dataset: Rows, report: DataReport, written: set[str], decisive: Sequence[str] = ()
) -> tuple[Rows, list[str], dict[str, Any]] | None:
    """The data set without a format, its columns and its first row; `None` if it has the columns `written` already.

    Rows of a stream whose columns are not known need not have the same ones. Later rows get null for what they lack of
    the first row's.

    Args:
        written (`set[str]`): the columns by which a prepared data set is known.
        decisive (sequence of `str`, *optional*): columns that a later row may not have if the first has not.

    Raises:
        `DataError`: there is no row. When a row of a stream is read: it has one of the columns `decisive`.
    """
    if dataset.column_names is not None and written.issubset(dataset.column_names):
        return _already_prepared(dataset, report)
    dataset = dataset.with_format(None)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("no rows", "at least one row", "Check the path and the filters.", dataset=report.name)
    columns = list(first) if dataset.column_names is None else dataset.column_names
    if written.issubset(columns):
        return _already_prepared(dataset, report)
    if dataset.column_names is None:
        arguments = {"columns": columns, "decisive": decisive, "name": report.name}
        dataset = dataset.map(_missing_columns, with_indices=True, fn_kwargs=arguments)
    return dataset, columns, first


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
            )
    return {column: None for column in columns if column not in row}


def _already_prepared(dataset: Rows, report: DataReport) -> None:
    if isinstance(dataset, Dataset):
        report.rows = report.kept = len(dataset)


def map_rows(
    dataset: Rows,
    prepare_row: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
    features: dict[str, Any],
    report: DataReport,
    min_survival: float,
    num_proc: int | None,
) -> Rows:
    """Add the columns that ``prepare_row(row, index, **arguments)`` returns, and drop rows as their counts say.

    The counts travel with the rows, so that they are right with worker processes and when the cache is read. A stream
    is mapped lazily, and its rows are counted as they pass.

    Args:
        prepare_row (`Callable`): returns the new columns, `row_index` and `COUNTS` among them.
        features (`dict`): types of the new columns, without `COUNTS`.
        report (`DataReport`): is filled and, for a `Dataset`, shown.
    """
    if isinstance(dataset, IterableDataset):
        dataset = dataset.map(prepare_row, with_indices=True, fn_kwargs=arguments)
        return dataset.filter(_counter(report, min_survival)).remove_columns(COUNTS)
    dataset = dataset.map(
        prepare_row,
        with_indices=True,
        fn_kwargs=arguments,
        features=Features({**dataset.features, **features, COUNTS: List(Value("int32"))}),
        num_proc=num_proc,
        desc=f"Tokenizing {report.name} dataset",
    )
    counts = np.stack(dataset.with_format("numpy", columns=[COUNTS])[:][COUNTS])  # (rows, reasons)
    dropping = [column for column, reason in enumerate(report.reasons) if reason in DROPPING]
    survives = (counts[:, dropping] == 0).all(axis=1)
    report.add(counts.sum(axis=0).tolist(), rows=len(counts), kept=int(survives.sum()))
    report.check_survival(min_survival)
    report.show()
    if not survives.all():
        dataset = dataset.select(np.flatnonzero(survives))
    return dataset.remove_columns(COUNTS)


def _counter(report: DataReport, min_survival: float) -> Callable[[dict[str, Any]], bool]:
    # A closure, not an object: a stream is deep-copied by some of its methods, and functions are shared by copies.
    def count(row: dict[str, Any]) -> bool:
        counts = row[COUNTS]
        kept = not any(count for reason, count in zip(report.reasons, counts, strict=True) if reason in DROPPING)
        report.add_streamed(row["row_index"], counts, kept, min_survival)
        return kept

    return count
