"""How often a rule picks a right answer from K samples: at random, by a vote, by a model's scores, by an oracle.

It takes lists that say which answers are right. It knows nothing of models or of the task.

For each prompt, a function computes the chance that the pick is right. Each figure is the mean of these chances over
the prompts, with the standard error of that mean. The chance accounts for ties, which are broken at random, so no
figure depends on a seed. (In a weighted vote ties are rare, and the answer that was given first wins.) [`paired_gain`]
compares two figures prompt by prompt, so the difficulty of the prompts cancels out.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from trl_ext.metrics.voting import best_of_k, weighted_vote


def random_pick(right: Sequence[bool]) -> float:
    """The chance that an answer drawn at random is right, which is the share of right answers."""
    return sum(right) / len(right)


def majority_pick(right: Sequence[bool], answers: Sequence[Hashable]) -> float:
    """
    The chance that the most frequent answer is right. If several answers are equally frequent, one is drawn.

    Example:

    >>> majority_pick([True, False, False, False], ["4", "5", "6", "6"])
    0.0
    >>> majority_pick([True, False], ["4", "5"])
    0.5
    """
    is_right = dict(zip(answers, right, strict=True))
    votes = Counter(answers)
    most = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == most]
    return sum(is_right[answer] for answer in leaders) / len(leaders)


def weighted_pick(right: Sequence[bool], answers: Sequence[Hashable], weights: Sequence[float]) -> float:
    """
    1 if the answer with the largest sum of weights is right, else 0; see [`~trl_ext.metrics.voting.weighted_vote`].

    Example:

    >>> weighted_pick([True, False, False], ["4", "5", "5"], [0.9, 0.3, 0.4])
    1.0
    """
    return float(dict(zip(answers, right, strict=True))[weighted_vote(answers, weights)])


def oracle_pick(right: Sequence[bool]) -> float:
    """1 if any answer is right, else 0. No pick can do better."""
    return float(any(right))


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """`mean` of at least two values and its `standard_error`, which comes from the sample variance."""
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least 2 values, found {len(values)}")
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": mean, "standard_error": math.sqrt(variance / len(values))}


def paired_gain(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """[`mean_and_error`] of the differences between two figures of the same prompt."""
    return mean_and_error([value - base for value, base in zip(values, baseline, strict=True)])


def compare_picks(
    right: Sequence[Sequence[bool]],
    answers: Sequence[Sequence[Hashable]],
    scores: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
) -> dict[str, object]:
    """
    Computes every pick on the same samples.

    Args:
        right (`Sequence[Sequence[bool]]`):
            Whether each of the K answers to each prompt is right.
        answers (`Sequence[Sequence[Hashable]]`):
            The answers, which the votes compare.
        scores (`Sequence[Sequence[float]]`):
            The model's scores.
        weights (`Sequence[Sequence[float]]`):
            The weight of each answer in the model's vote.

    Returns:
        `dict`: `random`, `majority`, `best_of_n`, `weighted_vote`, `oracle` and the paired gain
        `best_of_n_over_random`, each with `mean` and `standard_error`. `curve` lists the means of `best_of_n` and
        `oracle` for each power of two n up to K.
    """
    size = len(right[0])
    picks: dict[str, list[float]] = {
        "random": [random_pick(row) for row in right],
        "majority": [majority_pick(row, given) for row, given in zip(right, answers, strict=True)],
        "best_of_n": [best_of_k(row, score, size) for row, score in zip(right, scores, strict=True)],
        "weighted_vote": [weighted_pick(*row) for row in zip(right, answers, weights, strict=True)],
        "oracle": [oracle_pick(row) for row in right],
    }
    report: dict[str, object] = {name: mean_and_error(values) for name, values in picks.items()}
    report["best_of_n_over_random"] = paired_gain(picks["best_of_n"], picks["random"])
    report["curve"] = [
        {
            "n": n,
            "best_of_n": _mean(lambda i, n=n: best_of_k(right[i], scores[i], n), len(right)),
            "oracle": _mean(lambda i, n=n: best_of_k(right[i], [float(x) for x in right[i]], n), len(right)),
        }
        for n in (2**power for power in range(size.bit_length()))
        if n <= size
    ]
    return report


def _mean(value: Callable[[int], float], count: int) -> float:
    return math.fsum(value(index) for index in range(count)) / count
