"""Tables of member scores: fp64 tensors (N, M) with NaN where a member has no score for a row.

This module knows numbers, names and TRL's logging callbacks. It knows nothing of models or reducers.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from trl_ext.scoring.reducers import combine, disagreement


logger = logging.getLogger(__name__)

# Members are on different scales if a spread, or the distance of two means, exceeds this many times the smallest
# spread: our choice.
SCALES_DIFFER = 3.0
# With fewer rows the scales are not compared.
ROWS_TO_TELL = 8


def to_table(scores: Sequence[Sequence[float | None]], width: int) -> torch.Tensor:
    """Turn lists into a tensor (N, width), with NaN for `None`."""
    rows = [[torch.nan if value is None else value for value in row] for row in scores]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)


def to_list(scores: torch.Tensor) -> list[float | None]:
    """Turn a tensor (N,) into a list, with `None` for NaN."""
    return [None if value != value else value for value in scores.tolist()]


def check_scales(table: torch.Tensor, names: list[str], normalizers: Sequence[dict | None], ensemble: str) -> None:
    """Warn if the members are on different scales and some of them have no normaliser."""
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
            "or pass normalize=False if you want these scales."
        )


def log_members(table: torch.Tensor, names: list[str], ensemble: str, columns: dict[str, Any]) -> None:
    """
    Log the disagreement and the members' scores if the caller passes log functions, as TRL's trainers do.

    `log_metric` gets the mean over the rows, `log_extra` one value per row; both use the name `<ensemble>/<name>`.
    """
    named = {"disagreement": combine(table, disagreement), **dict(zip(names, table.T, strict=True))}
    for name, values in named.items():
        scored = values[~values.isnan()]
        if "log_metric" in columns and len(scored):
            columns["log_metric"](f"{ensemble}/{name}", scored.mean().item())
        if "log_extra" in columns:
            columns["log_extra"](f"{ensemble}/{name}", to_list(values))
