"""A data set of rows -> the same data set with token ids and ratings of each row's candidates, and a report.

It writes *new* columns only, because `datasets` casts a rewritten column to its old type. `schema` says what a row
means. This module does not know padding, models or losses.

It writes the columns `candidate_ids` (K lists of token ids), `candidate_ratings` (K floats, higher is better) and
`row_index` (position in the data set it came from). If the rows have them, it also writes `group_margin` and
`group_target`.
"""

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, List, Value

from trl_ext.data.mapping import COUNTS, map_rows, open_rows
from trl_ext.data.report import COUNTED, DataReport
from trl_ext.data.schema import DECISIVE, Group, Schema, check_row, find_schema
from trl_ext.data.tokenization import Encoded, TextRow, TokenizationSettings, Tokenizer, encode_batch
from trl_ext.data.validation import RowChecks, named_by_row


# A part of the cache key of `datasets`, which covers the arguments of our functions but not their code. Raise it
# whenever the meaning of a written column changes.
_CACHE_VERSION = 5
_PREPARED = {"candidate_ids", "candidate_ratings", "row_index"}
PAIR_COLUMNS = ("chosen_ids", "rejected_ids")
"""The columns of TRL's prepared pairs."""


def prepare_groups(
    dataset: Dataset | IterableDataset,
    tokenizer: Tokenizer,
    *,
    tokenization: TokenizationSettings,
    max_length: int | None,
    dataset_name: str = "train",
    num_proc: int | None = None,
    min_survival: float = 0.5,
    loss_needs_ratings: bool = False,
    use_pair_ratings: bool = True,
    pair_columns: bool = False,
    vocab_size: int | None = None,
    max_positions: int | None = None,
) -> tuple[Dataset | IterableDataset, DataReport]:
    """Validate and tokenize the rows of a data set into groups.

    Rows that it reads (first match wins):

    | columns | what |
    |---|---|
    | `candidate_ids` + (`ratings` or `ranks`) | ranked, tokenized |
    | `chosen_ids` + `rejected_ids` (or TRL's old `chosen_input_ids` + `rejected_input_ids`) | pairs, tokenized |
    | `prompt` + `completions` + (`ratings` or `ranks`) | ranked |
    | `prompt`? + `chosen` + `rejected` | pairs; ratings [1, 0], or `chosen_rating` + `rejected_rating` |

    and beside them `margin`, `preference_probability`, `tools`, `chat_template_kwargs`. Original columns stay. A data
    set that has been prepared already is returned as it is.

    Candidates longer than `max_length` tokens are left out. A group is dropped if fewer than two candidates remain, so
    that a pair is dropped whole, as in TRL. Nothing is truncated. Fully tied groups and identical candidates stay. So
    do rows with text that the model does not see, because the chat template leaves it out or the tokenizer knows no
    token of it; if the template leaves out text of every row, an error is raised. Every case is counted, and the
    counts are logged once.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows; a stream is prepared lazily.
        tokenizer: a transformers tokenizer; with a chat template if the rows are chats.
        tokenization (`TokenizationSettings`): how plain text becomes ids.
        max_length (`int` or `None`): limit in tokens for prompt + completion; `None` for no limit.
        dataset_name (`str`, *optional*, defaults to `"train"`): for messages.
        num_proc (`int`, *optional*): worker processes for a `Dataset`.
        min_survival (`float`, *optional*, defaults to `0.5`): smallest share of the rows that must survive.
        loss_needs_ratings (`bool`, *optional*, defaults to `False`): refuse `ranks`, whose distances mean nothing.
        use_pair_ratings (`bool`, *optional*, defaults to `True`): read `chosen_rating` and `rejected_rating`; else
            they are metadata, and the chosen one is simply better.
        pair_columns (`bool`, *optional*, defaults to `False`): write the token ids of pairs as `chosen_ids` and
            `rejected_ids` too, as TRL's trainer does.
        vocab_size (`int`, *optional*): refuse rows with a token id that is not below it.
        max_positions (`int`, *optional*): longest row that the model takes, in tokens; a second `max_length`.

    Returns:
        The data set with the columns above, and its `DataReport` (which, for a stream, fills as rows are read).

    Raises:
        `DataError`: a malformed row or column, too few surviving rows, or a chat template that leaves out text of
            every row. For a stream it is raised when the row is read.
    """
    report = DataReport(
        name=dataset_name,
        max_length=max_length,
        max_positions=max_positions,
        streaming=isinstance(dataset, IterableDataset),
    )
    opened = open_rows(dataset, report, _PREPARED, DECISIVE)
    if opened is None:
        return dataset, report
    dataset, columns, first = opened
    schema = find_schema(columns, first, dataset_name, loss_needs_ratings, use_pair_ratings)
    pair_columns = pair_columns and schema.pair and not set(PAIR_COLUMNS) & set(columns)
    arguments = {
        "tokenizer": tokenizer,
        "tokenization": tokenization,
        "schema": schema,
        "max_length": report.limit,
        "dataset_name": dataset_name,
        "vocab_size": vocab_size,
        "pair_columns": pair_columns,
        "cache_version": _CACHE_VERSION,
    }
    unseen = partial(_unseen_text, tokenizer=tokenizer, tokenization=tokenization, schema=schema)
    features = _new_features(schema, pair_columns)
    return map_rows(dataset, prepare_rows, arguments, features, report, min_survival, num_proc, unseen), report


