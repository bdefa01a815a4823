"""One row of a data set -> a checked `Group`: finds the meaning of each column and checks its values.

Knows the column names of preference and ranked rows, including TRL's names and those of tokenized rows. Knows nothing
of tokenizers or of `datasets`: a row is a dictionary.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trl_ext.data.chat_templates import Completion, Prompt
from trl_ext.data.validation import DataError, Kind, RowChecks, shown


# Columns that `formats` writes; it removes `row_counts` again.
WRITTEN = ("candidate_ids", "candidate_ratings", "row_index", "group_margin", "group_target", "row_counts")
# If the first row of a data set lacks one of these columns, no later row may have it.
DECISIVE = ("ratings", "ranks", "margin", "preference_probability", "chosen_rating", "rejected_rating")
_TOKENIZED_PAIRS = (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"))


@dataclass(frozen=True)
class Schema:
    """The columns that hold the parts of a row, decided once for a data set.

    Args:
        candidates (`tuple[str, ...]`): one column with the list of candidates, or two (better, worse).
        tokenized (`bool`): whether the candidates are already token ids.
        ratings (`tuple[str, ...]`): one column with a list, two columns with a number each, or none (then the first
            candidate wins).
        ranks (`str`, *optional*): the column with ranks, which may replace ratings.
        margin, target (`str`, *optional*): the columns with the margin and with the probability that the better
            candidate wins.
        kind (`str`, *optional*): "text" or "chat"; `None` when tokenized.
    """

    candidates: tuple[str, ...]
    tokenized: bool = False
    ratings: tuple[str, ...] = ()
    ranks: str | None = None
    margin: str | None = None
    target: str | None = None
    kind: Kind | None = None

    @property
    def pair(self) -> bool:
        """Whether the rows are preference rows (two columns, the better candidate first)."""
        return len(self.candidates) == 2

    @property
    def columns(self) -> list[str]:
        """The columns that `check_row` reads if a data set has them."""
        named = [*self.candidates, *self.ratings, self.ranks, self.margin, self.target]
        return [name for name in named if name] + ["prompt", "tools", "chat_template_kwargs"]


@dataclass(frozen=True)
class Group:
    """One checked row: the texts to tokenize and the rating of each candidate."""

    prompt: Prompt
    completions: list[Completion]
    ratings: list[float]
    margin: float | None
    target: float | None
    kind: Kind | None
    tools: list[Any] | str | None
    chat_template_kwargs: dict[str, Any] | None


def find_schema(
    columns: list[str],
    first: dict[str, Any],
    dataset_name: str,
    loss_needs_ratings: bool,
    use_pair_ratings: bool = True,
) -> Schema:
    """Finds the `Schema` of a data set. Raises `DataError` for missing, contradicting or reserved columns."""
    present = set(columns)

    def error(found: str, needed: str, fix: str, column: str) -> DataError:
        return DataError(found, needed, fix, row=0, column=column, dataset=dataset_name)

    def missing(column: str, fix: str) -> DataError:
        return error(f"no such column among {sorted(present)}", f"the column {column!r}", fix, column)

    rename = "Rename the column that holds it with dataset.rename_column."
    tokenized_pair = next((pair for pair in _TOKENIZED_PAIRS if present.issuperset(pair)), None)
    if "candidate_ids" in present:
        candidates, tokenized = ("candidate_ids",), True
    elif tokenized_pair is not None:
        candidates, tokenized = tokenized_pair, True
    elif "completions" in present and present & {"ratings", "ranks"} and present & {"chosen", "rejected"}:
        raise error(
            "completions with ratings or ranks, and also chosen or rejected",
            "either ranked or preference rows",
            "Remove the columns that you do not want with dataset.remove_columns.",
            "completions",
        )
    elif "completions" in present and not present & {"chosen", "rejected"}:
        candidates, tokenized = ("completions",), False
        if "prompt" not in present:
            raise missing("prompt", rename + " If the completions contain the prompt, add a column of empty prompts.")
    elif present & {"chosen", "rejected"}:
        candidates, tokenized = ("chosen", "rejected"), False
        for column in candidates:
            if column not in present:
                raise missing(column, rename)
    else:
        raise missing("chosen", "Give `chosen` and `rejected`, or `completions` with `ratings` or `ranks`.")

    reserved = [column for column in WRITTEN if column in present and column not in candidates]
    if reserved:
        raise error(
            "a column of that name",
            "a free name",
            "Rename it: tokenization writes a column of that name.",
            reserved[0],
        )

    ratings: tuple[str, ...] = ()
    ranks = None
    if len(candidates) == 2 and not use_pair_ratings:
        pass  # `chosen_rating` and `rejected_rating` are metadata
    elif len(candidates) == 2:
        given = [column for column in ("chosen_rating", "rejected_rating") if column in present]
        if len(given) == 1:
            raise missing("rejected_rating" if given[0] == "chosen_rating" else "chosen_rating", "Give both or none.")
        ratings = tuple(given)
    elif "ratings" in present:
        ratings, ranks = ("ratings",), "ranks" if "ranks" in present else None
    elif "ranks" in present:
        ranks = "ranks"
        if loss_needs_ratings:
            raise error(
                "ranks",
                "ratings: this loss uses the distances between candidates, and ranks only give their order",
                "Give a column 'ratings', or use plackett_luce or pairwise (without margins from ratings). A loss "
                "that you register accepts ranks if you declare it with uses_distances=False.",
                "ranks",
            )
    else:
        raise missing("ratings", "Give `ratings` (higher is better) or `ranks` (0 is best). " + rename)

    schema = Schema(
        candidates=candidates,
        tokenized=tokenized,
        ratings=ratings,
        ranks=ranks,
        margin="margin" if "margin" in present else None,
        target="preference_probability" if "preference_probability" in present else None,
    )
    kind = check_row(first, schema, RowChecks(0, dataset_name)).kind
    return replace(schema, kind=kind)


def check_row(row: dict[str, Any], schema: Schema, checks: RowChecks) -> Group:
    """Makes a `Group` of one row. Raises `DataError` for the first fault in it."""
    if schema.pair:
        columns, values = list(schema.candidates), [row[column] for column in schema.candidates]
    else:
        column = schema.candidates[0]
        values = checks.candidate_list(row[column], column)
        columns = [column] * len(values)

    kind, prompt, tools, template = None, None, None, None
    if schema.tokenized:
        values = [checks.token_ids(value, column) for value, column in zip(values, columns, strict=True)]
    else:
        kind, prompt = checks.one_kind(checks.prompt(row.get("prompt")), values, columns)
        if schema.kind is not None and kind != schema.kind:
            raise checks.error(
                columns[0],
                f"a {kind} row",
                f"{schema.kind} rows, as row 0 is one",
                "Convert the data set to one kind.",
            )
        if kind == "chat":
            tools, template = template_arguments(row, checks)

    ratings = _ratings(row, schema, checks, len(values))
    margin = checks.number(row[schema.margin], schema.margin, minimum=0.0) if schema.margin else None
    target = checks.number(row[schema.target], schema.target, minimum=0.0, maximum=1.0) if schema.target else None
    if target is not None and len(values) != 2:
        raise checks.error(
            schema.target, f"a probability for {len(values)} candidates", "2 candidates", "Remove the column."
        )
    return Group(prompt, values, ratings, margin, target, kind, tools, template)


def _ratings(row: dict[str, Any], schema: Schema, checks: RowChecks, length: int) -> list[float]:
    """The ratings of a row's candidates; higher is better."""
    if schema.pair:
        if not schema.ratings:
            return [1.0, 0.0]
        ratings = [checks.number(row[column], column) for column in schema.ratings]
        if ratings[0] < ratings[1]:
            raise checks.error(
                schema.ratings[0],
                f"{ratings[0]:g}, below {schema.ratings[1]} = {ratings[1]:g}",
                "a chosen completion that is rated at least as high as the rejected one",
                "Swap the two completions and their ratings.",
            )
        return ratings
    from_ranks = checks.ranks(row[schema.ranks], schema.ranks, length) if schema.ranks else None
    if not schema.ratings:
        return from_ranks
    ratings = checks.number_list(row[schema.ratings[0]], schema.ratings[0], length)
    if from_ranks is not None:
        by_rating, by_rank = np.array(ratings), np.array(from_ranks)
        if np.any((by_rating[:, None] > by_rating) & (by_rank[:, None] < by_rank)):
            raise checks.error(
                schema.ranks,
                "ranks that contradict the ratings (a better rating with a worse rank)",
                "one order",
                f"Remove one of the columns {schema.ratings[0]!r} and {schema.ranks!r}.",
            )
    return ratings


def template_arguments(row: dict[str, Any], checks: RowChecks) -> tuple[list[Any] | str | None, dict[str, Any] | None]:
    """The `tools` of a row (a list, or JSON of a list, as in TRL) and its `chat_template_kwargs`."""
    tools, template = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            json.loads(tools)
        except json.JSONDecodeError as error:
            raise checks.error("tools", shown(tools), "a list of tools, or JSON of such a list", str(error)) from error
    if template is not None and not isinstance(template, dict):
        raise checks.error("chat_template_kwargs", shown(template), "a dictionary", "Convert or remove the column.")
    if template and "strftime_now" in str(template.get("chat_template")):
        raise checks.error(
            "chat_template_kwargs",
            "a chat template that writes today's date (strftime_now)",
            "a template that gives the same tokens on any day",
            "Write a fixed date into it, or make it the template of the tokenizer, where training freezes the day.",
        )
    return tools, template
