"""How good is the answer that a rule picks from K samples: at random, by majority, by a model's scores, by an oracle.

Pure Python on lists of whether answers are right; it knows nothing of models or of the task.

Every figure is the mean over prompts of the chance that the pick is right, with the standard error of that mean. Ties
are broken at random and the chance is computed, not drawn, so no figure depends on a seed. Two figures on the same
prompts are compared prompt by prompt ([`paired_gain`]): the difficulty of prompts, which both share, then cancels out.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence


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


def oracle_pick(right: Sequence[bool]) -> float:
    """1 if any answer is right, else 0: the best that any pick can do."""
    return float(any(right))


def best_of_n_pick(right: Sequence[bool], scores: Sequence[float], n: int | None = None) -> float:
    r"""
    The chance that the highest-scored of `n` answers, drawn without replacement from all K, is right.

    With distinct scores the chance is \\( \sum_r \binom{K - r}{n - 1} / \binom{K}{n} \\) over the right answers' ranks
    \\( r \\) (1 = highest score); equally scored answers share their ranks' chances equally. `n=1` is a random pick.

    Args:
        right (`Sequence[bool]`):
            Whether each of the K answers is right.
        scores (`Sequence[float]`):
            The K scores, higher is better.
        n (`int`, *optional*):
            How many are drawn, from 1 to K. All of them by default.

    Example:

    >>> best_of_n_pick([False, True, True], [3.0, 2.0, 1.0], n=2)
    0.3333333333333333
    """
    size = len(right)
    n = size if n is None else n
    if not 1 <= n <= size:
        raise ValueError(f"cannot draw n={n} of {size} answers; needed: a number from 1 to {size}")
    order = sorted(range(size), key=lambda index: -scores[index])
    chance, start = 0.0, 0
    while start < size:
        end = start
        while end < size and scores[order[end]] == scores[order[start]]:
            end += 1
        weight = sum(math.comb(size - 1 - rank, n - 1) for rank in range(start, end)) / math.comb(size, n)
        chance += weight * sum(right[index] for index in order[start:end]) / (end - start)
        start = end
    return chance


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
    right: Sequence[Sequence[bool]], answers: Sequence[Sequence[Hashable]], scores: Sequence[Sequence[float]]
) -> dict[str, object]:
    """
    All picks side by side.

    Args:
        right (`Sequence[Sequence[bool]]`):
            For each prompt and each of its K answers, whether it is right.
        answers (`Sequence[Sequence[Hashable]]`):
            The answers, for the majority vote.
        scores (`Sequence[Sequence[float]]`):
            The model's scores.

    Returns:
        `dict`: `random`, `majority`, `best_of_n`, `oracle` and the paired gain `best_of_n_over_random`, each with
        `mean` and `standard_error`; and `curve`: for each power of two n up to K the means of `best_of_n` and of
        `oracle`.
    """
    size = len(right[0])
    picks: dict[str, list[float]] = {
        "random": [random_pick(row) for row in right],
        "majority": [majority_pick(row, given) for row, given in zip(right, answers, strict=True)],
        "best_of_n": [best_of_n_pick(row, score) for row, score in zip(right, scores, strict=True)],
        "oracle": [oracle_pick(row) for row in right],
    }
    report: dict[str, object] = {name: mean_and_error(values) for name, values in picks.items()}
    report["best_of_n_over_random"] = paired_gain(picks["best_of_n"], picks["random"])
    report["curve"] = [
        {
            "n": n,
            "best_of_n": _mean(lambda i, n=n: best_of_n_pick(right[i], scores[i], n), len(right)),
            "oracle": _mean(lambda i, n=n: best_of_n_pick(right[i], [float(x) for x in right[i]], n), len(right)),
        }
        for n in (2**power for power in range(size.bit_length()))
        if n <= size
    ]
    return report


def _mean(value: Callable[[int], float], count: int) -> float:
    return math.fsum(value(index) for index in range(count)) / count
