"""Ranking losses: from the scores and ratings of the candidates of a prompt to one loss per prompt.

Every loss has the signature ``loss(scores, ratings, mask, *, margin=None, target=None, **loss_kwargs)`` and returns a
tensor `(B,)`. No loss reduces over the batch. A higher rating is better. Candidates may come in any order. The mask is
False for padding. The losses use only the order of the ratings, except [`listnet`], [`pointwise`] and margins that are
taken from the gap of two ratings.

All losses follow these rules. A group with fewer than two real candidates, or with equal ratings only, has a loss of
exactly 0, and a zero gradient if its scores are finite. Masked values change nothing, not even NaN. In a group whose
ratings differ, a NaN score or a rating that is not finite makes the loss of that group NaN, so that a check of the
losses can name the group.

This module does not know where scores come from. It knows nothing of tokens, trainers or configs.
"""

import math

import torch
import torch.nn.functional as F

from trl_ext.losses.properties import RankingLossProperties
from trl_ext.losses.ties import tied_blocks
from trl_ext.registry import Registry


ranking_losses = Registry("ranking loss", "trl_ext.ranking_losses", RankingLossProperties)


def _prepare(
    scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the shapes; return scores and ratings in fp32 or more, with 0 where the mask is False."""
    if scores.dim() != 2 or ratings.shape != scores.shape or mask.shape != scores.shape:
        raise ValueError(
            f"scores, ratings and mask must all have the shape (B, K), found {tuple(scores.shape)}, "
            f"{tuple(ratings.shape)} and {tuple(mask.shape)}."
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool with True for a real candidate, found {mask.dtype}: use `mask.bool()`.")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(~mask, 0.0), ratings.to(scores.dtype).masked_fill(~mask, 0.0), mask


def _per_group(name: str, values: torch.Tensor, scores: torch.Tensor, shapes: list[tuple[int, ...]]) -> torch.Tensor:
    """Check the shape of a margin or target. A wrong shape would broadcast to (B, B) without an error."""
    if tuple(values.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} must have the shape {wanted} for {len(scores)} groups, found {tuple(values.shape)}.")
    return values.to(scores.dtype)


def _refuse(loss: str, **given: torch.Tensor | None) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{loss}` cannot use a {name}: drop the {name} column, or use a loss that can.")


def _pair(
    loss: str, scores: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Better score minus worse and signed gap of the ratings, (B,); ratings and mask of the pair, (B, 2)."""
    scores, ratings, mask = _prepare(scores, ratings, mask)
    if scores.shape[1] < 2:
        scores, ratings, mask = (F.pad(tensor, (0, 2 - scores.shape[1])) for tensor in (scores, ratings, mask))
    elif scores.shape[1] > 2:
        crowded = (mask.sum(-1) > 2).nonzero()
        if crowded.numel():
            group = int(crowded[0])
            raise ValueError(
                f"`{loss}` compares two candidates, found {int(mask[group].sum())} in group {group} of the "
                "batch: use `pairwise` or `plackett_luce`."
            )
        first_two = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :2]
        scores, ratings, mask = (tensor.gather(-1, first_two) for tensor in (scores, ratings, mask))
    gap = ratings[:, 0] - ratings[:, 1]  # (B,)
    delta = scores[:, 0] - scores[:, 1]  # (B,)
    delta = torch.where(gap < 0, -delta, delta)
    return delta, gap, ratings, mask


