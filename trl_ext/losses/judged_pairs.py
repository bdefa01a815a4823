"""Ranking losses that model how people judge pairs: they call ties, and they err.

Both register beside the losses of `ranking`, and follow the same rules, with one exception: in [`rao_kupper`] a tie is
an observation, so groups whose ratings are all equal have a loss too. Knows nothing of models or trainers.
"""

import math

import torch
import torch.nn.functional as F

from trl_ext.losses.ranking import _pair, _prepare, _refuse, _zero_if_undecided, ranking_losses


@ranking_losses.register("rao_kupper", uses_distances="good_from", max_candidates=None, learns_from_ties=True)
def rao_kupper(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    theta: float = 3.0,
    good_from: float | None = None,
) -> torch.Tensor:
    r"""
    Mean over all pairs of a group of the negative log likelihood of their judgement: one wins, or they tie.

    $$
    P(i \succ j) = \sigma(\Delta - \eta), \qquad
    P(i \sim j) = (\theta^2 - 1) \, \sigma(\Delta - \eta) \, \sigma(-\Delta - \eta), \qquad
    \Delta = s_i - s_j, \quad \eta = \log \theta
    $$

    See *Ties in Paired-Comparison Experiments: A Generalization of the Bradley-Terry Model* by P. V. Rao and L. L.
    Kupper (https://doi.org/10.1080/01621459.1967.10482901), and for reward models *Reward Learning From Preference
    With Ties* by J. Liu et al. (https://huggingface.co/papers/2410.05328). The three probabilities sum to 1. As θ
    approaches 1, pairs without ties give [`bradley_terry`].

    With `good_from` the loss also has the mean over the candidates of -log σ(s) for a good one and -log σ(-s) for a
    bad one, the loss of an outcome reward model. So a pair that is "both good" or "both bad" (tied ratings on one side
    of `good_from`) moves both scores, and 0 becomes the threshold of a good completion. The sum of the two is ours.

    Args:
        scores, ratings, mask:
            As in [`bradley_terry`], for any number of candidates. Equal ratings are a tie.
        margin, target (*optional*):
            Not supported.
        theta (`float`, *optional*, defaults to `3.0`):
            θ > 1. Candidates with equal scores tie with the probability (θ - 1) / (θ + 1): one half for 3.
        good_from (`float`, *optional*):
            Candidates with this rating or a higher one are good. By default nothing is said about single candidates.

    Returns:
        `torch.Tensor` of shape `(B,)`: 0 for a group with fewer than two candidates, if `good_from` is not given.

    Raises:
        ValueError: on a wrong shape, a margin, a target, or a theta of 1 or less.

    Example:

    ```python
    >>> scores, ratings = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    >>> rao_kupper(scores, ratings, torch.ones(1, 2, dtype=torch.bool))  # -log(8 / 4 / 4)
    tensor([0.6931])
    ```
    """
    _refuse("rao_kupper", margin=margin, target=target)
    if not theta > 1:
        raise ValueError(f"theta={theta}; needed: a number above 1, as ties have the probability 0 at 1.")
    scores, ratings, mask = _prepare(scores, ratings, mask)
    eta = math.log(theta)
    gap = ratings[:, :, None] - ratings[:, None, :]  # (B, K, K)
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(1)  # (B, K, K)
    delta = (scores[:, :, None] - scores[:, None, :]).masked_fill(~pairs, 0.0)
    delta = torch.where(gap < 0, -delta, delta)
    won = F.logsigmoid(delta - eta)
    tied = won + F.logsigmoid(-delta - eta) + math.log(theta**2 - 1)
    likelihood = torch.where(gap == 0, tied, won).masked_fill(~pairs, 0.0)
    loss = -likelihood.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)  # (B,)
    if good_from is not None:
        single = F.logsigmoid(torch.where(ratings >= good_from, scores, -scores)).masked_fill(~mask, 0.0)
        loss = loss - single.sum(1) / mask.sum(1).clamp(min=1)
    return loss + 0.0 * ratings.sum(1)  # NaN where a rating is not finite


@ranking_losses.register("robust_bradley_terry", uses_distances=False, max_candidates=2)
def robust_bradley_terry(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    flip_probability: float = 0.05,
) -> torch.Tensor:
    r"""
    Negative log likelihood of a pair whose label is the wrong way round with a known probability e.

    $$
    L = -\log\left((1 - e) \, \sigma(\Delta) + e \, \sigma(-\Delta)\right), \qquad \Delta = s_{better} - s_{worse}
    $$

    See *Deep Reinforcement Learning from Human Preferences* by P. Christiano et al., section 2.2.3
    (https://huggingface.co/papers/1706.03741): people who answer at random in 10 % of the cases give e = 0.05. The
    loss of a pair is at most -log e, and its gradient fades out where the scores contradict the label. e = 0 is
    [`bradley_terry`].

    Args:
        scores, ratings, mask:
            As in [`bradley_terry`].
        margin, target (*optional*):
            Not supported.
        flip_probability (`float`, *optional*, defaults to `0.05`):
            e, from 0 to below 0.5.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: on a wrong shape, more than two real candidates, a margin, a target, or an e out of its range.

    Example:

    ```python
    >>> scores, ratings = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> robust_bradley_terry(scores, ratings, torch.ones(1, 2, dtype=torch.bool))  # bradley_terry: 0.3133
    tensor([0.3454])
    ```
    """
    _refuse("robust_bradley_terry", margin=margin, target=target)
    if not 0 <= flip_probability < 0.5:
        raise ValueError(f"flip_probability={flip_probability}; needed: a number from 0 to below 0.5.")
    delta, _, ratings, mask = _pair("robust_bradley_terry", scores, ratings, mask)
    right = F.logsigmoid(delta) + math.log1p(-flip_probability)  # (B,)
    if flip_probability > 0:
        right = torch.logaddexp(right, F.logsigmoid(-delta) + math.log(flip_probability))
    return _zero_if_undecided(-right, ratings, mask)
