"""Step aggregators: from the scores of the steps or segments of one completion to a single number.

Every aggregator takes the scores of one completion, in order, as a list or a 1-D tensor, and returns a `float`. All
steps count: a score of exactly 0 or 1 is a score, and nothing is added to it. A completion without a step has no
score, and the result is `None`, which a TRL reward function may return. A score that is not finite raises an error.

How the number of steps n changes the result, if every step is correct with the same probability p < 1:

| aggregator | n steps | longer is |
|---|---|---|
| `min`, `max`, `mean`, `last` | p | no different (a minimum over more *varied* steps is lower, a maximum higher) |
| `prod` | p ** n | worse: 0.9 becomes 0.35 after 10 steps |
| `sum_log` | n · log p | worse, with the same order as `prod` |
| `sum` | n · p | better |
| `count_correct` | n if p > 0.5, else 0 | better for a policy that the model believes |

So in policy optimisation `prod` and `sum_log` reward few steps, and `sum` and `count_correct` reward many steps,
whatever the steps say. Watch the number of steps as well as the reward.

This module knows numbers. It does not know where scores come from or what a step is, and it does not import torch.
"""

import math
from collections.abc import Callable, Iterable, Mapping

from trl_ext.registry import Registry


aggregators = Registry(kind="step aggregator", group="trl_ext.aggregators")

# The fp32 sum of two class probabilities can exceed 1 by about this much; such a score counts as 1.
ROUNDING = 1e-5


def _finite(scores: Iterable[float]) -> list[float]:
    values = [float(score) for score in scores]
    for step, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(
                f"Step scores must be finite, found {value} for step {step} of {len(values)}. Look for NaN or Inf in "
                "the model's output."
            )
    return values


def _probabilities(name: str, scores: Iterable[float]) -> list[float]:
    values = _finite(scores)
    for step, value in enumerate(values):
        if not 0 <= value <= 1 + ROUNDING:
            raise ValueError(
                f"`{name}` needs probabilities in [0, 1], found {value} for step {step} of {len(values)}. Turn the "
                "raw output of the head into probabilities first, or use `sum`, `mean`, `min`, `max` or `last`."
            )
    return [min(value, 1.0) for value in values]


@aggregators.register("min")
def minimum(scores: Iterable[float]) -> float | None:
    """
    The lowest score: a completion is as good as its worst step.

    Args:
        scores (iterable of `float`):
            One score per step, on any scale.

    Returns:
        `float`, or `None` if there is no step.
    """
    return min(_finite(scores), default=None)


@aggregators.register("max")
def maximum(scores: Iterable[float]) -> float | None:
    """The highest score. Arguments and result as in [`minimum`]."""
    return max(_finite(scores), default=None)


@aggregators.register("last")
def last(scores: Iterable[float]) -> float | None:
    """The score of the last step, where the model has seen all steps. Arguments and result as in [`minimum`]."""
    values = _finite(scores)
    return values[-1] if values else None


@aggregators.register("mean")
def mean(scores: Iterable[float]) -> float | None:
    """The mean score. Arguments and result as in [`minimum`]."""
    values = _finite(scores)
    return math.fsum(values) / len(values) if values else None


@aggregators.register("sum")
def total(scores: Iterable[float]) -> float | None:
    """
    The sum of the scores: the reward of a completion from the rewards of its segments.

    See *Natural Language Processing: Neural Networks and Large Language Models* by T. Xiao and J. Zhu
    (https://github.com/NiuTrans/NLPBook), equation 10.68. Arguments and result as in [`minimum`].
    """
    values = _finite(scores)
    return math.fsum(values) if values else None


@aggregators.register("prod")
def product(scores: Iterable[float]) -> float | None:
    """
    The probability that every step is correct, if errors of steps are independent: the score of a solution in *Let's
    Verify Step by Step* by H. Lightman et al. (https://huggingface.co/papers/2305.20050).

    One step of exactly 0 makes the product 0. A product of some hundreds of small factors underflows to 0; `sum_log`
    does not.

    Args:
        scores (iterable of `float`):
            One probability in [0, 1] per step.

    Returns:
        `float` in [0, 1], or `None` if there is no step.

    Raises:
        ValueError: a score is outside [0, 1].
    """
    values = _probabilities("prod", scores)
    return math.prod(values) if values else None


