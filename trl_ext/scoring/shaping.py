r"""Sigmoid shaping of a reward relative to a reference answer (PAR).

\\( r_{PAR} = \\frac{1}{M} \\sum_m \\sigma(r - r^{ref}_m) \\): a policy gains much by becoming better than the
reference and nearly nothing by pushing the score to where the reward model was never trained. See *Reward Shaping to
Mitigate Reward Hacking in RLHF* by J. Fu et al. (https://huggingface.co/papers/2502.18770). It knows scores and
columns of rows, and nothing of models.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.special import expit


def relative_to_reference(
    score: Callable[[list[Any] | None, list[Any], dict[str, list[Any]]], list[float | None]],
    scores: Sequence[float | None],
    prompts: Sequence[Any] | None,
    columns: Mapping[str, Sequence[Any]],
    reference: str | float,
) -> list[float | None]:
    """
    Shape scores.

    Args:
        score (`Callable`): from prompts, completions and columns to scores; called once on the references.
        scores (`Sequence[float | None]` of length `N`): what is shaped.
        prompts, columns: of the rows, as in a call of a reward function.
        reference (`str` or `float`):
            A column that holds a reference completion, or a list of them, for each row; or one fixed reference score.
            References that several rows share (the samples of a prompt, with equal `tools` and
            `chat_template_kwargs`) are scored once.

    Returns:
        `list[float | None]`: in [0, 1]; 0.5 is as good as the reference. `None` where a score is missing.

    Raises:
        `ValueError`: the column is not there, or a row has no reference.
    """
    if not isinstance(reference, str):
        return [None if value is None else float(expit(value - reference)) for value in scores]
    if reference not in columns:
        raise ValueError(
            f"The column {reference!r} with reference completions is not among the columns {sorted(columns)}. Add it "
            "to the data set, or give a fixed reference score."
        )
    template = [columns[name] for name in ("tools", "chat_template_kwargs") if name in columns]
    place: dict[str, int] = {}
    wanted: list[tuple[int, Any]] = []  # row, reference
    of_row: list[list[int]] = []
    for row, given in enumerate(columns[reference]):
        several = isinstance(given, Sequence) and not isinstance(given, str) and not _is_chat(given)
        references = list(given) if several else [given]
        if not references or any(item is None for item in references):
            raise ValueError(f"Row {row} has no reference in the column {reference!r}. Add one, or remove the row.")
        numbers = []
        for item in references:
            seen = [None if prompts is None else prompts[row], item, *(values[row] for values in template)]
            key = json.dumps(seen, sort_keys=True, default=str)
            if key not in place:
                place[key] = len(wanted)
                wanted.append((row, item))
            numbers.append(place[key])
        of_row.append(numbers)
    found = score(
        None if prompts is None else [prompts[row] for row, _ in wanted],
        [item for _, item in wanted],
        {name: [values[row] for row, _ in wanted] for name, values in columns.items() if name != reference},
    )
    shaped: list[float | None] = []
    for value, numbers in zip(scores, of_row, strict=True):
        against = [found[number] for number in numbers]
        missing = value is None or any(other is None for other in against)
        shaped.append(None if missing else float(statistics.fmean(expit(value - other) for other in against)))
    return shaped


def _is_chat(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], Mapping)
