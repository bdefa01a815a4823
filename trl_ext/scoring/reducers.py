"""Ensemble reducers: combine the scores that M members give a row into a single number.

Every reducer takes the scores of N rows as a fp64 tensor of shape (N, M) and returns (N,). A reducer that needs a
number per member takes it as `weights`, of shape (M,); other arguments are keywords. If a member has no score for a
row, the reducer gets that row without the member and without its weight (see [`combine`]).

**Variance and standard deviation are those of the population of members (divided by M, not M - 1)**, here and in every
disagreement that trl_ext reports: the members are the whole population, and one member alone has the deviation 0.

This module does not know where scores come from, or whether they were normalised.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_ext.metrics.disagreement import member_disagreement
from trl_ext.registry import Registry


reducers = Registry(kind="ensemble reducer", group="trl_ext.reducers")


def takes_weights(reducer: Callable) -> bool:
    """Whether a reducer has the argument `weights`."""
    return "weights" in inspect.signature(reducer).parameters


def disagreement(scores: torch.Tensor) -> torch.Tensor:
    """
    The population standard deviation of the members' scores of each row.

    Args:
        scores (`torch.Tensor` of shape `(N, M)`): scores of the members, on one scale.

    Returns:
        `torch.Tensor` of shape `(N,)`, 0 for one member.
    """
    return member_disagreement(scores.T)


def combine(
    scores: torch.Tensor, reducer: Callable, weights: Sequence[float] | None = None, **reduce_kwargs: Any
) -> torch.Tensor:
    """
    Combine the scores of the members that have one, to one score per row.

    Args:
        scores (`torch.Tensor` of shape `(N, M)`): scores of the members, NaN where a member has none.
        reducer (`Callable`): a reducer as this module describes it.
        weights (`Sequence[float]`, *optional*): one for each of the M members, for a reducer that takes weights.
        **reduce_kwargs: other arguments of the reducer.

    Returns:
        `torch.Tensor` of shape `(N,)`, fp64, NaN where no member has a score.

    Raises:
        `ValueError`: the reducer returns another shape, or a number that is not finite.
    """
    scores = scores.double()
    present = ~scores.isnan()  # (N, M)
    results = torch.full((len(scores),), torch.nan, dtype=torch.float64)
    for pattern in present.unique(dim=0):  # (M,)
        if not pattern.any():
            continue
        rows = (present == pattern).all(dim=1)  # (N,)
        own = {} if weights is None else {"weights": torch.tensor(weights, dtype=torch.float64)[pattern]}
        found = reducer(scores[rows][:, pattern], **own, **reduce_kwargs)
        if found.shape != (int(rows.sum()),):
            raise ValueError(
                f"The reducer {reducer.__name__} returned the shape {tuple(found.shape)} for {int(rows.sum())} rows; "
                "needed: one number per row, shape (N,)."
            )
        if not found.isfinite().all():
            raise ValueError(f"The reducer {reducer.__name__} returned a number that is not finite for finite scores.")
        results[rows] = found.double()
    return results


@reducers.register("mean")
def mean(scores: torch.Tensor) -> torch.Tensor:
    """
    The mean of the members: the usual ensemble. It averages out the errors that members do not share.

    Args:
        scores (`torch.Tensor` of shape `(N, M)`): scores of the members.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    return scores.mean(dim=1)


@reducers.register("weighted")
def weighted(scores: torch.Tensor, *, weights: torch.Tensor) -> torch.Tensor:
    r"""
    The weighted sum of the members.

    $$
    r = \sum_m w_m r_m
    $$

    See *Natural Language Processing: Neural Networks and Large Language Models* by T. Xiao and J. Zhu
    (https://github.com/NiuTrans/NLPBook), equation 10.72. Use it for members that judge different aspects (factuality,
    completeness ...). Weights are used as they are, and may be negative (a cost). If all are 1 / M it is [`mean`]. A
    member without a score for a row adds nothing to that row, as with the `reward_funcs` of TRL's trainers.

    Args:
        scores (`torch.Tensor` of shape `(N, M)`): scores of the members.
        weights (`torch.Tensor` of shape `(M,)`): weight of each member.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    return (scores * weights).sum(dim=1)


@reducers.register("min")
def minimum(scores: torch.Tensor) -> torch.Tensor:
    """
    The lowest member: worst-case optimisation (WCO) of *Reward Model Ensembles Help Mitigate Overoptimization* by
    T. Coste et al. (https://huggingface.co/papers/2310.02743).

    A policy gains only from changes that all members prefer. The members must be on one scale; else the lowest is
    always the same member. Arguments and result as in [`mean`].
    """
    return scores.amin(dim=1)


@reducers.register("median")
def median(scores: torch.Tensor) -> torch.Tensor:
    """
    The median of the members; for an even number it is the mean of the middle two. One member that is far off does not
    change it. Arguments and result as in [`mean`].
    """
    ordered = scores.sort(dim=1).values
    size = scores.shape[1]
    return (ordered[:, (size - 1) // 2] + ordered[:, size // 2]) / 2


@reducers.register("mean_minus_std")
def mean_minus_std(scores: torch.Tensor, *, coefficient: float = 1.0) -> torch.Tensor:
    r"""
    The mean minus the disagreement: a lower confidence bound.

    $$
    r = \bar r - c \sqrt{\frac{1}{M} \sum_m (r_m - \bar r)^2}
    $$

    Both terms are on the scale of the scores, unlike in [`mean_minus_var`].

    Args:
        scores (`torch.Tensor` of shape `(N, M)`): scores of the members.
        coefficient (`float`, *optional*, defaults to `1.0`): c, at least 0. The default is our choice.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Example:

    ```python
    >>> mean_minus_std(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    tensor([1., 2.])
    ```
    """
    return scores.mean(dim=1) - _not_negative(coefficient) * disagreement(scores)


@reducers.register("mean_minus_var")
def mean_minus_var(scores: torch.Tensor, *, coefficient: float = 0.5) -> torch.Tensor:
    r"""
    The mean minus the variance of the members: uncertainty-weighted optimisation (UWO) of *Reward Model Ensembles Help
    Mitigate Overoptimization* by T. Coste et al. (https://huggingface.co/papers/2310.02743).

    $$
    r = \bar r - \lambda \frac{1}{M} \sum_m (r_m - \bar r)^2
    $$

    Args:
        scores (`torch.Tensor` of shape `(N, M)`): scores of the members.
        coefficient (`float`, *optional*, defaults to `0.5`):
            The paper's lambda, at least 0. Its effect depends on the scale of the scores. The default is our choice
            for normalised members.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    return scores.mean(dim=1) - _not_negative(coefficient) * scores.var(dim=1, correction=0)


@reducers.register("fusion")
def fusion(scores: torch.Tensor, *, weights: torch.Tensor) -> torch.Tensor:
    """
    A learned combiner: [`weighted`] with the weights of [`~trl_ext.scoring.fusion.fit_fusion_weights`].

    The difference of two results is the log-odds that the first text is preferred. Arguments and result as in
    [`weighted`].
    """
    return weighted(scores, weights=weights)


def _not_negative(coefficient: float) -> float:
    if not coefficient >= 0:
        raise ValueError(
            f"coefficient={coefficient}; needed: a number >= 0. A negative one would reward disagreement."
        )
    return coefficient
