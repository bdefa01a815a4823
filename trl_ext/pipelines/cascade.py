"""Cascades: a small model answers the rows that it is sure of, and a large model answers the rest.

See *Foundations of Large Language Models* by T. Xiao and J. Zhu, section 10.2.5. This module works on numbers: the
confidence of the small model on each row, and the performance of both models. It knows no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CascadePoint:
    """
    A cascade at one threshold.

    Args:
        threshold (`float`): rows with a lower confidence go to the large model.
        deferred (`float`): share of the rows that go to the large model, 0 to 1.
        performance (`float`): mean performance of the cascade.
        cost (`float`): mean cost per row: the small model runs on every row, the large one on deferred rows too.
    """

    threshold: float
    deferred: float
    performance: float
    cost: float


def cascade(
    confidence: Sequence[float],
    small: Sequence[float],
    large: Sequence[float],
    small_cost: float = 0.0,
    large_cost: float = 1.0,
    thresholds: Sequence[float] | None = None,
) -> list[CascadePoint]:
    """
    Compute the curve of a cascade over its threshold.

    Args:
        confidence (sequence of `float`, N): how sure the small model is of each row, e.g. max(p, 1 - p) of a label, a
            reward, or a mean log-probability.
        small, large (sequence of `float`, N): performance of each model on each row.
        small_cost, large_cost (`float`, *optional*): cost of one row, e.g. in seconds or parameters.
        thresholds (sequence of `float`, *optional*): by default every confidence that occurs and a value above them.
            The curve then starts with the small model alone and ends with the large model on all rows.

    Returns:
        `list[CascadePoint]`, by rising threshold.

    Raises:
        ValueError: lengths differ, there are no rows, or a confidence or performance is not a finite number.

    Example:

    >>> [round(point.performance, 2) for point in cascade([0.9, 0.6], small=[1, 0], large=[1, 1])]
    [0.5, 1.0, 1.0]
    """
    sure, weak, strong = (np.asarray(values, dtype=float) for values in (confidence, small, large))
    if not len(sure) or not len(sure) == len(weak) == len(strong):
        raise ValueError(
            f"Found {len(sure)} confidences, and performances for {len(weak)} and {len(strong)} rows. Needed: the "
            "same number, at least one."
        )
    for name, values in (("confidence", sure), ("small", weak), ("large", strong)):
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax())
            raise ValueError(f"{name} of row {row} is {values[row]}. Needed: a finite number.")
    if thresholds is None:
        values = np.unique(sure)
        thresholds = [*values, np.nextafter(values[-1], np.inf)]
    points = []
    for threshold in sorted(thresholds):
        deferred = sure < threshold
        performance = np.where(deferred, strong, weak).mean()
        share = float(deferred.mean())
        points.append(CascadePoint(float(threshold), share, float(performance), small_cost + share * large_cost))
    return points
