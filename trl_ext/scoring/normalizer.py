"""The scale of scores: the mean and standard deviation by which a model's, or each ensemble member's, are normalised.

Knows numbers. Knows nothing of models or of where a normaliser is stored.
"""

import math
import statistics
from collections.abc import Sequence


def mean_and_std(scores: Sequence[float | None], whose: str = "the model") -> dict[str, float]:
    """
    `mean` and `std` (of the population) of the scores that there are.

    Args:
        scores (`Sequence[float | None]`): a score a row, `None` where there is none.
        whose (`str`, *optional*): for messages.

    Raises:
        `ValueError`: fewer than two scores, the same score for all, or one that is not finite.

    Example:

    ```python
    >>> mean_and_std([1.0, 3.0, None])
    {'mean': 2.0, 'std': 1.0}
    ```
    """
    found = [score for score in scores if score is not None]
    if not all(map(math.isfinite, found)):
        raise ValueError(
            f"A score by {whose} is minus infinity (`sum_log` of a probability of 0): nothing scales that."
        )
    if len(found) < 2:
        raise ValueError(f"{len(found)} of {len(scores)} rows have a score by {whose}; a normaliser needs at least 2.")
    mean = statistics.fmean(found)
    std = statistics.pstdev(found, mean)
    if std <= 1e-6 * max(1.0, abs(mean)):
        raise ValueError(
            f"The standard deviation of the {len(found)} scores by {whose} is {std:.3g} around {mean:.4g}: there is "
            "nothing to scale by. Give rows of different quality, and check that it was trained."
        )
    return {"mean": mean, "std": std}
