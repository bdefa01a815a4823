"""Tables of member scores: fp64 tensors (N, M) with NaN where a member has no score for a row.

Knows numbers, names and TRL's logging callbacks. Knows nothing of models or reducers.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from trl_ext.scoring.reducers import combine, disagreement


logger = logging.getLogger(__name__)

# Members whose means or spreads differ by so many of the smallest spread are not on one scale: our choice.
SCALES_DIFFER = 3.0
# Rows below which nothing is said about scales.
ROWS_TO_TELL = 8


def to_table(scores: Sequence[Sequence[float | None]], width: int) -> torch.Tensor:
    """Lists as a tensor (N, width), NaN for `None`."""
    rows = [[torch.nan if value is None else value for value in row] for row in scores]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)


def to_list(scores: torch.Tensor) -> list[float | None]:
    """A tensor (N,) as a list, `None` for NaN."""
    return [None if value != value else value for value in scores.tolist()]


def check_scales(table: torch.Tensor, names: list[str], normalizers: Sequence[dict | None], ensemble: str) -> None:
    """Warn if members without a normaliser are not on one scale with the others."""
    without = [name for name, one in zip(names, normalizers, strict=True) if one is None]
    columns = {name: column[~column.isnan()] for name, column in zip(names, table.T, strict=True)}
    found = {
        name: (column.mean().item(), column.std(correction=0).item())
        for name, column in columns.items()
        if len(column) >= ROWS_TO_TELL
    }
    if not without or len(found) < 2:
        return
    means, stds = zip(*found.values(), strict=True)
    bound = SCALES_DIFFER * min(stds)
    if max(stds) > bound or max(means) - min(means) > bound:
        shown = ", ".join(f"{name} {mean:.3g} ± {std:.3g}" for name, (mean, std) in found.items())
        logger.warning(
            f"{ensemble}: members are on different scales ({shown}), and there is no normaliser for "
            f"{', '.join(without)}. One member may decide every score. Call `fit_normalizer` with a few hundred rows, "
            "or pass normalize=False if the scales are meant."
        )


def log_members(table: torch.Tensor, names: list[str], ensemble: str, columns: dict[str, Any]) -> None:
    """
    Log the disagreement and the members' scores where the caller offers to, as TRL's trainers do.

    Through `log_metric` the mean over the rows, through `log_extra` a value a row; both under `<ensemble>/<name>`.
    """
    named = {"disagreement": combine(table, disagreement), **dict(zip(names, table.T, strict=True))}
    for name, values in named.items():
        scored = values[~values.isnan()]
        if "log_metric" in columns and len(scored):
            columns["log_metric"](f"{ensemble}/{name}", scored.mean().item())
        if "log_extra" in columns:
            columns["log_extra"](f"{ensemble}/{name}", to_list(values))
