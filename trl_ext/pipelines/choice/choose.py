"""`choose`: which rows of a pool to annotate next, by what a reward model or an ensemble is unsure of.

It reads the pool in chunks, has each row valued, and has a batch picked from a shortlist. It knows rows of a data set.
It knows nothing of training.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from trl_ext.data.mapping import plain_rows
from trl_ext.data.schema import template_arguments
from trl_ext.data.validation import DataError, RowChecks
from trl_ext.pipelines.choice.shortlist import DIVERSITIES, Diversity, Shortlist
from trl_ext.pipelines.choice.values import INFORMATIVE, STRATEGIES, Strategy, Valued, make_valuer
from trl_ext.scoring.ensemble import RewardEnsemble, load_scorer
from trl_ext.scoring.scorer import RewardScorer
from trl_ext.scoring.uncertainty import Candidates


logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "completions", "chosen", "rejected", "tools", "chat_template_kwargs")
ADDED = ("choice_order", "choice_value", "choice_row")
# Rows that are scored together, and rows in the shortlist for each row that is chosen. Our choices.
CHUNK_ROWS = 256
SHORTLIST = 10


@dataclass
class Choice:
    """
    The rows that were chosen.

    Args:
        rows (`list[int]`): their places in the pool, in the order in which they were chosen.
        values (`list[float]`): what each was worth: the strategy's value of the row, and with `"determinant"` what it
            added to the rows before it, in nats.
        report (`dict`): what was done, with counts and mean values.
    """

    rows: list[int]
    values: list[float]
    report: dict[str, Any]


def choose(
    model: str | Path | RewardScorer | RewardEnsemble | None,
    dataset: Dataset | Sequence[dict[str, Any]],
    n: int,
    strategy: Strategy = "fisher",
    *,
    diversity: Diversity | None = None,
    shortlist: int | None = None,
    prior_precision: float | None = None,
    seed: int = 0,
    **scorer_kwargs: Any,
) -> Dataset:
    r"""
    Choose the rows of a pool to annotate next.

    A row holds the completions that an annotator would compare. Labels that it may have already are not read.

    | strategy | value of a row | needs |
    |---|---|---|
    | `"fisher"` | what its label says about the last layer (Fisher information) | a scalar model |
    | `"uncertainty"` | posterior standard deviation of the score difference | a scalar model with `fit_uncertainty` |
    | `"disagreement"` | standard deviation of the members' score differences | an ensemble |
    | `"entropy"` | entropy of the predicted preference, in nats | a model or an ensemble |
    | `"random"` | a random number: the control | nothing |

    For more than two completions, `"uncertainty"` and `"entropy"` are means over the pairs of the row. `"fisher"`
    follows *Active Reward Modeling: Adaptive Preference Labeling for Large Language Model Alignment* by Y. Shen et al.
    (https://huggingface.co/papers/2502.04354). With a fitted uncertainty it is their past-aware variant, because the
    posterior's precision holds the rows that are labelled already; without one, the prior alone.

    The pool is read once, in chunks. Memory holds a shortlist of the rows with the highest values and not the pool.

    Args:
        model (`str`, `Path`, [`RewardScorer`] or [`RewardEnsemble`]):
            The folder or Hub id of a scalar reward model or an ensemble, or one that is loaded. `None` for `"random"`.
        dataset (`Dataset` or sequence of rows):
            The pool. A row has `completions` (two or more) and a `prompt`, or `chosen` and `rejected`.
        n (`int`):
            How many rows to choose.
        strategy (`str`, *optional*, defaults to `"fisher"`):
            How a row is valued, see above.
        diversity (`str`, *optional*):
            How a batch is put together. `"none"`: the `n` highest values. `"determinant"`: one by one, each time the
            row that adds most information to those before (D-optimal); for `"fisher"`, `"uncertainty"` and
            `"disagreement"`. `"k_centre"`: the row with the highest value, then each time the row of the shortlist
            whose completions differ in the most different way from those before. Defaults to `"determinant"` for
            `"fisher"`, else to `"none"`.
        shortlist (`int`, *optional*):
            How many rows with the highest values diversity picks from. Defaults to `10 * n`.
        prior_precision (`float`, *optional*):
            For `"fisher"` without a fitted uncertainty: precision of the prior of each weight. Defaults to the number
            of weights divided by their squared sum, the prior under which weights of this size are typical.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `"random"`.
        **scorer_kwargs:
            For a model given by its path: arguments of [`RewardScorer`], e.g. `max_length`.

    Returns:
        `Dataset`: the chosen rows in the order in which they were chosen, with all their columns and `choice_order`
        (from 0), `choice_value` and `choice_row` (the place in the pool).

    Raises:
        [`DataError`]: a row cannot be read or scored, has one completion, or its score is not finite; names the row.
        `ValueError`: the pool is empty, has fewer than `n` rows that can be compared, or an argument does not fit.
        [`PosteriorError`]: `"uncertainty"` without a fitted uncertainty.

    Example:

    ```python
    >>> batch = choose("outputs/reward", pool, n=2)
    >>> batch["choice_row"], batch["choice_value"]
    ([17, 4], [0.61, 0.55])
    ```
    """
    options = {"diversity": diversity, "shortlist": shortlist, "prior_precision": prior_precision, "seed": seed}
    return chosen_rows(dataset, choose_rows(model, dataset, n, strategy, **options, **scorer_kwargs))


def chosen_rows(dataset: Dataset | Sequence[dict[str, Any]], choice: Choice) -> Dataset:
    """The chosen rows of a pool as a data set, with the columns that [`choose`] adds."""
    added = dict(zip(ADDED, (list(range(len(choice.rows))), choice.values, choice.rows), strict=True))
    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_list([dict(dataset[row]) for row in choice.rows])
    else:
        dataset = dataset.select(choice.rows)
    for name, values in added.items():
        dataset = dataset.add_column(name, values)
    return dataset


def choose_rows(
    model: str | Path | RewardScorer | RewardEnsemble | None,
    dataset: Dataset | Sequence[dict[str, Any]],
    n: int,
    strategy: Strategy = "fisher",
    *,
    diversity: Diversity | None = None,
    shortlist: int | None = None,
    prior_precision: float | None = None,
    seed: int = 0,
    **scorer_kwargs: Any,
) -> Choice:
    """The places of the rows that [`choose`] chooses, with a report. The arguments are the same."""
    if isinstance(dataset, IterableDataset):
        raise ValueError("The pool is a stream; needed: a Dataset (in files, not in memory) or a list of rows.")
    diversity = _checked(n, strategy, diversity, len(dataset), shortlist)
    if prior_precision is not None and strategy != "fisher":
        raise ValueError(f"prior_precision is for the strategy 'fisher', and this is {strategy!r}. Leave it out.")
    taken = [name for name in ADDED if name in (getattr(dataset, "column_names", None) or dataset[0])]
    if taken:
        raise ValueError(f"The pool has a column {taken[0]!r} already. Rename or remove it.")
    if isinstance(model, (str, Path)):
        model = load_scorer(model, **scorer_kwargs)
    elif scorer_kwargs:
        raise TypeError(
            f"Unknown arguments: {sorted(scorer_kwargs)}. Arguments of RewardScorer are only for a model given by its "
            "path."
        )
    valuer = make_valuer(model, strategy, diversity, prior_precision, seed)
    kept = n if diversity == "none" else shortlist or SHORTLIST * n
    best = Shortlist(kept)
    total, count, identical = 0.0, 0, 0
    pool = plain_rows(dataset)
    for start in range(0, len(pool), CHUNK_ROWS):
        groups = _read(pool, range(start, min(start + CHUNK_ROWS, len(pool))))
        places = [start + number for number, group in enumerate(groups) if _differ(group.completions)]
        identical += len(groups) - len(places)
        if places:
            values, vectors = _valued(valuer, [groups[place - start] for place in places], places)
            best.add(places, values, vectors)
            total, count = total + float(values.sum()), count + len(places)
    if count < n:
        raise ValueError(
            f"n={n}, but the pool has {count} rows that can be compared ({identical} of {len(pool)} have "
            "completions that are all the same). Choose fewer rows, or give a larger pool."
        )
    rows, values, exact = best.pick(n, diversity)
    report = {
        "strategy": strategy,
        "diversity": diversity,
        "pool": len(dataset),
        "identical_completions": identical,
        "chosen": n,
        "mean_value_of_pool": total / count,
        "mean_value_of_chosen": sum(values) / n,
        "shortlist": min(kept, count),
        "same_as_without_shortlist": exact,
        "truncated": getattr(model, "num_truncated", 0),
        **valuer.about,
    }
    logger.info(f"Chose {n} of {len(dataset)} rows by {strategy} (diversity: {diversity}): {report}")
    return Choice(rows, values, report)


# ------------------------------------------------------------------------------------------------------------ the rows
def _checked(n: int, strategy: str, diversity: str | None, size: int, shortlist: int | None) -> Diversity:
    """The diversity to use. Raises `ValueError` for arguments that do not fit."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}; needed: one of {', '.join(STRATEGIES)}.")
    if diversity is None:
        diversity = "determinant" if strategy == "fisher" else "none"
    if diversity not in DIVERSITIES:
        raise ValueError(f"diversity={diversity!r}; needed: one of {', '.join(DIVERSITIES)}, or None.")
    if diversity == "determinant" and strategy not in INFORMATIVE:
        raise ValueError(f"{strategy!r} is no information, so a batch has no determinant. Use diversity='k_centre'.")
    if shortlist is not None and (diversity == "none" or shortlist < n):
        raise ValueError(f"shortlist={shortlist}; needed: {n} rows or more, and a diversity that picks from them.")
    if n < 1:
        raise ValueError(f"n={n}; needed: 1 or more rows to choose.")
    if size == 0:
        raise ValueError("The pool is empty; needed: rows with completions to compare.")
    if n > size:
        raise ValueError(f"n={n}, but the pool has {size} rows. Choose fewer rows, or give a larger pool.")
    return diversity


