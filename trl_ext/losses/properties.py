"""The properties that a loss declares: they tell a trainer which data and which heads the loss can use.

A loss that declares nothing gets the strict defaults below. This module computes nothing.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RankingLossProperties:
    """
    The declared properties of a ranking loss. The defaults are strict and hold for a loss that declares nothing.

    Args:
        uses_distances (`bool` or `str`, *optional*, defaults to `True`):
            The loss uses the size of the ratings, not only their order, so it cannot use `ranks`. A string names the
            keyword argument of the loss that switches this on.
        max_candidates (`int`, *optional*, defaults to `2`):
            The largest number of candidates in a group. `None` means any number.
        takes_margin (`bool`, *optional*, defaults to `False`):
            The loss uses `margin`.
        takes_target (`bool`, *optional*, defaults to `False`):
            The loss uses `target`, the probability that the better candidate wins.
        learns_from_ties (`bool`, *optional*, defaults to `False`):
            A tie is an observation of its own, so the ratings of a pair say whether it is one.
    """

    uses_distances: bool | str = True
    max_candidates: int | None = 2
    takes_margin: bool = False
    takes_target: bool = False
    learns_from_ties: bool = False

    def needs_ratings(self, arguments: dict[str, Any]) -> bool:
        """Whether the loss uses the size of the ratings with these keyword arguments."""
        if not isinstance(self.uses_distances, str):
            return self.uses_distances
        value = arguments.get(self.uses_distances)
        return value is not None and value is not False  # a threshold of 0 is on


@dataclass(frozen=True)
class TokenLossProperties:
    """
    The declared properties of a token loss. The defaults are strict and hold for a loss that declares nothing.

    Args:
        outputs (`str`, *optional*, defaults to `"unknown"`):
            What an output means. `"log_odds"`: the log-odds of *right*, or one logit for each class, so that
            probabilities can be read from it. `"label"`: an estimate of the label. `"sign"`: a value above 0 means
            right. `"unknown"`: only that a higher value is better.
        labels (`str`, *optional*, defaults to `"any"`):
            The labels that the loss can use. The trainer checks them before training. `"probability"`: in [0, 1], or
            with three outputs -1, 0 or 1. `"sign"`: +1 and -1, or 1 and 0. `"any"`: the trainer checks nothing, and
            the loss itself raises an error.
    """

    outputs: Literal["log_odds", "label", "sign", "unknown"] = "unknown"
    labels: Literal["probability", "sign", "any"] = "any"


OUTPUT_MEANINGS = {
    "log_odds": "log-odds of right",
    "label": "estimate of the label, higher is better",
    "sign": "above 0 is right, higher is better",
}
"""What the output of a head with one output means. A checkpoint keeps these words as `label_meaning`."""
