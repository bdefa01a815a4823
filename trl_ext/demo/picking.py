"""How often a rule picks a right answer from K samples: at random, by a vote, by a model's scores, by an oracle.

It takes lists that say which answers are right, and knows nothing of models or of the task.

Every figure is the mean over prompts of the chance that the pick is right, with the standard error of that mean. The
chance is computed, with ties broken at random, so no figure depends on a seed. (In a weighted vote ties are rare, and
the answer that was given first wins.) Two figures on the same prompts are compared prompt by prompt ([`paired_gain`]),
so that the difficulty of the prompts cancels out.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from trl_ext.metrics.voting import best_of_k, weighted_vote


def random_pick(right: Sequence[bool]) -> float:
    """The chance that one of these answers, drawn at random, is right: the share of right ones."""
    return sum(right) / len(right)


def majority_pick(right: Sequence[bool], answers: Sequence[Hashable]) -> float:
    """
    The chance that the answer given most often is right; of several given equally often, one is drawn.

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
    """1 if any answer is right, else 0: the best that any pick can do."""
    return float(any(right))


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean of at least two values and its standard error, from the sample variance: `{"mean", "standard_error"}`."""
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least 2 values, found {len(values)}")
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": mean, "standard_error": math.sqrt(variance / len(values))}


def paired_gain(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """[`mean_and_error`] of the differences, prompt by prompt."""
    return mean_and_error([value - base for value, base in zip(values, baseline, strict=True)])


def compare_picks(
    right: Sequence[Sequence[bool]],
    answers: Sequence[Sequence[Hashable]],
    scores: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
) -> dict[str, object]:
    """
    All picks side by side.

    Args:
        right (`Sequence[Sequence[bool]]`):
            For each prompt and each of its K answers, whether it is right.
        answers (`Sequence[Sequence[Hashable]]`):
            The answers, for the votes.
        scores (`Sequence[Sequence[float]]`):
            The model's scores.
        weights (`Sequence[Sequence[float]]`):
            The weight of each answer in the model's vote.

    Returns:
        `dict`: `random`, `majority`, `best_of_n`, `weighted_vote`, `oracle` and the paired gain
        `best_of_n_over_random`, each with `mean` and `standard_error`; and `curve`: for each power of two n up to K
        the means of `best_of_n` and of `oracle`.
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
