"""Losses: pure functions of tensors. They know no model, tokenizer, config or dataset, and reduce no batch.

The letters of every shape comment in this folder:

| letter | counts |
|---|---|
| `B` | groups (prompts) or sequences in the batch |
| `K` | candidates of a group, padded to the widest group |
| `N` | tied blocks, across the groups of the batch |
| `T` | tokens of a sequence, padded to the longest |
| `G` | categories of a token head |
| `C` | outputs of a category: classes, or 1 |

A mask is bool and `True` means real; for token losses, that a label is given. Scores of any float type are taken; the
computation and the result are fp32 (fp64 where the scores are fp64).
"""

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
    "bce",
    "bradley_terry",
    "ce",
    "center_rewards",
    "hinge",
    "listnet",
    "mse",
    "pairwise",
    "plackett_luce",
    "pointwise",
    "ranking_losses",
    "token_losses",
]
