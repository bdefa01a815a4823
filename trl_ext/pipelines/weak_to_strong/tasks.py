"""What weak-to-strong learning needs of a task: train on rows, judge rows, and put a weak model's labels on them.

Four tasks: preferences, outcomes, steps and generation. Each knows its columns, trainer and scorer, and gives the rest
of the experiment the same things: a gold label per row, a [`Judgement`] per row, and rows with weak labels. Knows
nothing of splits, seeds, caches or reports.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_ext.pipelines.generation.records import canonical, text_of, with_completion
from trl_ext.scoring import RewardScorer
from trl_ext.trainers import (
    ORMTrainer,
    PRMTrainer,
    RewardTrainer,
    WeakToStrongTrainer,
)


Row = dict[str, Any]
Metric = Callable[..., list[float]]


@dataclass(frozen=True)
class Judgement:
    """
    What a model says of a row.

    Args:
        right (`float`): its performance on the row against ground truth, in [0, 1].
        output (`float`, `list[float]`, `str` or messages): the soft label it gives (a probability, or one a step), or
            its text.
        finished (`bool`, *optional*, defaults to `True`): whether its text ended by itself, and not at the limit.
    """

    right: float
    output: float | list[float] | str | list[dict[str, Any]]
    finished: bool = True


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)) without overflow."""
    return 1.0 / (1.0 + math.exp(-value)) if value >= 0 else math.exp(value) / (1.0 + math.exp(value))


def flipped(row: Row) -> bool:
    """Whether a pair is shown the other way round: by the hashes of its sides, as the gold order must not reach on."""
    sides = [hashlib.sha256(canonical([row.get("prompt"), row[side]])).digest() for side in ("chosen", "rejected")]
    return sides[1] < sides[0]


class PreferenceTask:
    """Pairs: `chosen` is better than `rejected`. A model's label is the probability that its first side wins."""

    trainer = RewardTrainer
    columns = ("chosen", "rejected")
    labels_are_texts = False

    def gold_class(self, row: Row) -> str:
        return "pair"  # the two sides are interchangeable: there are no classes

    def gold_labels(self, row: Row) -> list[float | None]:
        """What outputs are to be: of each label of the row, or `None` where it is not known."""
        return [1.0]

    def judge(self, scorer: RewardScorer, rows: Sequence[Row]) -> list[Judgement]:
        prompts = [row.get("prompt") for row in rows]
        scores = scorer(prompts * 2, [row["chosen"] for row in rows] + [row["rejected"] for row in rows])
        halves = zip(rows, scores[: len(rows)], scores[len(rows) :], strict=True)
        return [self.judge_output(row, sigmoid(chosen - rejected)) for row, chosen, rejected in halves]

    def judge_output(self, row: Row, output: float) -> Judgement:
        return Judgement(float(output > 0.5), output)  # equal scores are wrong, as in the metric `accuracy`

    def relabel(self, row: Row, output: float, hard: bool) -> Row:
        """The pair in an order that its content decides, with the weak model's probability."""
        row = {name: value for name, value in row.items() if name not in ("margin", "preference_probability")}
        if flipped(row):
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            output = 1.0 - output
        return {**row, "preference_probability": float(output > 0.5) if hard else output}


class OutcomeTask:
    """Solutions that are right or wrong (`label`). A model's label is P(right) at the last token."""

    trainer = ORMTrainer
    columns = ("prompt", "completion", "label")
    labels_are_texts = False

    def gold_class(self, row: Row) -> str:
        return "right" if row["label"] > 0.5 else "wrong"

    def gold_labels(self, row: Row) -> list[float | None]:
        return [row["label"]]

    def judge(self, scorer: RewardScorer, rows: Sequence[Row]) -> list[Judgement]:
        logits = scorer.score_tokens([row["prompt"] for row in rows], [row["completion"] for row in rows])
        outputs = [sigmoid(tokens[-1]) for tokens in logits]
        return [self.judge_output(row, output) for row, output in zip(rows, outputs, strict=True)]

    def judge_output(self, row: Row, output: float) -> Judgement:
        return Judgement(float((output > 0.5) == (row["label"] > 0.5)), output)

    def relabel(self, row: Row, output: float, hard: bool) -> Row:
        return {**row, "label": float(output > 0.5) if hard else output}