def _read(dataset: Dataset | Sequence[dict[str, Any]], places: range) -> list[Candidates]:
    """What is compared in each row."""
    if isinstance(dataset, Dataset):
        read = [name for name in COLUMNS if name in dataset.column_names]
        columns = dataset.select_columns(read)[places.start : places.stop]
        rows = [{name: values[number] for name, values in columns.items()} for number in range(len(places))]
    else:
        rows = [dataset[place] for place in places]
    return [_candidates(row, RowChecks(place, "pool")) for place, row in zip(places, rows, strict=True)]


def _candidates(row: dict[str, Any], checks: RowChecks) -> Candidates:
    if row.get("completions") is not None:
        completions, columns = checks.candidate_list(row["completions"], "completions"), None
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        completions, columns = [row["chosen"], row["rejected"]], ["chosen", "rejected"]
    else:
        raise checks.error(
            "completions",
            f"the columns {sorted(name for name, value in row.items() if value is not None)}",
            "`completions` (a list of two or more), or `chosen` and `rejected`",
            "Rename the columns, or remove the row.",
        )
    columns = columns or ["completions"] * len(completions)
    _, prompt = checks.one_kind(checks.prompt(row.get("prompt")), completions, columns)
    return Candidates(prompt, completions, *template_arguments(row, checks))


def _differ(completions: Sequence[Any]) -> bool:
    """Whether a row has two different completions, so that there is something to compare."""
    return any(completion != completions[0] for completion in completions[1:])


def _valued(valuer: Callable[[list[Candidates]], Valued], groups: list[Candidates], places: list[int]) -> Valued:
    """Values and vectors of rows; an error names the row of the pool."""
    try:
        return valuer(groups)
    except DataError as error:
        row = None if error.row is None else places[error.row]
        raise DataError(error.found, error.needed, error.fix, row, error.column, "pool") from error
