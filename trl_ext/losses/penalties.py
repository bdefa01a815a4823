"""Penalties that a trainer adds to its loss for whole batches. They know scores and masks, and no model or trainer."""

import torch


def batch_sum_to_zero(scores: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    The squared mean of all scores of a batch, so that its rewards sum to about zero.

    $$
    P = \left( \frac{\sum_{b, k} w_b \, s_{bk}}{\sum_{b, k} w_b} \right)^2
    $$

    See *On the Robustness of Reward Models for Language Model Alignment* by J. Hong et al.
    (https://huggingface.co/papers/2505.07271). [`~trl_ext.losses.center_rewards`] centres every group instead. For one
    pair in the batch P is a quarter of its penalty.

    Args:
        scores (`torch.Tensor` of shape `(..., B, K)`): scores of the candidates; each leading index is a batch.
        mask (`torch.BoolTensor` of shape `(..., B, K)`): True for a real candidate.
        weights (`torch.Tensor` of shape `(..., B)`, *optional*): how often each group counts. Defaults to once.

    Returns:
        `torch.Tensor` of shape `(...)`: 0 for a batch without candidates.

    Example:

    ```python
    >>> batch_sum_to_zero(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(4.)
    ```
    """
    counted = mask.to(torch.promote_types(scores.dtype, torch.float32))
    if weights is not None:
        counted = counted * weights[..., None]
    total = counted.sum((-2, -1))
    summed = (scores.to(counted.dtype).masked_fill(~mask, 0.0) * counted).sum((-2, -1))
    return (summed / total.masked_fill(total == 0, 1.0)).square()
