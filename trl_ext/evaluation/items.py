"""One row of a data set or of a benchmark's file -> a checked `Item`: what to score, and what is known of it.

It knows column names. It knows nothing of models, metrics, or of where rows come from.
"""

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trl import maybe_extract_prompt

from trl_ext.data.chat_templates import content_text
from trl_ext.data.tokenization import Completion, Prompt
from trl_ext.data.validation import DataError, RowChecks, shown


Family = Literal["preference", "ranked", "outcome", "stepwise", "best_of_n", "samples"]

# The columns that tell a family, the most telling first. ProcessBench and PRMBench have layouts of their own.
TELLTALES: dict[Family, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen", "rejected"),),
    "stepwise": (("completions", "labels"), ("steps", "label"), ("modified_process", "error_steps")),
    "ranked": (("completions", "ratings"), ("completions", "ranks")),
    "best_of_n": (("completions", "gold"),),
    "outcome": (("completion", "label"),),
    "samples": (("completions",),),
}
# Columns that may say which rows are not independent of each other, the first that is there counts.
CLUSTER_COLUMNS = ("cluster", "conversation_id", "prompt_id")

# Of a row: its prompt, its completions, their ratings, and the columns that these come from.
Parts = tuple[Prompt | None, list[Completion], list[float], list[str]]


@dataclass(slots=True)
class Item:
    """
    What is scored together: the candidates of a prompt, or the steps of a solution.

    Args:
        row (`int`): index of its row.
        prompt (`str`, list of messages or `None`): what the candidates answer.
        completions (`list`): the candidates; for a stepwise item the steps.
        ratings (`list[float]`):
            One for each candidate, higher is better: 1 and 0 for chosen and rejected (of a pair with
            `preference_probability` p: p and 1 - p), the label of an outcome, the gold score of a sample; for a
            stepwise item the label of each step (1 right, 0 wrong, NaN unknown). Empty where nothing is known.
        subset (`str`, *optional*): the part of the data set it belongs to.
        cluster (`Hashable`): items of equal clusters are not independent.
        columns (`dict`): the row's other columns, for the chat template and for reward functions.
    """

    row: int
    prompt: Prompt | None
    completions: list[Completion]
    ratings: list[float]
    subset: str | None
    cluster: Hashable
    columns: dict[str, Any] = field(default_factory=dict)


def family_of(columns: Sequence[str]) -> Family:
    """
    The family of a data set by its columns.

    Raises:
        [`DataError`]: no family has these columns; says which columns each needs.
    """
    names = set(columns)
    for family, layouts in TELLTALES.items():
        if any(names.issuperset(layout) for layout in layouts):
            return family
    needed = "; ".join(
        f"{family}: {' or '.join('+'.join(layout) for layout in layouts)}" for family, layouts in TELLTALES.items()
    )
    raise DataError(
        f"the columns {sorted(names)}",
        f"those of one of these ({needed})",
        "Rename the columns, or convert the rows.",
    )


