"""The lambda-weighted ranking loss: pairs count by what their order changes in the ranking's gain.

It registers the loss beside those of `ranking`, and follows the same rules. It knows nothing of models or trainers.
"""

import torch
import torch.nn.functional as F

from trl_ext.losses.ranking import _prepare, _refuse, _zero_if_undecided, ranking_losses


@ranking_losses.register("lambda_loss", uses_distances=True, max_candidates=None)
def lambda_loss(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    linear_gain: bool = False,
) -> torch.Tensor:
    r"""
    Sum of the Bradley-Terry loss over all pairs, each weighted by what swapping the two would change.

    $$
    L = -\sum_{(i, j): \psi_i > \psi_j} \Delta_{ij} \log \sigma(s_i - s_j), \qquad
    \Delta_{ij} = |G_i - G_j| \cdot \left| \frac{1}{\log(1 + \tau_i)} - \frac{1}{\log(1 + \tau_j)} \right|
    $$

    with the rating ψ, the gain G = 2^ψ - 1, and the place τ (1 is the best) of a candidate among the scores of its
    group; of candidates with equal scores the worst comes first. The weights have no gradient.

    See *LiPO: Listwise Preference Optimization through Learning-to-Rank* by T.
    Liu et al., LiPO-λ (https://huggingface.co/papers/2402.01878), and *The LambdaLoss Framework for Ranking
    Metric Optimization* by X. Wang et al. (https://doi.org/10.1145/3269206.3271784).

    Args:
        scores, ratings, mask:
            As in [`bradley_terry`]. The gain grows exponentially with a rating: bring ratings to a small
            range such as 0 to 4, or use a linear gain.
        margin, target (*optional*):
            Not supported.
        linear_gain (`bool`, *optional*, defaults to `False`):
            Use G = ψ.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: on a wrong shape, a margin, a target, or a rating above 60 with the exponential gain.

    Example:

    ```python
    >>> scores, ratings = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> lambda_loss(scores, ratings, torch.ones(1, 2, dtype=torch.bool))  # (1/log 2 - 1/log 3) * softplus(1)
    tensor([0.6993])
    ```
    """
    _refuse("lambda_loss", margin=margin, target=target)
    scores, ratings, mask = _prepare(scores, ratings, mask)
    if not linear_gain and ratings.numel() and float(ratings.max()) > 60:
        raise ValueError(
            f"`lambda_loss` found the rating {float(ratings.max()):g}; its gain 2^rating - 1 needs ratings of at most "
            "60. Rescale the ratings, or give loss_kwargs={'linear_gain': True}."
        )
    gains = ratings if linear_gain else torch.exp2(ratings) - 1  # (B, K)
    # of equal scores the worst rating comes first, so that the loss does not depend on the order of the candidates
    by_rating = ratings.argsort(dim=-1)  # (B, K)
    shown = scores.detach().masked_fill(~mask, -torch.inf).gather(1, by_rating)
    order = by_rating.gather(1, shown.argsort(dim=-1, descending=True, stable=True))
    places = order.argsort(dim=-1) + 1  # (B, K)
    discounts = 1 / torch.log1p(places.to(scores.dtype))  # (B, K)
    weights = (gains[:, :, None] - gains[:, None, :]).abs()  # (B, K, K)
    weights = weights * (discounts[:, :, None] - discounts[:, None, :]).abs()
    decided = (ratings[:, :, None] > ratings[:, None, :]) & mask[:, :, None] & mask[:, None, :]  # (B, K, K)
    delta = (scores[:, :, None] - scores[:, None, :]).masked_fill(~decided, 0.0)
    loss = torch.where(decided, -weights * F.logsigmoid(delta), 0.0).sum((1, 2))  # (B,)
    return _zero_if_undecided(loss, ratings, mask)