def prepare_rows(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    tokenizer: Tokenizer,
    tokenization: TokenizationSettings,
    schema: Schema,
    max_length: int | None,
    dataset_name: str,
    vocab_size: int | None,
    pair_columns: bool,
    cache_version: int,
) -> dict[str, list[Any]]:
    """Makes the new columns of some rows, and their counts. A group that does not survive has no `candidate_ids`."""
    columns = {name: batch[name] for name in schema.columns if name in batch}
    checks = [RowChecks(index, dataset_name, vocab_size) for index in indices]
    rows = [{name: values[number] for name, values in columns.items()} for number in range(len(indices))]
    groups = [check_row(row, schema, row_checks) for row, row_checks in zip(rows, checks, strict=True)]
    if schema.tokenized:
        encoded = [[Encoded(ids, truncated=False) for ids in group.completions] for group in groups]
    else:
        encoded = named_by_row(
            lambda texts: encode_batch(tokenizer, texts, tokenization),
            [_texts(group) for group in groups],
            checks,
            schema.candidates[0],
            schema.kind,
        )
    new: dict[str, list[Any]] = {name: [] for name in (*_new_features(schema, pair_columns), COUNTS)}
    for row, group, candidates, row_checks in zip(rows, groups, encoded, checks, strict=True):
        ids = [candidate.ids for candidate in candidates]
        if not schema.tokenized:
            _check_ids(ids, row_checks, schema.candidates[0], tokenizer)
        fits = [max_length is None or len(candidate) <= max_length for candidate in ids]
        survives = sum(fits) >= 2
        kept = [candidate for candidate, fit in zip(ids, fits, strict=True) if fit and survives]
        ratings = [rating for rating, fit in zip(group.ratings, fits, strict=True) if fit and survives]
        has_prompt = schema.tokenized or "prompt" not in row or bool(row["prompt"])
        counts = {
            "over_long_rows": not survives,
            "over_long_candidates": survives and len(fits) - sum(fits),
            # as the collator rounds them
            "tied": survives and np.float32(min(ratings)) == np.float32(max(ratings)),
            "identical": survives and any(one == other for one, other in combinations(kept, 2)),
            "no_prompt": survives and not has_prompt,
            "unseen": any(candidate.unseen is not None for candidate in candidates),
            "unknown": any(candidate.unknown is not None for candidate in candidates),
            "unseen_prompt": any(candidate.unseen_prompt is not None for candidate in candidates),
        }
        new["candidate_ids"].append(kept)
        new["candidate_ratings"].append(ratings)
        new["row_index"].append(row_checks.row)
        if pair_columns:
            for column, candidate in zip(PAIR_COLUMNS, kept or ([], []), strict=True):
                new[column].append(candidate)
        if schema.margin:
            new["group_margin"].append(group.margin)
        if schema.target:
            new["group_target"].append(group.target)
        new[COUNTS].append([int(counts[reason]) for reason in COUNTED])
    return new


def _check_ids(ids: list[list[int]], checks: RowChecks, column: str, tokenizer: Tokenizer) -> None:
    """Raise `DataError` for a candidate without a token, or with one that the model does not know."""
    for candidate in ids:
        if not candidate:
            raise checks.error(column, "a completion without any token", "at least one token", "Remove the row.")
        checks.known_ids(candidate, column, tokenizer)


def _texts(group: Group) -> list[TextRow]:
    return [TextRow(group.prompt, one, group.tools, group.chat_template_kwargs) for one in group.completions]


def _unseen_text(row: dict[str, Any], tokenizer: Tokenizer, tokenization: TokenizationSettings, schema: Schema) -> str:
    """The first text of a row that the model does not see."""
    group = check_row(row, schema, RowChecks(0, ""))
    encoded = encode_batch(tokenizer, _texts(group), tokenization)
    return next(filter(None, (one.unseen or one.unknown or one.unseen_prompt for one in encoded)), "")


def _new_features(schema: Schema, pair_columns: bool) -> dict[str, Any]:
    features: dict[str, Any] = {
        "candidate_ids": List(List(Value("int32"))),
        "candidate_ratings": List(Value("float64")),
        "row_index": Value("int64"),
    }
    if pair_columns:
        features |= {column: List(Value("int32")) for column in PAIR_COLUMNS}
    if schema.margin:
        features["group_margin"] = Value("float64")
    if schema.target:
        features["group_target"] = Value("float64")
    return features
