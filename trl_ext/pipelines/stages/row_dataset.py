"""Reads a file of rows as a data set, with exactly the values of the file.

`Dataset.from_json` turns texts that look like dates into dates, and fails if a column is empty in the first ten
megabytes and not later. This module keeps texts as texts, and a column gets its type from all rows. Rows are read in
chunks, so the file may be larger than memory. The module knows lines of JSON and Arrow types.
"""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Json

from trl_ext.pipelines.stages.store import staging_of


CHUNK_ROWS = 1000


def dataset_of_rows(path: Path) -> Dataset:
    """
    The rows of a file of JSON lines as a data set.

    Some columns have no Arrow type (objects with different keys, or both numbers and texts). They become
    [`~datasets.Json`], which returns the original values, except for what its JSON does not know: an integer beyond 64
    bits becomes a text, and half a surrogate pair is left out. The data set is stored in a file beside that of the
    rows.
    """
    types: dict[str, pa.DataType | None] = {}
    for rows in _chunks(path):
        for name in dict.fromkeys(name for row in rows for name in row):
            types[name] = _type_of([row.get(name) for row in rows], types.get(name, pa.null()))
    plain = Features.from_arrow_schema(pa.schema([(name, kind) for name, kind in types.items() if kind is not None]))
    features = Features({name: Json() if kind is None else plain[name] for name, kind in types.items()})
    schema = features.arrow_schema
    arrow = path.with_suffix(".arrow")
    staging = staging_of(arrow)
    with pa.OSFile(str(staging), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for rows in _chunks(path):
            columns = []
            for name, kind in types.items():
                values = [row.get(name) for row in rows]
                if kind is None:
                    texts = pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
                    columns.append(pa.ExtensionArray.from_storage(schema.field(name).type, texts))
                else:
                    columns.append(pa.array(values, schema.field(name).type))
            writer.write_batch(pa.record_batch(columns, schema=schema))
    os.replace(staging, arrow)
    return Dataset.from_file(str(arrow))


def _chunks(path: Path) -> Iterator[list[dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        rows = map(json.loads, file)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield chunk


def _type_of(values: list[Any], known: pa.DataType | None) -> pa.DataType | None:
    """The type that holds these values and those of a known type without conversion, or `None`."""
    if known is None:
        return None
    try:
        found = pa.array(values)
        schemas = [pa.schema([("values", kind)]) for kind in (known, found.type)]
        both = pa.unify_schemas(schemas, promote_options="permissive").field("values").type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError):  # 2**70, or half a surrogate pair
        return None
    if not _same_keys(known, found.type) or (pa.types.is_nested(found.type) and found.to_pylist() != values):
        return None
    return both


def _same_keys(one: pa.DataType, other: pa.DataType) -> bool:
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        names = {field.name for field in one}
        return names == {field.name for field in other} and all(
            _same_keys(one.field(name).type, other.field(name).type) for name in names
        )
    if pa.types.is_list(one) and pa.types.is_list(other):
        return _same_keys(one.value_type, other.value_type)
    return True