class StepTask:
    """Steps that are right or wrong (`labels`). Performance on a row is the share of its labelled steps."""

    trainer = PRMTrainer
    columns = ("prompt", "completions", "labels")
    labels_are_texts = False

    def gold_class(self, row: Row) -> str:
        known = [label for label in row["labels"] if label is not None]
        return "right" if all(label > 0.5 for label in known) else "wrong"

    def gold_labels(self, row: Row) -> list[float | None]:
        return row["labels"]

    def judge(self, scorer: RewardScorer, rows: Sequence[Row]) -> list[Judgement]:
        scored = scorer.score_steps([row["prompt"] for row in rows], [row["completions"] for row in rows])
        return [self.judge_output(row, list(outputs)) for row, outputs in zip(rows, scored, strict=True)]

    def judge_output(self, row: Row, output: list[float]) -> Judgement:
        known = [(p, gold) for p, gold in zip(output, row["labels"], strict=True) if gold is not None]
        return Judgement(sum((p > 0.5) == (gold > 0.5) for p, gold in known) / len(known), output)

    def relabel(self, row: Row, output: list[float], hard: bool) -> Row:
        """Weak labels on the steps that have one, so that student and ceiling see the same steps."""
        given = [float(p > 0.5) if hard else p for p in output]
        known = [p if gold is not None else None for p, gold in zip(given, row["labels"], strict=True)]
        return {**row, "labels": known}


def exact_match(prompts: list, completions: list, completion: list, **columns: Any) -> list[float]:
    """1 where the text equals the reference `completion` up to surrounding space: a TRL reward function."""
    pairs = zip(completions, completion, strict=True)
    return [float(text_of(own).strip() == text_of(gold).strip()) for own, gold in pairs]


class GenerationTask:
    """
    Texts (`prompt`, `completion`). A model's label is the completion that it generates.

    Args:
        metric (`Callable`): a reward function in [0, 1] that judges a completion; all other columns are passed to it.
    """

    trainer = WeakToStrongTrainer
    columns = ("prompt", "completion")
    labels_are_texts = True

    def __init__(self, metric: Metric = exact_match):
        self._metric = metric

    def gold_class(self, row: Row) -> str:
        return "text"

    def judge_texts(
        self, texts: Sequence[str | list[dict]], rows: Sequence[Row], finished: Sequence[bool]
    ) -> list[Judgement]:
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        prompts = [with_completion(row["prompt"], "")[0] for row in rows]  # a begun answer is part of the text
        values = self._metric(prompts=prompts, completions=list(texts), **columns)
        wrong = [value for value in values if value is None or not 0.0 <= value <= 1.0]
        if len(values) != len(rows) or wrong:
            raise ValueError(
                f"The metric gave {len(values)} values for {len(rows)} rows, of which {len(wrong)} are not in [0, 1]. "
                "Needed: one number from 0 to 1 per row."
            )
        return [Judgement(float(value), *text) for value, *text in zip(values, texts, finished, strict=True)]

    def relabel(self, row: Row, output: str, hard: bool) -> Row:
        return {**row, "prompt": with_completion(row["prompt"], "")[0], "completion": output}

    @staticmethod
    def why_unusable(label: Judgement) -> str | None:
        """
        Why a text is not learnt from, if it is not. Behind one that was cut at the limit SFT would put the end of a
        text all the same, and a student would learn to stop in the middle; GRPO's `mask_truncated_completions` leaves
        such texts out too.
        """
        if not label.finished:
            return "cut"
        return None if text_of(label.output) else "empty"


TASKS: dict[str, type] = {
    "preference": PreferenceTask,
    "outcome": OutcomeTask,
    "steps": StepTask,
    "generation": GenerationTask,
}


def training_rows(task: Any, rows: Sequence[Row]) -> Dataset:
    """The columns that the trainer reads, as a data set."""
    wanted = {*task.columns, "prompt", "preference_probability"}
    return Dataset.from_list([{name: value for name, value in row.items() if name in wanted} for row in rows])
