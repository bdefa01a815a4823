"""The probability of a tied block in the Plackett-Luce model, exact by a recursion over subsets, or after Efron.

For a block G of tied candidates, with Λ the sum of exp(s) over all that is below it, the probability that the members
of G, in any order, come first is exp(sum of s over G) · h(G), where h(∅) = 1 and h(T) = 1 / (Λ + sum of exp(s) over T)
· sum over i in T of h(T without i).

It knows sorted scores and where they are tied; [`plackett_luce`] in `ranking.py` knows ratings and masks.
"""

import math
import warnings
from functools import cache
from itertools import combinations

import torch
import torch.nn.functional as F


MAX_EXACT_TIES = 12  # 2^12 = 4,096 subsets; beyond that Efron's approximation

_warned_of_efron = False


def tied_blocks(scores: torch.Tensor, up_to: torch.Tensor, tied: torch.Tensor) -> torch.Tensor:
    """
    The part of the Plackett-Luce loss that comes from tied blocks other than the lowest.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`):
            Finite scores, sorted from the worst rated to the best, padding last.
        up_to (`torch.Tensor` of shape `(B, K)`):
            `scores.logcumsumexp(-1)`.
        tied (`torch.BoolTensor` of shape `(B, K-1)`):
            True where a real candidate has the rating of the one before it.

    Returns:
        `torch.Tensor` of shape `(B,)`: the sum of -log P(block comes, in any order, before all below it).
    """
    block = F.pad((~tied).cumsum(-1), (1, 0))  # (B, K): number of the block; padding gets blocks of its own
    opens = ~tied & F.pad(tied[:, 1:], (0, 1))  # (B, K-1): first of a tied block that is not the lowest
    rows, firsts = opens.nonzero(as_tuple=True)  # (N,)
    firsts = firsts + 1
    sizes = (block[rows] == block[rows, firsts, None]).sum(-1)  # (N,)
    loss = scores.new_zeros(len(scores))
    for size in sizes.unique().tolist():
        chosen = sizes == size
        row, first = rows[chosen, None], firsts[chosen, None]
        members = scores[row, first + torch.arange(size, device=scores.device)]  # (n, size)
        below = up_to[row, first - 1]  # (n, 1)
        shift = torch.maximum(below, members.amax(-1, keepdim=True)).detach()  # changes nothing but rounding
        block_loss = _exact_block if size <= MAX_EXACT_TIES else _efron_block
        loss = loss.index_add(0, row[:, 0], block_loss(members - shift, below - shift))
    return loss


@cache
@torch.inference_mode(False)  # what is kept must do for training too, whoever asks first
def _subsets(size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For n = 1..size: members (C, n) of the subsets of n items, and where each subset without one member stands."""
    levels, place = [], {(): 0}
    for n in range(1, size + 1):
        subsets = list(combinations(range(size), n))
        without = [[place[subset[:i] + subset[i + 1 :]] for i in range(n)] for subset in subsets]
        levels.append((torch.tensor(subsets, device=device), torch.tensor(without, device=device)))
        place = {subset: index for index, subset in enumerate(subsets)}
    return levels


def _exact_block(members: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """-log P(members (n, m), in any order, come before those below, of log strength (n, 1)): (n,)."""
    log_h = torch.zeros_like(below)  # (n, 1): of the empty set
    for subsets, without in _subsets(members.shape[1], members.device):
        remaining = torch.logaddexp(below, members[:, subsets].logsumexp(-1))  # (n, C)
        log_h = log_h[:, without].logsumexp(-1) - remaining  # (n, C)
    return -members.sum(-1) - log_h[:, 0]


def _efron_block(members: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """[`_exact_block`] after Efron: of the block, a share of 1, 1 - 1/m, 1 - 2/m ... still remains at its m picks."""
    global _warned_of_efron
    size = members.shape[1]
    if not _warned_of_efron:
        _warned_of_efron = True
        warnings.warn(
            f"`plackett_luce` found {size} candidates with one rating above the lowest. Ties of up to "
            f"{MAX_EXACT_TIES} are exact; this one is approximated after Efron, which is good where the scores of the "
            "tied are close. Use fewer candidates or finer ratings for the exact loss. This is said once.",
            stacklevel=4,  # the caller of plackett_luce
        )
    shares = torch.arange(size, 0, -1, device=members.device, dtype=members.dtype) / size  # (m,)
    together = members.logsumexp(-1, keepdim=True)  # (n, 1)
    remaining = torch.logaddexp(below, together + shares.log())  # (n, m)
    return remaining.sum(-1) - members.sum(-1) - math.lgamma(size + 1)