def has_signed_labels(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether steps are labelled -1, 0, 1: then 0 is neutral, while among labels 0 and 1 it is wrong."""
    labels = (label for row in rows for label in row.get("labels") or [])
    return any(isinstance(label, (int, float)) and label < 0 for label in labels)


def read_item(
    row: Mapping[str, Any], index: int, family: Family, cluster_column: str | None = None, signed: bool = False
) -> Item:
    """
    Check one row.

    Args:
        row (`Mapping[str, Any]`): the row.
        index (`int`): its place in the data set, from 0.
        family (`str`): what [`family_of`] says of the data set.
        cluster_column (`str`, *optional*):
            The column that tells which rows are not independent. By default `cluster`, `conversation_id` or
            `prompt_id` if there is one, else rows of the same prompt belong together.
        signed (`bool`, *optional*, defaults to `False`):
            What [`has_signed_labels`] says of the data set. A row alone cannot tell: its labels may be 0 and 1 only.

    Raises:
        [`DataError`]: a column is missing or holds what it must not; names row and column.
    """
    checks = RowChecks(index, "evaluation")
    row = {name: value for name, value in row.items() if value is not None}
    prompt, completions, ratings, used = _READERS[family](row, checks)
    if family == "stepwise" and "labels" in used:
        if not signed and any(value < 0 for value in ratings):
            raise checks.error(
                "labels",
                "a label of -1, of which earlier rows have none",
                "one scale in all rows",
                "Shuffle the rows, or map neutral steps (0) to 1 and wrong ones (-1) to 0.",
            )
        if signed:  # a neutral step is not wrong; a label of None stays unknown
            ratings = [value if math.isnan(value) else float(value >= 0) for value in ratings]
    if not completions:
        raise checks.error(used[0], "nothing to score", "at least one completion", "Remove the row.")
    columns = {name: value for name, value in row.items() if name not in {*used, "prompt"}}
    subset = row.get("subset", row.get("domain", row.get("classification")))
    return Item(
        row=index,
        prompt=prompt,
        completions=completions,
        ratings=ratings,
        subset=None if subset is None else str(subset),
        cluster=_cluster(row, prompt, index, cluster_column, checks),
        columns=columns,
    )


def as_chat(item: Item) -> Item:
    """The item with a text prompt as a message of the user, and text completions as messages of the assistant."""
    if not isinstance(item.prompt, str):
        return item
    return replace(
        item,
        prompt=[{"role": "user", "content": item.prompt}],
        completions=[
            [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            for completion in item.completions
        ],
    )


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    messages = [completion] if isinstance(completion, Mapping) else completion
    return "\n".join(content_text(message.get("content")) or "" for message in messages)


def _cluster(
    row: dict[str, Any], prompt: Prompt | None, index: int, column: str | None, checks: RowChecks
) -> Hashable:
    if column is not None:
        if column not in row:
            raise checks.error(column, "no value", "what rows are grouped by", "Name a column that every row has.")
        return str(row[column])
    for name in CLUSTER_COLUMNS:
        if name in row:
            return str(row[name])
    return f"row {index}" if prompt is None else hashlib.sha1(repr(prompt).encode()).hexdigest()


def _preference(row: dict[str, Any], checks: RowChecks) -> Parts:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise checks.error(name, "no value", "a completion, or a list of them", "Correct or remove the row.")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if _is_chat(chosen) and _is_chat(rejected):  # two conversations may share their first turns
        given = {"chosen": chosen, "rejected": rejected} | ({} if prompt is None else {"prompt": prompt})
        parts = maybe_extract_prompt(given)
        if parts["prompt"]:
            prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    chosen, rejected = _candidates(chosen, "chosen", checks), _candidates(rejected, "rejected", checks)
    for name, candidates in (("chosen", chosen), ("rejected", rejected)):
        if not candidates:
            raise checks.error(name, "an empty list", "at least one completion", "Remove the row.")
    ratings = [1.0] * len(chosen) + [0.0] * len(rejected)
    if len(ratings) == 2 and "preference_probability" in row:
        better = checks.number(row["preference_probability"], "preference_probability", minimum=0, maximum=1)
        ratings = [better, 1 - better]
    return prompt, chosen + rejected, ratings, ["chosen", "rejected"]


def _ranked(row: dict[str, Any], checks: RowChecks) -> Parts:
    completions = _list(row, "completions", checks)
    column = "ratings" if "ratings" in row else "ranks"
    read = checks.number_list if column == "ratings" else checks.ranks
    return row.get("prompt"), completions, read(row.get(column), column, len(completions)), ["completions", column]


def _best_of_n(row: dict[str, Any], checks: RowChecks) -> Parts:
    completions = _list(row, "completions", checks)
    return (
        row.get("prompt"),
        completions,
        checks.number_list(row.get("gold"), "gold", len(completions)),
        ["completions", "gold"],
    )


def _outcome(row: dict[str, Any], checks: RowChecks) -> Parts:
    label = checks.number(row.get("label"), "label", minimum=0, maximum=1)
    if "completion" not in row:
        raise checks.error("completion", "no value", "a completion", "Correct or remove the row.")
    return row.get("prompt"), [row["completion"]], [label], ["completion", "label"]


def _samples(row: dict[str, Any], checks: RowChecks) -> Parts:
    return row.get("prompt"), _list(row, "completions", checks), [], ["completions"]


def _stepwise(row: dict[str, Any], checks: RowChecks) -> Parts:
    nan = float("nan")
    if "modified_process" in row:  # PRMBench: wrong steps by number from 1; later steps can be right again
        steps = _list(row, "modified_process", checks)
        wrong = {int(number) for number in _list(row, "error_steps", checks)}
        outside = sorted(number for number in wrong if not 1 <= number <= len(steps))
        if outside:
            raise checks.error(
                "error_steps", f"step {outside[0]}", f"steps from 1 to {len(steps)}", "Correct the row."
            )
        labels = [float(number not in wrong) for number in range(1, len(steps) + 1)]
        prompt = row.get("modified_question", row.get("question"))
        return prompt, steps, labels, ["modified_process", "error_steps"]
    if "steps" in row:  # ProcessBench: the first wrong step from 0, -1 for none; what follows it is not labelled
        steps = _list(row, "steps", checks)
        first = checks.number(row.get("label"), "label", minimum=-1, maximum=len(steps) - 1)
        if first != int(first):
            raise checks.error("label", shown(first), "the index of the first wrong step, or -1", "Correct the row.")
        labels = (
            [1.0] * len(steps) if first < 0 else [1.0] * int(first) + [0.0] + [nan] * (len(steps) - int(first) - 1)
        )
        return row.get("problem", row.get("prompt")), steps, labels, ["steps", "label"]
    steps = _list(row, "completions", checks)
    given = _list(row, "labels", checks)
    labels = checks.number_list([0.0 if label is None else label for label in given], "labels", len(steps))
    known = [nan if label is None else value for label, value in zip(given, labels, strict=True)]
    return row.get("prompt"), steps, known, ["completions", "labels"]


_READERS = {
    "preference": _preference,
    "ranked": _ranked,
    "best_of_n": _best_of_n,
    "outcome": _outcome,
    "samples": _samples,
    "stepwise": _stepwise,
}


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def _candidates(value: Any, column: str, checks: RowChecks) -> list[Completion]:
    """One completion (a text, a message, a list of messages), or a list of completions."""
    if isinstance(value, (str, Mapping)) or _is_chat(value):
        return [value]
    if not isinstance(value, Sequence):
        raise checks.error(column, shown(value), "a completion, or a list of them", "Correct or remove the row.")
    return list(value)


def _list(row: dict[str, Any], column: str, checks: RowChecks) -> list[Any]:
    value = row.get(column)
    if value is None or isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise checks.error(column, shown(value), "a list", "Correct or remove the row.")
    return list(value)
