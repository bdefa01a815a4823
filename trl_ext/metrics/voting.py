r"""Several answers to one question: votes, and metrics of the best of k samples.

The functions take lists and use plain Python and torch. This module knows nothing of models or of how answers are read
from texts. All curves use every sample: the value at k is the exact expectation over all subsets of k of n samples.
"""

import math
from collections.abc import Hashable, Sequence

import torch

from trl_ext.metrics.bootstrap import bootstrap_means, group_numbers


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
    """
    Return the most frequent answer; among equally frequent ones, the one that appears first.

    See *Self-Consistency Improves Chain of Thought Reasoning in Language Models* by Wang et al.
    (https://huggingface.co/papers/2203.11171).

    Args:
        answers (`Sequence[Hashable or None]`):
            Answers in a form in which equal answers compare equal. `None` (no answer found) does not vote.

    Returns:
        `Hashable` or `None`: the answer, or `None` if nobody voted.

    Example:

    >>> majority_vote(["4", "5", None, "5"])
    '5'
    """
    return weighted_vote(answers, [1.0] * len(answers))


def weighted_vote(answers: Sequence[Hashable | None], weights: Sequence[float | None]) -> Hashable | None:
    """
    Return the answer with the largest sum of weights; among equal sums, the one that appears first.

    See *Solving math word problems with process- and outcome-based feedback* by Uesato et al.
    (https://huggingface.co/papers/2211.14275).

    Args:
        answers (`Sequence[Hashable or None]`):
            As in [`majority_vote`].
        weights (`Sequence[float or None]`):
            A weight of at least 0 for each answer, e.g. a verifier's probability. `None` or NaN means no vote.

    Returns:
        `Hashable` or `None`: the answer, or `None` if nobody voted.

    Raises:
        ValueError: the numbers of weights and answers differ, or a weight is negative. (A frequent answer with
            negative weights would lose because it is frequent.)

    Example:

    >>> weighted_vote(["4", "5", "5"], [0.9, 0.3, 0.4])
    '4'
    """
    if len(answers) != len(weights):
        raise ValueError(f"found {len(answers)} answers and {len(weights)} weights; needed: a weight for each answer")
    sums: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is None or weight is None or math.isnan(weight):
            continue
        if weight < 0:
            raise ValueError(
                f"the weight {weight} is negative; needed: 0 or more. Turn scores into probabilities or exponentials "
                "first."
            )
        sums[answer] = sums.get(answer, 0.0) + weight
    return max(sums, key=sums.__getitem__) if sums else None


