r"""Performance gap recovered (PGR): the share of the gap between weak model and ceiling that a strong student closes.

$$
\mathrm{PGR} = \frac{\text{weak-to-strong} - \text{weak}}{\text{ceiling} - \text{weak}}
$$

See *Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision* by C. Burns et al.
(https://huggingface.co/papers/2312.09390), section 3, and *Foundations of Large Language Models* by T. Xiao and
J. Zhu, equation 10.11. This module knows a number for each test row, and nothing of models or tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_ext.metrics.bootstrap import bootstrap_means


# With a gap below this many of its standard errors, PGR is undefined.
DECIDED_AT = 2.0


def performance_gap_recovered(weak: float, weak_to_strong: float, ceiling: float, clip: bool = True) -> float:
    r"""
    Share of the gap between weak model and ceiling that the weakly supervised student recovers (equation 10.11).

    Args:
        weak (`float`): performance of the weak supervisor, higher is better.
        weak_to_strong (`float`): performance of the strong student trained on the weak supervisor's labels.
        ceiling (`float`): performance of the strong model trained on ground truth.
        clip (`bool`, *optional*, defaults to `True`):
            Limit the result to [0, 1], as the definition does. With `False` it is negative for a student below its
            supervisor, and above 1 for a student above the ceiling.

    Returns:
        `float`: 0 if the student is no better than its supervisor, 1 if it reaches the ceiling.

    Raises:
        ValueError: the ceiling is not above the weak model, or a value is not finite: there is no gap to recover.

    Example:

    >>> performance_gap_recovered(weak=0.6, weak_to_strong=0.75, ceiling=0.8)
    0.75
    """
    values = {"weak": weak, "weak_to_strong": weak_to_strong, "ceiling": ceiling}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} is not finite. PGR needs three performances.")
    if ceiling <= weak:
        raise ValueError(
            f"The ceiling ({ceiling:g}) is not above the weak model ({weak:g}), so there is no gap to recover. Train "
            "the ceiling longer, take a larger strong model, or a weaker supervisor."
        )
    recovered = round((weak_to_strong - weak) / (ceiling - weak), 12)  # 0.15 / 0.2 is not 0.75 in binary
    return min(max(recovered, 0.0), 1.0) if clip else recovered


@dataclass(frozen=True)
class PGREstimate:
    """
    PGR of a test set and its error.

    Args:
        weak, weak_to_strong, ceiling (`float`): mean performance over the rows.
        gap_error (`float`): standard error of `ceiling - weak` (paired, over prompts).
        pgr (`float`, *optional*): PGR, not clipped; `None` if it is undefined.
        interval (`tuple[float, float]`, *optional*): percentile bootstrap interval of `pgr`; `None` if `pgr` is.
        reason (`str`, *optional*): why `pgr` is undefined.
        intervals (`dict[str, tuple[float, float]]`, *optional*):
            percentile bootstrap intervals of `weak`, `weak_to_strong` and `ceiling`; `None` if all rows belong to one
            prompt.
    """

    weak: float
    weak_to_strong: float
    ceiling: float
    gap_error: float
    pgr: float | None
    interval: tuple[float, float] | None
    reason: str | None = None
    intervals: dict[str, tuple[float, float]] | None = None


def estimate_pgr(
    weak: torch.Tensor,
    weak_to_strong: torch.Tensor,
    ceiling: torch.Tensor,
    clusters: Sequence[int] | torch.Tensor | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> PGREstimate:
    """
    PGR with a paired bootstrap interval: all three models use the same resampled rows.

    PGR is undefined (`None`) if `ceiling - weak` is below twice its standard error, because the gap may then be zero.
    A resample without a gap counts as infinity, with the sign of the difference.

    Args:
        weak, weak_to_strong, ceiling (`torch.Tensor` of shape `(N,)`):
            Performance of each model on each test row, e.g. 1 if it is right. The rows of several seeds may be
            concatenated.
        clusters (sequence of `int` of length N, *optional*):
            Rows that are resampled together: the prompt of each row, because several rows of a prompt, or the seeds of
            a row, are not independent. By default each row is its own cluster.
        level (`float`, *optional*, defaults to `0.95`): coverage of the interval.
        num_resamples (`int`, *optional*, defaults to `2000`): bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`): seed of the bootstrap.

    Returns:
        [`PGREstimate`].

    Raises:
        ValueError: shapes that differ, no rows, or values that are not finite.
    """
    shapes = [tuple(values.shape) for values in (weak, weak_to_strong, ceiling)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(f"PGR needs three vectors of one length over at least one row, found the shapes {shapes}.")
    rows = torch.stack([values.double() for values in (weak, weak_to_strong, ceiling)], dim=1)  # (N, 3)
    if not rows.isfinite().all():
        bad = int((~rows.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"Row {bad} has a performance that is not finite: {rows[bad].tolist()}.")
    ids = torch.arange(len(rows)) if clusters is None else torch.as_tensor(clusters)
    if ids.shape != (len(rows),):
        raise ValueError(f"clusters must have one number per row ({len(rows)}), found {tuple(ids.shape)}.")
    _, index = ids.unique(return_inverse=True)
    number = int(index.max()) + 1
    means = rows.mean(0)
    drawn = bootstrap_means(rows, index, number, num_resamples, seed)  # (num_resamples, 3)
    gaps = drawn[:, 2] - drawn[:, 0]
    gap_error = float(gaps.std(correction=0))
    tail = (1 - level) / 2
    ends = (math.floor(tail * (num_resamples - 1)), math.ceil((1 - tail) * (num_resamples - 1)))
    names = ("weak", "weak_to_strong", "ceiling")
    bounds = drawn.sort(0).values[list(ends)].T.tolist()  # (3, 2)
    intervals = None if number < 2 else {name: (low, high) for name, (low, high) in zip(names, bounds, strict=True)}
    low, middle, high = (float(value) for value in means)
    gap = high - low
    if gap <= 0 or gap < DECIDED_AT * gap_error or number < 2:
        reason = (
            "one prompt has no standard error"
            if gap > 0 and number < 2
            else f"ceiling - weak = {gap:.4f} is below {DECIDED_AT:g} standard errors ({gap_error:.4f} each)"
            if gap > 0
            else f"the ceiling ({high:.4f}) is not above the weak model ({low:.4f})"
        )
        return PGREstimate(low, middle, high, gap_error, None, None, reason, intervals)
    gained = drawn[:, 1] - drawn[:, 0]
    shares = torch.where(gaps > 0, gained / gaps, torch.where(gained >= 0, math.inf, -math.inf)).sort().values
    interval = (float(shares[ends[0]]), float(shares[ends[1]]))
    pgr = performance_gap_recovered(low, middle, high, clip=False)
    return PGREstimate(low, middle, high, gap_error, pgr, interval, intervals=intervals)