def _zero_if_undecided(loss: torch.Tensor, ratings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Set the loss to exactly 0 if no two real ratings differ, and to NaN if a real rating is not finite."""
    highest = ratings.masked_fill(~mask, -math.inf).amax(-1)  # (B,)
    lowest = ratings.masked_fill(~mask, math.inf).amin(-1)  # (B,)
    spread = torch.where(mask.any(-1), highest - lowest, 0.0)  # (B,)
    return torch.where(spread > 0, loss, 0.0) + 0.0 * spread


@ranking_losses.register(
    "bradley_terry", uses_distances="margin_from_ratings", max_candidates=2, takes_margin=True, takes_target=True
)
def bradley_terry(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    margin_from_ratings: bool = False,
) -> torch.Tensor:
    r"""
    Negative log likelihood that the better of two candidates wins.

    $$
    L = -\log \sigma(\Delta - m), \qquad L_p = -p \log \sigma(\Delta) - (1 - p) \log \sigma(-\Delta), \qquad
    \Delta = s_{better} - s_{worse}
    $$

    See *Rank Analysis of Incomplete Block Designs* by R. A. Bradley and M. E. Terry (https://doi.org/10.2307/2334029).
    The margin comes from *Llama 2: Open Foundation and Fine-Tuned Chat Models* by H. Touvron et al., equation 2
    (https://huggingface.co/papers/2307.09288).

    Args:
        scores (`torch.Tensor` of shape `(B, K)`):
            Scores of the candidates. `K` may exceed 2 if no group has more than two real candidates.
        ratings (`torch.Tensor` of shape `(B, K)`):
            Ratings, finite, higher is better.
        mask (`torch.BoolTensor` of shape `(B, K)`):
            True for a real candidate.
        margin (`torch.Tensor` of shape `(B,)`, *optional*):
            Margin m >= 0 of each pair. 0 is the same as none.
        target (`torch.Tensor` of shape `(B,)`, *optional*):
            Probability p in [0, 1] that the higher-rated of the two wins. 1 is the same as none.
        margin_from_ratings (`bool`, *optional*, defaults to `False`):
            Use the difference of the two ratings as the margin.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: on a wrong shape, more than two real candidates, two margins, or a margin and a target together.

    Example:

    ```python
    >>> scores, ratings = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> bradley_terry(scores, ratings, torch.ones(1, 2, dtype=torch.bool))
    tensor([0.3133])
    ```
    """
    delta, gap, ratings, mask = _pair("bradley_terry", scores, ratings, mask)
    if margin_from_ratings:
        if margin is not None:
            raise ValueError("Found a margin and `margin_from_ratings=True`: give one or the other.")
        margin = gap.abs()
    if target is not None:
        if margin is not None:
            raise ValueError(
                "Found a margin and a target: it is not defined whether the margin holds for the improbable outcome. "
                "Drop one of the two columns, or set `margin_from_ratings` to False."
            )
        target = _per_group("target", target, delta, [(len(delta),)])
        loss = -target * F.logsigmoid(delta) - (1 - target) * F.logsigmoid(-delta)
    else:
        if margin is not None:
            delta = delta - _per_group("margin", margin, delta, [(len(delta),)])
        loss = -F.logsigmoid(delta)
    return _zero_if_undecided(loss, ratings, mask)


@ranking_losses.register("pairwise", uses_distances="margin_from_ratings", max_candidates=None, takes_margin=True)
def pairwise(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    margin_from_ratings: bool = False,
) -> torch.Tensor:
    r"""
    Mean of the Bradley-Terry loss over all pairs of a prompt whose ratings differ.

    $$
    L = \frac{1}{|P|} \sum_{(i, j) \in P} -\log \sigma(s_i - s_j - m_{ij}), \qquad
    P = \{(i, j) : rating_i > rating_j\}
    $$

    See *Training language models to follow instructions with human feedback* by L. Ouyang et al., equation 1
    (https://huggingface.co/papers/2203.02155). There all ratings of a prompt differ, and |P| is K choose 2. Here the
    sum and the count leave tied pairs out. Every prompt has the same weight, whatever its number of candidates. With
    two candidates the loss equals [`bradley_terry`].

    Args:
        scores, ratings, mask:
            As in [`bradley_terry`].
        margin (`torch.Tensor` of shape `(B,)` or `(B, K, K)`, *optional*):
            Margin >= 0. `(B,)`: one margin for all pairs of a group. `(B, K, K)`: `margin[b, i, j]` is the margin by
            which the better candidate i should beat j.
        target (*optional*):
            Not supported.
        margin_from_ratings (`bool`, *optional*, defaults to `False`):
            Use the difference of the two ratings as the margin of a pair.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: on a wrong shape, a target, or two margins.

    Example:

    ```python
    >>> scores, ratings = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[5.0, 1.0, 1.0]])
    >>> pairwise(scores, ratings, torch.ones(1, 3, dtype=torch.bool))  # the mean of softplus(-2) and softplus(-1)
    tensor([0.2201])
    ```
    """
    _refuse("pairwise", target=target)
    scores, ratings, mask = _prepare(scores, ratings, mask)
    delta = scores[:, :, None] - scores[:, None, :]  # (B, K, K)
    gap = ratings[:, :, None] - ratings[:, None, :]  # (B, K, K)
    decided = (gap > 0) & mask[:, :, None] & mask[:, None, :]  # (B, K, K)
    if margin_from_ratings:
        if margin is not None:
            raise ValueError("Found a margin and `margin_from_ratings=True`: give one or the other.")
        delta = delta - gap
    elif margin is not None:
        groups, width = scores.shape
        margin = _per_group("margin", margin, scores, [(groups,), (groups, width, width)])
        delta = delta - (margin[:, None, None] if margin.dim() == 1 else margin)
    # A tied or padded pair may hold anything. The first mask protects the gradient, the second one the value.
    losses = torch.where(decided, -F.logsigmoid(delta.masked_fill(~decided, 0.0)), 0.0)  # (B, K, K)
    loss = losses.sum((1, 2)) / decided.sum((1, 2)).clamp(min=1)  # (B,)
    return _zero_if_undecided(loss, ratings, mask)


@ranking_losses.register("plackett_luce", uses_distances=False, max_candidates=None)
def plackett_luce(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Negative log probability that an order drawn from the Plackett-Luce model agrees with a ranking that may have ties.

    For a ranking without ties, whose candidates are numbered from the best to the worst, the loss is

    $$
    L = -\sum_{i=1}^{K-1} \log \frac{e^{s_i}}{\sum_{j \ge i} e^{s_j}} .
    $$

    Tied candidates form a block. A block contributes the probability that its members, in any order, come before all
    candidates below them. Let Λ be the sum of exp(s) over the candidates below the block G. The probability is
    exp(sum of s over G) · h(G) with

    $$
    h(\emptyset) = 1, \qquad h(T) = \frac{1}{\Lambda + \sum_{i \in T} e^{s_i}} \sum_{i \in T} h(T \setminus \{i\}) ,
    $$

    computed in log space over the subsets T of the block. The lowest block contributes exactly 0, because it comes
    last in any order. With two candidates the loss equals [`bradley_terry`]. If all places after the k-th are tied, it
    is the top-k Plackett-Luce loss. Blocks of more than 12 candidates use Efron's approximation, minus log |G|! for
    the orders that the tie leaves open; the first such block gives a warning.

    See *The Analysis of Permutations* by R. L. Plackett (https://doi.org/10.2307/2346567), *Listwise approach to
    learning to rank: theory and algorithm* by F. Xia et al. (https://doi.org/10.1145/1390156.1390306) for the loss
    without ties, *Marginal likelihoods based on Cox's regression and life model* by J. D. Kalbfleisch and R. L.
    Prentice (https://doi.org/10.1093/biomet/60.2.267) for the marginal over the orders of a tie, and *The Efficiency
    of Cox's Likelihood Function for Censored Data* by B. Efron (https://doi.org/10.1080/01621459.1977.10480613).

    Args:
        scores, ratings, mask:
            As in [`bradley_terry`]. The loss uses only the order of the ratings; equal ratings are a tie.
        margin, target (*optional*):
            Not supported.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: on a wrong shape, a margin or a target.

    Example:

    ```python
    >>> scores, mask = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    >>> plackett_luce(scores, torch.tensor([[3.0, 2.0, 1.0]]), mask)
    tensor([0.7209])
    >>> plackett_luce(scores, torch.tensor([[2.0, 2.0, 1.0]]), mask)  # either order of the first two
    tensor([0.3540])
    ```
    """
    _refuse("plackett_luce", margin=margin, target=target)
    scores, ratings, mask = _prepare(scores, ratings, mask)
    # Scores relative to the best one of the group: the loss is the same, and large scores keep their digits.
    highest = scores.detach().masked_fill(~mask, torch.finfo(scores.dtype).min).amax(-1, keepdim=True)  # (B, 1)
    scores = (scores - highest).masked_fill(~mask, 0.0)
    # Sort from the worst to the best, with padding last: a running sum then needs no flip and never meets padding.
    sorted_ratings, order = ratings.masked_fill(~mask, math.inf).sort(dim=-1, stable=True)  # (B, K)
    sorted_scores = scores.gather(-1, order)  # (B, K)
    real = torch.arange(scores.shape[1], device=scores.device) < mask.sum(-1, keepdim=True)  # (B, K)
    up_to = sorted_scores.logcumsumexp(-1)  # (B, K): over a candidate and all that are sorted before it
    terms = -F.logsigmoid(sorted_scores[:, 1:] - up_to[:, :-1])  # (B, K-1)

    tied = real[:, 1:] & (sorted_ratings[:, 1:] == sorted_ratings[:, :-1])  # (B, K-1): tied with the one before
    if not tied.any():
        loss = torch.where(real[:, 1:], terms, 0.0).sum(-1)  # (B,)
    else:
        alone = real[:, 1:] & ~tied & ~F.pad(tied[:, 1:], (0, 1))  # (B, K-1)
        loss = torch.where(alone, terms, 0.0).sum(-1) + tied_blocks(sorted_scores, up_to, tied)  # (B,)
    return _zero_if_undecided(loss, ratings, mask)


@ranking_losses.register("listnet", uses_distances=True, max_candidates=None)
def listnet(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    r"""
    Cross entropy between the top-one probabilities of the ratings and the top-one probabilities of the scores.

    $$
    L = -\sum_k \text{softmax}(rating / \tau)_k \, \log \text{softmax}(s)_k
    $$

    See *Learning to Rank: From Pairwise Approach to Listwise Approach* by Z. Cao et al.
    (https://doi.org/10.1145/1273496.1273513), where τ is 1. Its minimum is the entropy of the ratings' distribution,
    not 0.

    Args:
        scores, ratings, mask:
            As in [`bradley_terry`]. The loss uses the size of the ratings.
        margin, target (*optional*):
            Not supported.
        temperature (`float`, *optional*, defaults to `1.0`):
            τ > 0. A small value puts all weight on the best-rated candidate.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: on a wrong shape, a margin, a target, or a temperature that is not above 0.

    Example:

    ```python
    >>> scores, ratings = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    >>> listnet(scores, ratings, torch.ones(1, 2, dtype=torch.bool))
    tensor([0.5822])
    ```
    """
    _refuse("listnet", margin=margin, target=target)
    if not temperature > 0:
        raise ValueError(f"`listnet` needs a temperature above 0, found {temperature}.")
    scores, ratings, mask = _prepare(scores, ratings, mask)
    lowest = torch.finfo(scores.dtype).min  # exp(lowest) is 0; -inf would make the gradient NaN
    log_model = scores.masked_fill(~mask, lowest).log_softmax(-1)  # (B, K)
    wanted = (ratings / temperature).masked_fill(~mask, lowest).softmax(-1)  # (B, K)
    loss = torch.where(mask, -wanted * log_model, 0.0).sum(-1)  # (B,)
    return _zero_if_undecided(loss, ratings, mask)


@ranking_losses.register("pointwise", uses_distances=True, max_candidates=None)
def pointwise(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Mean squared difference of score and rating.

    $$
    L = \frac{1}{K} \sum_k (s_k - rating_k)^2
    $$

    See *Subset Ranking Using Regression* by D. Cossock and T. Zhang (https://doi.org/10.1007/11776420_44). As in all
    losses of this module, a group whose ratings are all equal has the loss 0.

    Args:
        scores, ratings, mask:
            As in [`bradley_terry`]. The scores learn the scale of the ratings.
        margin, target (*optional*):
            Not supported.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: on a wrong shape, a margin or a target.

    Example:

    ```python
    >>> scores, ratings = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    >>> pointwise(scores, ratings, torch.ones(1, 2, dtype=torch.bool))
    tensor([2.5000])
    ```
    """
    _refuse("pointwise", margin=margin, target=target)
    scores, ratings, mask = _prepare(scores, ratings, mask)
    # Scores and ratings are 0 where the mask is False, so their difference is 0 too.
    loss = (scores - ratings).square().sum(-1) / mask.sum(-1).clamp(min=1)  # (B,)
    return _zero_if_undecided(loss, ratings, mask)


def center_rewards(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Penalty on the mean score of a group, so that scores centre on 0: (2 · mean s)², which is (s_1 + s_2)² for a pair.

    See *Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking* by J. Eisenstein et
    al. (https://huggingface.co/papers/2312.09244), which defines it for a pair. The trainer multiplies the penalty by
    a coefficient and adds it to the loss. A group without a real candidate gives 0. Groups with one candidate, and
    groups whose ratings are all tied, are centred like any other.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`):
            Scores of the candidates.
        mask (`torch.BoolTensor` of shape `(B, K)`):
            True for a real candidate.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Example:

    ```python
    >>> center_rewards(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool))
    tensor([9.])
    ```
    """
    scores, _, mask = _prepare(scores, scores, mask)
    return (scores.sum(-1) * (2 / mask.sum(-1).clamp(min=1))).square()
