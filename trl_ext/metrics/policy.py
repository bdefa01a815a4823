"""Measures of a policy in training: how good its critic is.

Pure functions of numbers. They know neither models nor trainers.
"""

import torch


def explained_variance(predicted: torch.Tensor, observed: torch.Tensor, mask: torch.Tensor) -> float:
    r"""
    The share of the variance of what happened that was predicted: \\( 1 - Var(R - V) / Var(R) \\).

    Args:
        predicted, observed (`torch.Tensor` of shape `(N, T)`): values, and the returns that followed.
        mask (`torch.BoolTensor` of shape `(N, T)`): where they count.

    Returns:
        `float`: at most 1; 0 for a constant prediction; NaN where the observations do not vary.

    Example:

    ```python
    >>> explained_variance(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[True, True]]))
    0.75
    ```
    """
    real, wanted = predicted[mask].double(), observed[mask].double()
    variance = wanted.var(correction=0) if len(wanted) else torch.tensor(0.0)
    if variance == 0:
        return float("nan")
    return 1 - ((wanted - real).var(correction=0) / variance).item()