def pass_at_k(n: int, c: int, k: int) -> float:
    r"""
    Return the chance that at least one of `k` samples is right, given `n` samples of which `c` are right.

    $$ 1 - \binom{n - c}{k} / \binom{n}{k} $$

    See *Evaluating Large Language Models Trained on Code* by Chen et al. (https://huggingface.co/papers/2107.03374):
    this estimator is unbiased, `1 - (1 - c/n)^k` is not.

    Args:
        n (`int`): Samples.
        c (`int`): Right ones, from 0 to `n`.
        k (`int`): From 1 to `n`.

    Example:

    >>> pass_at_k(n=4, c=1, k=2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"found n={n}, c={c}, k={k}; needed: 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def best_of_k(values: Sequence[float], scores: Sequence[float], k: int) -> float:
    r"""
    Return the mean value of the highest-scored of `k` samples, drawn without replacement from all n.

    With distinct scores it is \\( \sum_r v_r \binom{n - r}{k - 1} / \binom{n}{k} \\) over the ranks \\( r \\) by score
    (1 = highest). Samples with equal scores share the weights of their ranks. With `values` as `scores` this is the
    oracle; for values of 0 and 1 the oracle equals [`pass_at_k`]. `k=1` gives the mean of `values`.

    Args:
        values (`Sequence[float]`):
            True value of each sample: 0 or 1 from a verifier, or a gold reward.
        scores (`Sequence[float]`):
            Scores that decide which sample is best; higher is better.
        k (`int`):
            Number of samples, from 1 to n.

    Example:

    >>> best_of_k([0.0, 1.0, 1.0], [3.0, 2.0, 1.0], k=2)
    0.3333333333333333
    """
    values, scores = list(values), list(scores)  # a pandas Series is indexed by label, not by place
    n = len(values)
    if len(scores) != n:
        raise ValueError(f"found {n} values and {len(scores)} scores; needed: a score for each value")
    if not 1 <= k <= n:
        raise ValueError(f"cannot draw k={k} of {n} samples; needed: a number from 1 to {n}")
    if any(math.isnan(score) for score in scores):
        raise ValueError("a score is NaN, which has no rank; needed: numbers. Leave out samples without a score.")
    order = sorted(range(n), key=lambda index: -scores[index])
    expected, start = 0.0, 0
    while start < n:
        end = start
        while end < n and scores[order[end]] == scores[order[start]]:
            end += 1
        weight = sum(math.comb(n - 1 - rank, k - 1) for rank in range(start, end)) / math.comb(n, k)
        expected += weight * math.fsum(values[index] for index in order[start:end]) / (end - start)
        start = end
    return expected


def best_of_k_curve(
    values: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], ks: Sequence[int] | None = None
) -> dict[int, float]:
    """
    Return the mean of [`best_of_k`] over questions, for several k.

    Args:
        values, scores (`Sequence[Sequence[float]]`):
            For each question, one number per sample.
        ks (`Sequence[int]`, *optional*):
            By default the powers of two up to the smallest number of samples of any question.

    Returns:
        `dict[int, float]`: the mean for each k.
    """
    values, scores = list(values), list(scores)
    if not values:
        raise ValueError("found no questions; needed: at least one")
    fewest = min(len(row) for row in values)
    if not fewest:
        raise ValueError("found a question without samples; needed: at least one. Leave such questions out.")
    if ks is None:
        ks = [2**power for power in range(fewest.bit_length()) if 2**power <= fewest]
    pairs = list(zip(values, scores, strict=True))
    return {k: math.fsum(best_of_k(value, score, k) for value, score in pairs) / len(pairs) for k in ks}


def kl_bound(n: int) -> float:
    r"""
    Return an upper bound on the KL of best-of-`n` from the policy: \\( KL \le \log n - (n - 1) / n \\), in nats.

    See *Theoretical guarantees on the best-of-n alignment policy* by Beirami et al.
    (https://huggingface.co/papers/2401.01879): it is exact only if no two samples are equal.

    Example:

    >>> round(kl_bound(16), 4)
    1.8351
    """
    if n < 1:
        raise ValueError(f"n={n}; needed: 1 or more samples")
    return math.log(n) - (n - 1) / n


def bootstrap_interval(
    values: Sequence[float],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """
    Return an interval for the mean, by resampling values (or groups of values) with replacement.

    To compare two rules on the same questions, pass the difference for each question.

    Args:
        values (`Sequence[float]`):
            One value per question, not per sample: samples of a question are not independent.
        level (`float`, *optional*, defaults to `0.95`):
            Share of the resampled means that lie in the interval.
        resamples (`int`, *optional*, defaults to `2000`):
            Number of resampled means.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling; the global random state does not change.
        groups (`Sequence[Hashable]`, *optional*):
            The group of each value, if values depend on each other, e.g. the conversation that a question comes from.
            Values of a group are resampled together.

    Returns:
        `tuple[float, float]`: the lower and the upper end.
    """
    values = list(values)
    if not values:
        raise ValueError("found no values; needed: at least one")
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"found {len(groups)} groups for {len(values)} values; needed: one for each")
    if not 0 < level < 1:
        raise ValueError(f"level={level}; needed: a number between 0 and 1, e.g. 0.95")
    numbers, count = group_numbers(range(len(values)) if groups is None else groups)
    means = bootstrap_means(torch.tensor(values, dtype=torch.float64), numbers, count, resamples, seed)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, ends).tolist()
    return low, high