@aggregators.register("sum_log")
def sum_log(scores: Iterable[float]) -> float | None:
    r"""
    The log probability that every step is correct, if errors of steps are independent.

    $$
    r = \sum_k \log P(correct \mid x, y_{\le k})
    $$

    See *Natural Language Processing: Neural Networks and Large Language Models* by T. Xiao and J. Zhu
    (https://github.com/NiuTrans/NLPBook), equation 10.84. It is the logarithm of [`product`]. A step of exactly 0
    makes it minus infinity, which is correct; but a group of rewards with one such member has no mean, so policy
    optimisation cannot use it. A model in fp32 gives exactly 0 only for log-odds below about -100.

    Args:
        scores (iterable of `float`):
            One probability in [0, 1] per step, not a logarithm.

    Returns:
        `float` of at most 0, or `None` if there is no step.

    Raises:
        ValueError: a score is outside [0, 1].
    """
    values = _probabilities("sum_log", scores)
    return math.fsum(math.log(value) if value > 0 else -math.inf for value in values) if values else None


@aggregators.register("count_correct")
def count_correct(scores: Iterable[float], *, threshold: float = 0.5) -> float | None:
    r"""
    The number of steps that are classified as correct.

    $$
    r = \sum_k \delta(correct, C(x, y_{\le k}))
    $$

    See *Natural Language Processing: Neural Networks and Large Language Models* by T. Xiao and J. Zhu
    (https://github.com/NiuTrans/NLPBook), equation 10.83. C is the likelier class; with two classes a step is correct
    if its probability is above one half.

    Args:
        scores (iterable of `float`):
            One score per step. The default threshold is meant for probabilities; a scorer takes 0 for margins
            (`loss_type="hinge"`).
        threshold (`float`, *optional*, defaults to `0.5`):
            A step counts if its score is above the threshold; a score equal to it does not count.

    Returns:
        `float`, a whole number, or `None` if there is no step.
    """
    values = _finite(scores)
    return float(sum(value > threshold for value in values)) if values else None


def weighted_categories(
    segments: Iterable[Mapping[str, float]],
    weights: Mapping[str, float] | None = None,
    within: str | Callable[[list[float]], float | None] = "sum",
) -> float | None:
    r"""
    One number from segments that have scores in several categories.

    $$
    r = \sum_d w_d \sum_{k : d \in k} r_d(x, y, y_k)
    $$

    It is the sum over segments of equation 10.68 (see [`total`]) with a weight per category, as in equation 1 of
    *Fine-Grained Human Feedback Gives Better Rewards for Language Model Training* by Z. Wu et al.
    (https://huggingface.co/papers/2306.01693). Categories may differ in granularity, so a segment need not have a
    score in every category. Without weights and with one category it is [`total`].

    Args:
        segments (iterable of `Mapping[str, float]`):
            The scores of each segment of a completion, by category.
        weights (`Mapping[str, float]`, *optional*):
            Finite weight of each category, used as it is (not normalised). Defaults to 1 for all.
        within (`str` or `Callable`, *optional*, defaults to `"sum"`):
            Aggregator of the segments of one category. `"sum"` grows with their number; `"mean"` does not.

    Returns:
        `float`, or `None` if no segment has a score. A category without a segment in the completion adds nothing.

    Raises:
        ValueError: a category has no weight, or a weight is not finite.

    Example:

    ```python
    >>> segments = [{"relevance": 1.0, "factuality": -1.0}, {"relevance": 0.5}]
    >>> weighted_categories(segments, {"relevance": 0.5, "factuality": 0.25})  # 0.5 * 1.5 - 0.25 * 1.0
    0.5
    ```
    """
    by_category: dict[str, list[float]] = {}
    for segment in segments:
        for category, score in segment.items():
            by_category.setdefault(category, []).append(score)
    if weights is None:
        weights = dict.fromkeys(by_category, 1.0)
    unknown = sorted(by_category.keys() - weights.keys())
    if unknown:
        raise ValueError(
            f"Found scores in the categories {unknown}, which have no weight (there are weights for "
            f"{sorted(weights)}). Add a weight for each; 0 ignores a category."
        )
    endless = {category: weight for category, weight in weights.items() if not math.isfinite(weight)}
    if endless:
        raise ValueError(f"Category weights must be finite, found {endless}.")
    aggregate = aggregators.get(within)
    parts = [weights[category] * aggregate(scores) for category, scores in sorted(by_category.items())]
    return math.fsum(parts) if parts else None
