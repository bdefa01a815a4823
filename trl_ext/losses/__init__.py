"""Losses: pure functions of tensors. They know no model, tokenizer, config or data set, and do not reduce the batch.

Shape comments in this folder use these letters:

| letter | counts |
|---|---|
| `B` | groups (prompts) or sequences in the batch |
| `K` | candidates of a group, padded to the widest group |
| `N` | tied blocks in all groups of the batch |
| `T` | tokens of a sequence, padded to the longest |
| `G` | categories of a token head |
| `C` | outputs of a category: classes, or 1 |

A mask is bool. `True` means a real candidate, and in token losses a position with a label. Scores may have any float
type. The losses compute and return fp32 (fp64 if the scores are fp64).
"""

from trl_ext.losses.judged_pairs import rao_kupper, robust_bradley_terry
from trl_ext.losses.lambda_loss import lambda_loss
from trl_ext.losses.penalties import batch_sum_to_zero, next_token_loss
from trl_ext.losses.properties import RankingLossProperties, TokenLossProperties
from trl_ext.losses.ranking import (
    bradley_terry,
    center_rewards,
    listnet,
    pairwise,
    plackett_luce,
    pointwise,
    ranking_losses,
)
from trl_ext.losses.token import average, averaging_items, bce, ce, hinge, mse, token_losses


__all__ = [
    "RankingLossProperties",
    "TokenLossProperties",
    "average",
    "averaging_items",
    "batch_sum_to_zero",
    "bce",
    "bradley_terry",
    "ce",
    "center_rewards",
    "hinge",
    "lambda_loss",
    "listnet",
    "mse",
    "next_token_loss",
    "pairwise",
    "plackett_luce",
    "pointwise",
    "ranking_losses",
    "rao_kupper",
    "robust_bradley_terry",
    "token_losses",
]
