"""From the answers of a judge to ratings: reads labels in texts, averages samples and orders, measures position bias.

Pure functions of settings, texts and numbers. This module knows no models and no rows.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from scipy.special import expit

from trl_ext.pipelines.feedback.judge_settings import JudgeSettings
from trl_ext.pipelines.generation.generator import log_sum
from trl_ext.pipelines.stages.cache_key import canonical


# What is known of one answer: {"logprobs": [...]}, one for each label; {"label": index}; {"order": [...]}, the shown
# places from best to worst; or {"failed": reason}.
Answer = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """
    One question to a judge.

    Args:
        text (`str`): the question, as the template gives it.
        labels (`tuple[str, ...]`): the answers to choose from.
        places (`tuple[int, ...]`): the completions that it shows, by index, in the order in which it shows them.
    """

    text: str
    labels: tuple[str, ...]
    places: tuple[int, ...]

    def key(self, sample: int) -> str:
        """The key of one answer to it: a hash of the text, the labels and the number of the sample."""
        return hashlib.sha256(canonical([self.text, self.labels, sample])).hexdigest()[:24]


@dataclass(frozen=True)
class Comparison:
    """
    Two completions that were compared.

    Args:
        first, second (`int`): their indices.
        when_first, when_second (`float`, *optional*):
            The probability that `first` is better, where it was shown in the first and in the second place; `None`
            where it was not asked, or the answer had no label.
        probability (`float`): the average of both.
    """

    first: int
    second: int
    when_first: float | None
    when_second: float | None
    probability: float

    @property
    def position_bias(self) -> float | None:
        """By how much the mean probability of the completion shown first exceeds 1/2; in [-0.5, 0.5]."""
        if self.when_first is None or self.when_second is None:
            return None
        return (self.when_first - self.when_second) / 2

    @property
    def consistent(self) -> bool | None:
        """Whether both orders prefer the same completion."""
        if self.when_first is None or self.when_second is None:
            return None
        return (self.when_first - 0.5) * (self.when_second - 0.5) > 0


@dataclass(frozen=True)
class Judgement:
    """
    What a judge says of the completions of one prompt.

    Args:
        ratings (`list[float | None]`):
            One for each completion, higher is better: the mean probability to win (compare, rank), the share of the
            other completions that are listed below it (list), or the expected grade (score). `None` without an answer.
        comparisons (`list[Comparison]`): the pairs, where the judge compares.
        position_bias (`float`, *optional*):
            By how much the rating of the completion shown first exceeds 1/2 on average; `None` for scores, and where
            only one order was asked.
        label_mass (`float`, *optional*):
            The mean probability of all labels together, where probabilities were read. A low one means that the judge
            does not answer with a label.
        failed (`list[str]`): the reason of each answer without a label.
    """

    ratings: list[float | None]
    comparisons: list[Comparison]
    position_bias: float | None
    label_mass: float | None
    failed: list[str]


def shown_orders(settings: JudgeSettings, count: int, content: str) -> list[tuple[int, ...]]:
    """
    The completions that each question about a row shows, in their order.

    Args:
        settings ([`JudgeSettings`]): mode and orders.
        count (`int`): number of completions.
        content (`str`): what the order is drawn from with `orders="one"`, together with the seed.
    """
    if settings.mode == "score":
        return [(place,) for place in range(count)]
    groups = combinations(range(count), 2) if settings.compares else [tuple(range(count))]
    found: list[tuple[int, ...]] = []
    for group in groups:
        both = [tuple(group), tuple(reversed(group))]
        if settings.orders == "one":
            digest = hashlib.sha256(canonical([settings.seed, content, group])).digest()
            both = [both[digest[0] % 2]]
        found += both
    return found


def read_label(text: str, labels: Sequence[str], prefix: str | None) -> int | None:
    """
    The index of the label that an answer gives: the last one after the prefix, or the whole answer.

    A label that is part of another number is none: -1, 4.5 and .5 are neither 1, 4 nor 5.

    Example:

    ```python
    >>> read_label("B is longer, and A is right. Answer: **A**", ["A", "B"], "Answer:")
    0
    ```
    """
    named = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    pattern = rf"\W*?(?!(?<=[-−.,])\d)({named})(?!\w|[.,]\d)"
    found = re.findall(rf"(?i:{re.escape(prefix)}){pattern}", text) if prefix else []
    whole = re.fullmatch(rf"{pattern}\W*", text)
    label = found[-1] if found else whole[1] if whole else None
    return None if label is None else list(labels).index(label)


def read_order(text: str, labels: Sequence[str], prefix: str | None) -> list[int] | None:
    """
    The places of the labels from best to worst, as an answer lists them; `None` unless it names each label once.

    Example:

    ```python
    >>> read_order("Answer: C > A > B", ["A", "B", "C"], "Answer:")
    [2, 0, 1]
    ```
    """
    if prefix and prefix.lower() in text.lower():
        text = text[text.lower().rindex(prefix.lower()) + len(prefix) :]
    named = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.findall(rf"(?<!\w)({named})(?!\w)", text)
    return [list(labels).index(label) for label in found] if sorted(found) == sorted(labels) else None


def label_log_distribution(answers: Sequence[Answer], size: int) -> list[float] | None:
    """
    The log-probabilities of the labels, averaged over samples; they add up to 1. `None` if no sample has a label.

    Args:
        answers (sequence of answers): the samples.
        size (`int`): number of labels.
    """
    samples = []
    for answer in answers:
        if "logprobs" in answer:
            total = log_sum(answer["logprobs"])
            samples.append([value - total for value in answer["logprobs"]])
        elif "label" in answer:
            samples.append([0.0 if place == answer["label"] else -math.inf for place in range(size)])
    if not samples:
        return None
    return [log_sum(values) - math.log(len(samples)) for values in zip(*samples, strict=True)]


def judgement_of(
    settings: JudgeSettings, count: int, questions: Sequence[Question], answers: Sequence[Sequence[Answer]]
) -> Judgement:
    """
    What the answers to the questions about one prompt say of its `count` completions.

    Args:
        settings ([`JudgeSettings`]): mode, average and values.
        count (`int`): number of completions.
        questions (sequence of [`Question`]): as [`shown_orders`] gives their places.
        answers (sequence of sequences of answers): the samples of each question.
    """
    flat = [answer for samples in answers for answer in samples]
    failed = [answer["failed"] for answer in flat if "failed" in answer]
    mass = [math.exp(log_sum(answer["logprobs"])) for answer in flat if "logprobs" in answer]
    if settings.mode == "list":
        ratings, bias = _of_lists(count, questions, answers)
        comparisons = []
    elif settings.mode == "score":
        ratings, bias, comparisons = [_expected(settings, samples) for samples in answers], None, []
    else:
        comparisons = _comparisons(settings, questions, answers)
        ratings = _wins(count, comparisons)
        biases = [pair.position_bias for pair in comparisons if pair.position_bias is not None]
        bias = _mean(biases)
    return Judgement(ratings, comparisons, bias, _mean(mass), failed)


def _expected(settings: JudgeSettings, samples: Sequence[Answer]) -> float | None:
    logs = label_log_distribution(samples, len(settings.values))
    if logs is None:
        return None
    return sum(math.exp(log) * value for log, value in zip(logs, settings.values, strict=True))


def _comparisons(
    settings: JudgeSettings, questions: Sequence[Question], answers: Sequence[Sequence[Answer]]
) -> list[Comparison]:
    """The pairs whose every order that was asked has an answer."""
    found: dict[tuple[int, int], dict[bool, list[float] | None]] = {}
    for question, samples in zip(questions, answers, strict=True):
        first, second = question.places
        logs = label_log_distribution(samples, 2)
        if first > second and logs is not None:
            logs = logs[::-1]  # those of the completion with the lower index come first
        found.setdefault((min(first, second), max(first, second)), {})[first < second] = logs
    pairs = []
    for (first, second), orders in found.items():
        if None in orders.values():
            continue
        probabilities = {is_first: math.exp(logs[0]) for is_first, logs in orders.items()}
        log_odds = [logs[0] - logs[1] for logs in orders.values()]
        if settings.average == "log_odds" and all(map(math.isfinite, log_odds)):
            probability = float(expit(sum(log_odds) / len(log_odds)))
        else:  # shares, or the texts of a function: a label that all samples give has infinite log-odds
            probability = sum(probabilities.values()) / len(probabilities)
        pairs.append(Comparison(first, second, probabilities.get(True), probabilities.get(False), probability))
    return pairs


def _wins(count: int, comparisons: Sequence[Comparison]) -> list[float | None]:
    """The mean probability of each completion to win against those that it was compared with."""
    chances: list[list[float]] = [[] for _ in range(count)]
    for pair in comparisons:
        chances[pair.first].append(pair.probability)
        chances[pair.second].append(1 - pair.probability)
    return [_mean(values) for values in chances]


def _of_lists(
    count: int, questions: Sequence[Question], answers: Sequence[Sequence[Answer]]
) -> tuple[list[float | None], float | None]:
    """Mean rating of each completion over orders and samples, and the position bias if both orders have an answer."""
    means, first_shown = [], []
    for question, samples in zip(questions, answers, strict=True):
        orders = [answer["order"] for answer in samples if "order" in answer]
        if not orders:  # one order alone would carry its position bias into the ratings
            return [None] * count, None
        totals = [0.0] * count
        for rank, place in ((rank, place) for order in orders for rank, place in enumerate(order)):
            totals[question.places[place]] += (count - 1 - rank) / (count - 1)
        means.append([total / len(orders) for total in totals])
        first_shown.append(means[-1][question.places[0]])
    bias = _mean(first_shown) - 0.5 if len(questions) == 2 else None
    return [_mean(ratings) for ratings in zip(*means, strict=True)], bias


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
