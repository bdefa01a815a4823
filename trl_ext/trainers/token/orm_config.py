"""Arguments of [`ORMTrainer`]."""

from dataclasses import dataclass, field
from typing import Literal

from trl_ext.trainers.token.config import TokenRewardConfig


@dataclass
class ORMConfig(TokenRewardConfig):
    r"""
    Configuration of [`ORMTrainer`]: the arguments of [`TokenRewardConfig`], with labels on all tokens by default.

    Args:
        loss_type (`str`, *optional*, defaults to `"bce"`):
            `"bce"`: an output is the log-odds that the completion is right. `"mse"` and `"hinge"` work too.
        label_placement (`str`, *optional*, defaults to `"all"`):
            Label `"all"` tokens of the completion, as in *Training Verifiers to Solve Math Word Problems* by K. Cobbe
            et al. (https://huggingface.co/papers/2110.14168), or only the `"last"` one.
    """

    label_placement: Literal["last", "all"] = field(
        default="all",
        metadata={"help": "Label 'all' tokens of the completion (Cobbe et al.), or only the 'last' one."},
    )
