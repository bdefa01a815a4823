"""What a loss declares about itself, so that a trainer knows which data and which heads it can use.

A loss that declares nothing is read strictly: it gets the defaults below. Nothing here computes anything.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RankingLossProperties:
    """
    What a ranking loss declares about itself. Defaults are the strict reading, which holds for an undeclared loss.

    Args:
        uses_distances (`bool` or `str`, *optional*, defaults to `True`):
            The size of the ratings counts, so that `ranks` cannot be used. A string names the keyword argument of the
            loss that switches this on.
        max_candidates (`int`, *optional*, defaults to `2`):
            The most candidates that a group may have; `None` for any number.
        takes_margin (`bool`, *optional*, defaults to `False`):
            The loss uses `margin`.
        takes_target (`bool`, *optional*, defaults to `False`):
            The loss uses `target`, the probability that the better candidate wins.
    """

    uses_distances: bool | str = True
    max_candidates: int | None = 2
    takes_margin: bool = False
    takes_target: bool = False


@dataclass(frozen=True)
class TokenLossProperties:
    """
    What a token loss declares about itself. Defaults are the strict reading, which holds for an undeclared loss.

    Args:
        outputs (`str`, *optional*, defaults to `"unknown"`):
            What an output is. `"log_odds"`: of *right*, or a logit for each class, so that probabilities can be read
            from it; `"label"`: an estimate of the label; `"sign"`: above 0 is right; `"unknown"`: only that more is
            better.
        labels (`str`, *optional*, defaults to `"any"`):
            Labels that the loss can use, which are checked before training. `"probability"`: in [0, 1], and with three
            outputs -1, 0 or 1; `"sign"`: +1 and -1, or 1 and 0; `"any"`: no check, the loss itself refuses.
    """

    outputs: Literal["log_odds", "label", "sign", "unknown"] = "unknown"
    labels: Literal["probability", "sign", "any"] = "any"


OUTPUT_MEANINGS = {
    "log_odds": "log-odds of right",
    "label": "estimate of the label, higher is better",
    "sign": "above 0 is right, higher is better",
}
"""What an output is, in the words that a checkpoint keeps (`label_meaning`), for a head of one output."""
