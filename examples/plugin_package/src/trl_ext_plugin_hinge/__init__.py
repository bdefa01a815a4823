"""The hinge loss of the ranking SVM, as a ranking loss of tensors. trl-ext finds it through an entry point."""

import torch

from trl_ext.losses import ranking_losses


__all__ = ["hinge"]


# The properties tell the trainer which data the loss accepts. A property that you leave out gets the most restrictive
# value: the loss uses the distances of the ratings, compares two candidates, and uses neither a margin nor a target.
@ranking_losses.declare(uses_distances=False, max_candidates=None, takes_margin=True, takes_target=False)
def hinge(
    scores: torch.Tensor,
    ratings: torch.Tensor,
    mask: torch.Tensor,
    *,
    margin: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    width: float = 1.0,
) -> torch.Tensor:
    r"""
    Mean hinge loss over all pairs of a prompt whose ratings differ.

    $$
    L = \frac{1}{|P|} \sum_{(i, j) \in P} \max(0, w + m - (s_i - s_j)), \qquad P = \{(i, j) : rating_i > rating_j\}
    $$

    See *Large Margin Rank Boundaries for Ordinal Regression* by R. Herbrich, T. Graepel and K. Obermayer
    (https://doi.org/10.7551/mitpress/1113.003.0010) and *Optimizing Search Engines using Clickthrough Data* by
    T. Joachims (https://doi.org/10.1145/775047.775067), which sum over pairs and have w = 1 and no m.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`):
            Scores of the candidates.
        ratings (`torch.Tensor` of shape `(B, K)`):
            Ratings, higher is better; only their order counts.
        mask (`torch.BoolTensor` of shape `(B, K)`):
            True for a real candidate.
        margin (`torch.Tensor` of shape `(B,)`, *optional*):
            Margin m >= 0 of the group, on top of the width. 0 is the same as none.
        target (*optional*):
            Not supported.
        width (`float`, *optional*, defaults to `1.0`):
            Difference w > 0 of two scores at which the loss of a pair becomes 0.

    Returns:
        `torch.Tensor` of shape `(B,)`: the loss of each group; 0 for a group without a decided pair.

    Raises:
        ValueError: if a target is given, the width is not above 0, or the margin has another shape.

    Example:

    ```python
    >>> scores, ratings = torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> hinge(scores, ratings, torch.ones(1, 2, dtype=torch.bool))
    tensor([0.5000])
    ```
    """
    if target is not None:
        raise ValueError("`hinge` cannot use a target: drop the target column, or use `bradley_terry`.")
    if not width > 0:
        raise ValueError(f"`hinge` needs a width above 0, found {width}.")
    scores = scores.float().masked_fill(~mask, 0.0)
    wanted = scores.new_full((len(scores),), width)  # (B,)
    if margin is not None:
        if margin.shape != wanted.shape:
            raise ValueError(f"margin must have the shape {tuple(wanted.shape)}, found {tuple(margin.shape)}.")
        wanted = wanted + margin.float()
    delta = scores[:, :, None] - scores[:, None, :]  # (B, K, K)
    decided = (ratings[:, :, None] > ratings[:, None, :]) & mask[:, :, None] & mask[:, None, :]  # (B, K, K)
    losses = torch.where(decided, (wanted[:, None, None] - delta).clamp(min=0.0), 0.0)  # (B, K, K)
    return losses.sum((1, 2)) / decided.sum((1, 2)).clamp(min=1)
