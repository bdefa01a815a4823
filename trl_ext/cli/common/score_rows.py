"""Rows of `trl-ext score`: find the completions or steps of a row, score them, and write the score columns.

This module knows rows and scorers. It knows neither files nor where an earlier run stopped.
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from trl_ext.cli.common.score_arguments import ScoreArguments
from trl_ext.data.validation import DataError


if TYPE_CHECKING:
    from trl_ext import RewardEnsemble, RewardScorer


PLAIN_COLUMNS = ("score", "scores", "chosen_score", "rejected_score")
SCORE_COLUMNS = tuple(f"{name}{what}" for name in PLAIN_COLUMNS for what in ("", "_std", "_members", "_disagreement"))
SCORE_COLUMNS += ("step_scores",)

Row = dict[str, Any]


class ScoreError(Exception):
    """The command cannot continue. The message says what was found, what was needed and what to do."""


def model_kind(path: str) -> str:
    """The `kind` in `reward_model.json`, `"scalar"` without that file, or `"ensemble"` for an ensemble's folder."""
    from trl_ext.models.ensemble.ensemble_files import read_ensemble
    from trl_ext.models.sidecar import read_sidecar
    from trl_ext.scoring.remote import local_files

    folder = local_files(path)
    if read_ensemble(folder) is not None:
        return "ensemble"
    sidecar = read_sidecar(folder)
    return "scalar" if sidecar is None else sidecar.kind


def add_scores(
    scorer: "RewardScorer | RewardEnsemble", kind: str, chunk: list[tuple[int, Row]], args: ScoreArguments
) -> int:
    """
    Score a chunk of numbered rows and write the scores into them.

    Returns:
        `int`: number of steps without a score because `max_length` cut them off.

    Raises:
        [`ScoreError`]: if a row cannot be scored, or not by a model of this `kind`. The message names the line.
    """
    stepwise: list[tuple[int, Row, list[str]]] = []
    others: list[tuple[int, Row, tuple[str, ...], list[Any]]] = []
    for number, row in chunk:
        try:
            _check_free(row)
            steps = _steps(row, kind, args)
            if steps is None:
                others.append((number, row, *_candidates(row, args.completion_column)))
            else:
                stepwise.append((number, row, steps))
        except ScoreError as error:
            raise ScoreError(f"{args.input}, line {number}: {error}") from None
    cut_off = _score_steps(scorer, stepwise, args) if stepwise else 0
    if others:
        _score_completions(scorer, others, args)
    return cut_off


def _score_steps(scorer: "RewardScorer", rows: list[tuple[int, Row, list[str]]], args: ScoreArguments) -> int:
    owners = [(number, row) for number, row, _ in rows]
    scores = _call(scorer.score_steps, owners, [steps for *_, steps in rows], args)
    for (number, row), own, together in zip(owners, scores, scorer.combine(scores), strict=True):
        if together is not None and not math.isfinite(together):
            raise ScoreError(
                f"{args.input}, line {number}: the score is {together}; needed: a finite number, as JSON has no other."
                " Choose another --aggregation (`sum_log` of a probability of 0 is infinite)."
            )
        row.update(score=together, step_scores=own)
    return sum(own.count(None) for own in scores)


def _score_completions(
    scorer: "RewardScorer | RewardEnsemble",
    rows: list[tuple[int, Row, tuple[str, ...], list[Any]]],
    args: ScoreArguments,
) -> None:
    """Score the candidates of all rows in one call."""
    owners = [(number, row) for number, row, _, found in rows for _ in found]
    candidates = [candidate for *_, found in rows for candidate in found]
    if args.member_scores:
        members = _call(scorer.score_members, owners, candidates, args)
        values = {"": scorer.combine(members), "_members": members, "_disagreement": scorer.disagreement(members)}
    elif args.uncertainty:
        scores, deviations = _call(scorer.score_with_uncertainty, owners, candidates, args)
        values = {"": scores, "_std": deviations}
    else:
        values = {"": _call(scorer, owners, candidates, args)}
    for what, scores in values.items():
        remaining = iter(scores)
        for _, row, columns, found in rows:
            own = list(islice(remaining, len(found)))
            names = [f"{column}{what}" for column in columns]
            row.update({names[0]: own} if columns == ("scores",) else zip(names, own, strict=True))


def _call(method: Callable, owners: list[tuple[int, Row]], completions: list[Any], args: ScoreArguments) -> list[Any]:
    """Call a scoring method on completions (or lists of steps); an error names the line of the row it comes from."""
    try:
        return method(
            [row.get(args.prompt_column) for _, row in owners],
            completions,
            tools=[row.get("tools") for _, row in owners],
            chat_template_kwargs=[row.get("chat_template_kwargs") for _, row in owners],
        )
    except DataError as error:
        line = owners[error.row][0]
        raise ScoreError(
            f"{args.input}, line {line}: found {error.found}; needed {error.needed}. {error.fix}"
        ) from error


def _check_free(row: Row) -> None:
    taken = [column for column in SCORE_COLUMNS if column in row]
    if taken:
        raise ScoreError(f"found a column {taken[0]!r}, which the scores would overwrite. Rename or remove it.")


def _steps(row: Row, kind: str, args: ScoreArguments) -> list[str] | None:
    """The steps of a row, or `None` if it has completions."""
    column, beside = args.steps_column, ""
    if column not in row:
        if args.completion_column in row or "completions" not in row:
            return None
        column, beside = "completions", " beside `labels`"
        if not isinstance(row.get("labels"), list):
            if kind != "process":
                return None
            raise ScoreError(
                "found `completions` without `labels`, which may be the steps of one completion or several "
                "completions. Give --steps_column completions or --completion_column completions."
            )
    steps = row[column]
    if kind != "process":
        model = "an ensemble" if kind == "ensemble" else f"a model of kind {kind!r}"
        fix = "Give the folder of one member" if kind == "ensemble" else "Use a model of `trl-ext prm`"
        raise ScoreError(
            f"found steps ({column!r}{beside}); needed: completions, because {args.model} is {model}, which does not "
            f"score steps. {fix}, or join the steps in one `completion`"
            + ("; if they are several completions, give --completion_column completions." if beside else ".")
        )
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ScoreError(f"found {steps!r:.80} in {column!r}; needed: a list of steps, each a string.")
    if beside and len(row["labels"]) != len(steps):
        raise ScoreError(
            f"found {len(row['labels'])} `labels` for {len(steps)} steps; needed: one label for each step."
        )
    return steps


def _candidates(row: Row, completion_column: str) -> tuple[tuple[str, ...], list[Any]]:
    """The columns to write and the completions to score."""
    for column in (completion_column, "completions"):
        if column in row:
            value = row[column]
            several = isinstance(value, list) and (
                column == "completions" or any(not isinstance(item, dict) for item in value)
            )
            if column == "completions" and not several:
                raise ScoreError(f"found a {type(value).__name__} in 'completions'; needed: a list of completions.")
            return (("scores",), value) if several else (("score",), [value])
    if "chosen" in row and "rejected" in row:
        return ("chosen_score", "rejected_score"), [row["chosen"], row["rejected"]]
    raise ScoreError(
        f"found the columns {sorted(row)}; needed: {completion_column!r}, 'completions', or 'chosen' and 'rejected'. "
        "Name the column of completions with --completion_column, or that of steps with --steps_column."
    )
