"""The probability of a tied block in the Plackett-Luce model, exact by a recursion over subsets, or after Efron.

G is a block of tied candidates, and Λ is the sum of exp(s) over all candidates below it. The probability that the
members of G come first, in any order, is exp(sum of s over G) · h(G), where h(∅) = 1 and h(T) = 1 / (Λ + sum of exp(s)
over T) · sum over i in T of h(T without i).

These functions know sorted scores and which of them are tied. Ratings and masks are handled by [`plackett_luce`] in
`ranking.py`.
"""

import math
import warnings
from functools import cache
from itertools import combinations

import torch
import torch.nn.functional as F


MAX_EXACT_TIES = 12  # 2^12 = 4,096 subsets; larger blocks use Efron's approximation

_warned_of_efron = False


def tied_blocks(scores: torch.Tensor, up_to: torch.Tensor, tied: torch.Tensor) -> torch.Tensor:
    """
    The part of the Plackett-Luce loss that tied blocks contribute. The lowest block contributes nothing.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`):
            Finite scores, sorted from the worst rated to the best, padding last.
        up_to (`torch.Tensor` of shape `(B, K)`):
            `scores.logcumsumexp(-1)`.
        tied (`torch.BoolTensor` of shape `(B, K-1)`):
            True where a real candidate has the rating of the one before it.

    Returns:
        `torch.Tensor` of shape `(B,)`: the sum of -log P(the block, in any order, comes before all below it).
    """
    block = F.pad((~tied).cumsum(-1), (1, 0))  # (B, K): number of the block; each padded place is a block too
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
        shift = torch.maximum(below, members.amax(-1, keepdim=True)).detach()  # only changes the rounding
        block_loss = _exact_block if size <= MAX_EXACT_TIES else _efron_block
        loss = loss.index_add(0, row[:, 0], block_loss(members - shift, below - shift))
    return loss


@cache
@torch.inference_mode(False)  # the cached tensors must also work in training, whoever calls first
def _subsets(size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    For each n = 1..size, two tensors (C, n) about the C subsets of n items.

    The first holds the members of each subset. The second holds, for each member, the index of the subset without it,
    among the subsets of n - 1 items.
    """
    levels, place = [], {(): 0}
    for n in range(1, size + 1):
        subsets = list(combinations(range(size), n))
        without = [[place[subset[:i] + subset[i + 1 :]] for i in range(n)] for subset in subsets]
        levels.append((torch.tensor(subsets, device=device), torch.tensor(without, device=device)))
        place = {subset: index for index, subset in enumerate(subsets)}
    return levels


def _exact_block(members: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """-log P(the members come before all below, in any order), (n,), from members (n, m) and log Λ `below` (n, 1)."""
    log_h = torch.zeros_like(below)  # (n, 1): for the empty set
    for subsets, without in _subsets(members.shape[1], members.device):
        remaining = torch.logaddexp(below, members[:, subsets].logsumexp(-1))  # (n, C)
        log_h = log_h[:, without].logsumexp(-1) - remaining  # (n, C)
    return -members.sum(-1) - log_h[:, 0]


def _efron_block(members: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """[`_exact_block`] after Efron: at the m picks, shares of 1, 1 - 1/m, 1 - 2/m ... of the block still remain."""
    global _warned_of_efron
    size = members.shape[1]
    if not _warned_of_efron:
        _warned_of_efron = True
        warnings.warn(
            f"`plackett_luce` found {size} candidates with the same rating, and it is not the lowest. Ties of up to "
            f"{MAX_EXACT_TIES} are exact; this one is approximated after Efron, which works well if the tied "
            "candidates have similar scores. Use fewer candidates or finer ratings for the exact loss. This warning "
            "is shown once.",
            stacklevel=4,  # the caller of plackett_luce
        )
    shares = torch.arange(size, 0, -1, device=members.device, dtype=members.dtype) / size  # (m,)
    together = members.logsumexp(-1, keepdim=True)  # (n, 1)
    remaining = torch.logaddexp(below, together + shares.log())  # (n, m)
    return remaining.sum(-1) - members.sum(-1) - math.lgamma(size + 1)
