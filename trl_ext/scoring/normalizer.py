"""Normalisers: the mean and standard deviation that bring the scores of a model or an ensemble member to one scale.

This module knows numbers. It knows nothing of models or of where a normaliser is stored.
"""

import math
import statistics
from collections.abc import Sequence


def mean_and_std(scores: Sequence[float | None], whose: str = "the model") -> dict[str, float]:
    """
    The `mean` and (population) `std` of the scores that are not `None`.

    Args:
        scores (`Sequence[float | None]`): one score per row, `None` for a row without a score.
        whose (`str`, *optional*): who gave the scores, for messages.

    Raises:
        `ValueError`: there are fewer than two scores, all scores are equal, or one is not finite.

    Example:

    ```python
    >>> mean_and_std([1.0, 3.0, None])
    {'mean': 2.0, 'std': 1.0}
    ```
    """
    found = [score for score in scores if score is not None]
    if not all(map(math.isfinite, found)):
        raise ValueError(
            f"A score of {whose} is minus infinity (`sum_log` of a probability of 0), which cannot be normalised. "
            "Choose another aggregation."
        )
    if len(found) < 2:
        raise ValueError(f"{len(found)} of {len(scores)} rows have a score of {whose}; a normaliser needs at least 2.")
    mean = statistics.fmean(found)
    std = statistics.pstdev(found, mean)
    if std <= 1e-6 * max(1.0, abs(mean)):
        raise ValueError(
            f"The standard deviation of the {len(found)} scores of {whose} is {std:.3g} around {mean:.4g}, which is "
            "too small to normalise by. Give rows of different quality, and check that the model was trained."
        )
    return {"mean": mean, "std": std}
