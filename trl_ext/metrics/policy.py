"""Measures of a policy in training: its steps, its repetitions, the trend of its rewards, and how good its critic is.

Pure functions of numbers. They know neither models nor trainers.
"""

import math
from collections.abc import Sequence

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
        return math.nan
    return 1 - ((wanted - real).var(correction=0) / variance).item()


def sums_by_step(rewards: torch.Tensor, given: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The sum and the number of the rewards of first steps, of second steps, and so on.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`).
        given (`torch.BoolTensor` of shape `(N, T)`): where a reward is.
        positions (`int`): P; the last one also counts all later steps.

    Returns:
        Two tensors of shape `(P,)`.

    Example:

    ```python
    >>> sums_by_step(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[True, False, True]]), positions=2)
    (tensor([1., 3.]), tensor([1., 1.]))
    ```
    """
    place = (given.long().cumsum(1) - 1).clamp(0, positions - 1)[given]
    counts = torch.zeros(positions, device=rewards.device).index_add(0, place, torch.ones_like(place).float())
    sums = torch.zeros(positions, device=rewards.device).index_add(0, place, rewards[given].float())
    return sums, counts


def first_low_steps(rewards: torch.Tensor, given: torch.Tensor, low: float, positions: int) -> torch.Tensor:
    """
    How many completions have their first low reward at the first step, at the second, and so on.

    Args:
        rewards, given, positions: as in [`sums_by_step`].
        low (`float`): a reward below it is low.

    Returns:
        `torch.Tensor` of shape `(P + 1,)`; the last number counts the completions with rewards and no low one.
    """
    is_low = given & (rewards < low)
    step = (given.long().cumsum(1) - 1).clamp(0, positions - 1)
    first = torch.where(is_low.any(1), step.gather(1, is_low.long().argmax(1, keepdim=True))[:, 0], positions)
    return torch.bincount(first[given.any(1)], minlength=positions + 1).float()


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """
    The share of runs of `size` tokens that occurred earlier in the same completion; 0 for a shorter completion.

    Example:

    ```python
    >>> repetition([1, 2, 1, 2, 1], size=2)
    0.5
    ```
    """
    runs = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def trend(values: Sequence[float]) -> float:
    """
    The slope of a line through values in order, in standard errors of that slope (a t-value); NaN below four values.

    Example:

    ```python
    >>> round(trend([0.0, 1.1, 1.9, 3.0]), 1)
    23.1
    ```
    """
    if len(values) < 4:
        return math.nan
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(values), dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / x.square().sum()
    error = ((y - slope * x).square().sum() / (len(values) - 2) / x.square().sum()).sqrt()
    if error == 0:
        return 0.0 if slope == 0 else math.copysign(math.inf, slope)
    return (slope / error).item()
