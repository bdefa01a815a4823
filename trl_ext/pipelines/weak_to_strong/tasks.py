"""The tasks of weak-to-strong experiments: how to train on rows, judge rows, and label rows with a weak model.

Four tasks: preferences, outcomes, processes (right and wrong steps) and generation. Each task knows its columns, its
trainer, its losses and how a trained model judges a row. The rest of the experiment treats all tasks alike. This
module does not know splits, seeds, stored results or reports.
"""

import hashlib
import logging
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from trl_ext.losses.distillation import LogConfRanking, LogConfToken
from trl_ext.losses.ranking import ranking_losses
from trl_ext.losses.token import token_losses
from trl_ext.models.adapters import check_adapter_config
from trl_ext.pipelines.generation.records import TEMPLATE_COLUMNS, canonical
from trl_ext.scoring import RewardScorer
from trl_ext.trainers import ORMConfig, ORMTrainer, PRMConfig, PRMTrainer, RewardConfig, RewardTrainer


logger = logging.getLogger(__name__)

UNREAD = 0.5
"""The probability of a step or solution that lies beyond the positions of the model."""

Row = dict[str, Any]
Metric = Callable[..., list[float]]


@dataclass(frozen=True)
class Judgement:
    """
    A model's answer to one row, and how good it is.

    Args:
        right (`float`): the model's performance on the row against ground truth, in [0, 1].
        output (`float`, `list[float]`, `str` or messages): the label that the model gives: a probability, one
            probability for each step, or a text.
        finished (`bool`, *optional*, defaults to `True`): whether the text ended before the length limit.
    """

    right: float
    output: float | list[float] | str | list[dict[str, Any]]
    finished: bool = True


@dataclass(frozen=True)
class SavedModel:
    """
    A model that a run saved.

    Args:
        folder (`Path`): where it is; for an adapter without its base.
        init_kwargs (`dict`): arguments of `from_pretrained` with which it was trained, quantization among them.
    """

    folder: Path
    init_kwargs: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """
    A task: its data, its trainer and its judge.

    Attributes:
        name (`str`): the task's name in a config.
        trainer, config (`type`): the trainer of all runs, and the class of its arguments.
        columns (`tuple[str, ...]`): columns that rows need.
        optional_columns (`tuple[str, ...]`): columns that the trainer reads if rows have them.
        student_losses (`tuple[str, ...]`): the losses with which the strong student can learn weak labels.
        labels_are_texts (`bool`): whether a weak label is a text instead of a probability.
    """

    name: ClassVar[str]
    trainer: ClassVar[type[Trainer]]
    config: ClassVar[type[TrainingArguments]]
    columns: ClassVar[tuple[str, ...]]
    optional_columns: ClassVar[tuple[str, ...]] = TEMPLATE_COLUMNS
    student_losses: ClassVar[tuple[str, ...]]
    labels_are_texts: ClassVar[bool] = False

    @classmethod
    def make(cls, metric: Metric | None = None, temperature: float = 0.0, max_completion_length: int = 256) -> "Task":
        """Make the task of an experiment. The arguments are for tasks of texts; other tasks refuse a metric."""
        if metric is not None:
            raise ValueError(f"A metric judges texts, and task={cls.name!r} generates none. Leave metric out.")
        return cls()

    def accept(self, args: TrainingArguments) -> TrainingArguments:
        """The trainer's arguments. Raises `TypeError` for those of another trainer."""
        if not isinstance(args, self.config):
            raise TypeError(
                f"args is a {type(args).__name__}. Needed for task={self.name!r}: a {self.config.__name__} of trl_ext."
            )
        return args

    def check_adapter(self, peft_config: PeftConfig | None) -> None:
        """Raise `ValueError` for an adapter that the trainer would refuse. It runs before a model is trained."""
        if peft_config is not None:
            check_adapter_config(peft_config)

    # ------------------------------------------------------------------------------------------------- the data
    def usable(self, rows: list[Row], split: str) -> list[Row]:
        """The rows that a split can use; a warning counts the others."""
        return rows

    @abstractmethod
    def check_split(self, rows: Sequence[Row], split: str) -> None:
        """Raise `ValueError` if a split cannot be learned from or tested on."""

    def unused_columns(self, columns: Sequence[str]) -> list[str]:
        """Columns that neither training nor judging reads."""
        return [name for name in columns if name not in (*self.columns, "prompt", *self.optional_columns)]

    def training_data(self, rows: Sequence[Row]) -> Dataset:
        """The columns that the trainer reads, as a data set."""
        wanted = {*self.columns, "prompt", *self.optional_columns}
        return Dataset.from_list([{name: value for name, value in row.items() if name in wanted} for row in rows])

    def gold_class(self, row: Row) -> str:
        """The class of a row; the report has separate figures for each class."""
        return self.name

    # ----------------------------------------------------------------------------------------------- the training
    @abstractmethod
    def check(
        self, args: TrainingArguments, student_loss: str, weak_models: Sequence[str], strong_models: Sequence[str]
    ) -> None:
        """Raise `ValueError` for arguments or models that cannot work. It runs before a model is trained."""

    @abstractmethod
    def loss_arguments(self, loss: str, loss_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The trainer arguments that a loss sets. `loss` is `"gold"` (ground truth) or a student's loss."""

    @abstractmethod
    def trainer_inputs(
        self,
        model: str,
        args: TrainingArguments,
        quantization_config: BitsAndBytesConfig | None,
        teacher: SavedModel | None,
    ) -> dict[str, Any]:
        """The keyword arguments of the task's trainer: `model`, `args` and others."""

    # ---------------------------------------------------------------------------------------------------- labels
    @abstractmethod
    def judge_model(
        self, saved: SavedModel, splits: Mapping[str, Sequence[Row]], seed: int
    ) -> dict[str, list[Judgement]]:
        """Load the model that a run saved, and judge the rows of each split."""

    @abstractmethod
    def relabel(self, row: Row, output: Any, hard: bool) -> Row:
        """The row with a weak model's label instead of ground truth; `hard` rounds probabilities to 0 and 1."""

    def learnable(
        self, rows: Sequence[Row], labels: Sequence[Judgement], hard: bool
    ) -> tuple[list[Row], dict[str, Any]]:
        """The rows that a student learns from, with weak labels, and what the run reports about the others."""
        pairs = zip(rows, labels, strict=True)
        return [self.relabel(row, label.output, hard) for row, label in pairs], {}

    def settings(self, judged: Sequence[str]) -> dict[str, Any]:
        """Everything except the model that the judgements of these splits depend on, as JSON for the cache key."""
        return {"task": self.name}


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)) without overflow."""
    return 1.0 / (1.0 + math.exp(-value)) if value >= 0 else math.exp(value) / (1.0 + math.exp(value))


def agreement(output: float, gold: float) -> float:
    """1 if a probability is on the same side of one half as ground truth, else 0. Ground truth 0.5 gives 0.5."""
    return 0.5 if gold == 0.5 else float((output > 0.5) == (gold > 0.5))


def _is_undecided(labels: Sequence[float | None]) -> bool:
    known = [label for label in labels if label is not None]
    return bool(known) and all(label == 0.5 for label in known)


class RewardTask(Task):
    """
    A task whose model is a reward model and whose labels are probabilities.

    Attributes:
        has_classes (`bool`): whether a label says right or wrong. False if the two sides of a row are interchangeable.
        confidence_loss (`type`): the auxiliary confidence loss in the trainer's signature.
    """

    student_losses = ("xent", "logconf")
    has_classes: ClassVar[bool] = True
    confidence_loss: ClassVar[type] = LogConfToken

    @abstractmethod
    def gold_labels(self, row: Row) -> list[float | None]:
        """Ground truth for each output of the row: a probability, or `None` if it is unknown."""

    @abstractmethod
    def judge(self, scorer: RewardScorer, rows: Sequence[Row]) -> list[Judgement]:
        """Score rows with a reward model."""

    @abstractmethod
    def judge_output(self, row: Row, output: Any) -> Judgement:
        """How good an output is on a row."""

    def usable(self, rows: list[Row], split: str) -> list[Row]:
        if split not in ("test", "fusion"):  # only these splits need a right answer
            return rows
        decided = [row for row in rows if not _is_undecided(self.gold_labels(row))]
        if len(decided) < len(rows):
            logger.warning(
                f"{len(rows) - len(decided)} rows of the split '{split}' are ignored: with the label 0.5 no answer is "
                "right."
            )
        return decided

    def check_split(self, rows: Sequence[Row], split: str) -> None:
        labels = [label for row in rows for label in self._known_labels(row, split)]
        if self.has_classes and len({label > 0.5 for label in labels}) == 1:
            raise ValueError(
                f"All {len(labels)} labels of the split '{split}' are {'right' if labels[0] > 0.5 else 'wrong'}, so "
                "there is nothing to learn or to test. Give rows of both kinds."
            )

    def _known_labels(self, row: Row, split: str) -> list[float]:
        known = [label for label in self.gold_labels(row) if label is not None]
        wrong = [label for label in known if not isinstance(label, numbers.Real) or not 0.0 <= label <= 1.0]
        if wrong or not known:
            found = f"the label {wrong[0]!r}" if wrong else "no label"
            raise ValueError(
                f"A row of the split '{split}' has {found} (prompt: {str(row.get('prompt'))[:60]!r}). Needed: true, "
                "false or a probability. Map the labels, or drop the row."
            )
        return known

    def loss_arguments(self, loss: str, loss_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {"loss_type": self.confidence_loss(**loss_kwargs)} if loss == "logconf" else {}

    def trainer_inputs(
        self,
        model: str,
        args: TrainingArguments,
        quantization_config: BitsAndBytesConfig | None,
        teacher: SavedModel | None,
    ) -> dict[str, Any]:
        return {"model": model, "args": args, "quantization_config": quantization_config}

    def judge_model(
        self, saved: SavedModel, splits: Mapping[str, Sequence[Row]], seed: int
    ) -> dict[str, list[Judgement]]:
        scorer = RewardScorer(saved.folder)  # its `reward_model.json` says how the base is loaded
        positions = scorer.raw.encoder.max_positions
        if positions is not None:
            logger.warning(f"The model reads at most {positions} tokens: longer rows are judged by what fits.")
            scorer = RewardScorer(scorer.model, scorer.processing_class, max_length=positions)
        return {name: self.judge(scorer, rows) for name, rows in splits.items()}


def template_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns for the chat template, as arguments of a scorer."""
    return {name: [row.get(name) for row in rows] for name in TEMPLATE_COLUMNS if any(name in row for row in rows)}


def is_flipped(row: Row) -> bool:
    """
    Whether the student sees the two sides of a pair exchanged. Hashes of the sides decide, because their order in the
    columns is ground truth, which the student must not see.
    """
    sides = [hashlib.sha256(canonical([row.get("prompt"), row[side]])).digest() for side in ("chosen", "rejected")]
    return sides[1] < sides[0]


class PreferenceTask(RewardTask):
    """
    Preference pairs. A label is the probability that `chosen` is better than `rejected`: `preference_probability` if
    the rows have that column, else 1. The student gets no `margin`, because a margin is part of ground truth.
    """

    name = "preference"
    trainer, config = RewardTrainer, RewardConfig
    columns = ("chosen", "rejected")
    optional_columns = ("preference_probability", "margin", *TEMPLATE_COLUMNS)
    has_classes = False
    confidence_loss = LogConfRanking

    def accept(self, args: TrainingArguments) -> RewardConfig:
        return args if isinstance(args, RewardConfig) else RewardConfig.from_trl(args)

    def gold_class(self, row: Row) -> str:
        return "pair"

    def gold_labels(self, row: Row) -> list[float | None]:
        return [row.get("preference_probability", 1.0)]

    def check(
        self, args: TrainingArguments, student_loss: str, weak_models: Sequence[str], strong_models: Sequence[str]
    ) -> None:
        if student_loss == "xent" and not ranking_losses.properties_of(args.loss_type).takes_target:
            raise ValueError(
                f"loss_type={args.loss_type!r} does not accept probabilities, and weak labels are probabilities. "
                "Needed: 'bradley_terry', or a loss that is declared with takes_target=True."
            )

    def judge(self, scorer: RewardScorer, rows: Sequence[Row]) -> list[Judgement]:
        prompts = [row.get("prompt") for row in rows]
        columns = {name: values * 2 for name, values in template_columns(rows).items()}
        sides = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        scores = scorer(prompts * 2, sides, **columns)
        halves = zip(rows, scores[: len(rows)], scores[len(rows) :], strict=True)
        return [self.judge_output(row, sigmoid(chosen - rejected)) for row, chosen, rejected in halves]

    def judge_output(self, row: Row, output: float) -> Judgement:
        (gold,) = self.gold_labels(row)
        if output == 0.5 != gold:  # equal scores are wrong, as in the metric `accuracy`
            return Judgement(0.0, output)
        return Judgement(agreement(output, gold), output)

    def relabel(self, row: Row, output: float, hard: bool) -> Row:
        """The pair in the order of [`is_flipped`], with the weak model's probability."""
        row = {name: value for name, value in row.items() if name not in ("margin", "preference_probability")}
        if is_flipped(row):
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            output = 1.0 - output
        return {**row, "preference_probability": float(output > 0.5) if hard else output}


class TokenTask(RewardTask):
    """A task whose model has labels on tokens. It reads probabilities from log-odds."""

    def check(
        self, args: TrainingArguments, student_loss: str, weak_models: Sequence[str], strong_models: Sequence[str]
    ) -> None:
        if getattr(args, "num_labels", None) == 3:  # the config of an outcome model lacks this field
            raise ValueError(
                "Weak labels are probabilities, and num_labels=3 has three classes. Map the labels to 0 and 1."
            )
        if token_losses.properties_of(args.loss_type).outputs != "log_odds":
            raise ValueError(
                f"loss_type={args.loss_type!r} gives no log-odds, and weak labels are read from log-odds. Needed: "
                "'bce', 'ce' or a loss that is declared with outputs='log_odds'."
            )


class OutcomeTask(TokenTask):
    """Solutions that are right or wrong (`label`). A model's label is P(right) at the last token."""

    name = "outcome"
    trainer, config = ORMTrainer, ORMConfig
    columns = ("prompt", "completion", "label")

    def gold_class(self, row: Row) -> str:
        return "right" if row["label"] > 0.5 else "wrong"

    def gold_labels(self, row: Row) -> list[float | None]:
        return [row["label"]]

    def judge(self, scorer: RewardScorer, rows: Sequence[Row]) -> list[Judgement]:
        prompts, completions = ([row[name] for row in rows] for name in ("prompt", "completion"))
        logits = scorer.score_tokens(prompts, completions, **template_columns(rows))
        outputs = [sigmoid(tokens[-1]) if tokens else UNREAD for tokens in logits]
        return [self.judge_output(row, output) for row, output in zip(rows, outputs, strict=True)]

    def judge_output(self, row: Row, output: float) -> Judgement:
        return Judgement(agreement(output, row["label"]), output)

    def relabel(self, row: Row, output: float, hard: bool) -> Row:
        return {**row, "label": float(output > 0.5) if hard else output}


class ProcessTask(TokenTask):
    """Steps that are right or wrong (`labels`). Performance on a row is the share of labelled steps judged right."""

    name = "process"
    trainer, config = PRMTrainer, PRMConfig
    columns = ("prompt", "completions", "labels")

    def gold_class(self, row: Row) -> str:
        known = [label for label in row["labels"] if label is not None]
        return "right" if all(label > 0.5 for label in known) else "wrong"

    def gold_labels(self, row: Row) -> list[float | None]:
        return row["labels"]

    def usable(self, rows: list[Row], split: str) -> list[Row]:
        labelled = [row for row in rows if any(label is not None for label in row["labels"])]
        if len(labelled) < len(rows):
            logger.warning(f"{len(rows) - len(labelled)} rows of the split '{split}' have no label and are ignored.")
        return super().usable(labelled, split)

    def check(
        self, args: TrainingArguments, student_loss: str, weak_models: Sequence[str], strong_models: Sequence[str]
    ) -> None:
        super().check(args, student_loss, weak_models, strong_models)
        if student_loss == "logconf" and args.num_labels != 2:
            raise ValueError("logconf on steps needs a head with two outputs. Set num_labels=2 and loss_type='ce'.")

    def judge(self, scorer: RewardScorer, rows: Sequence[Row]) -> list[Judgement]:
        prompts, steps = ([row[name] for row in rows] for name in ("prompt", "completions"))
        scored = scorer.score_steps(prompts, steps, **template_columns(rows))
        outputs = [[UNREAD if score is None else score for score in own] for own in scored]
        return [self.judge_output(row, own) for row, own in zip(rows, outputs, strict=True)]

    def judge_output(self, row: Row, output: list[float]) -> Judgement:
        known = [(p, gold) for p, gold in zip(output, row["labels"], strict=True) if gold is not None]
        decided = [pair for pair in known if pair[1] != 0.5] or known
        return Judgement(sum(agreement(p, gold) for p, gold in decided) / len(decided), output)

    def relabel(self, row: Row, output: list[float], hard: bool) -> Row:
        """Label the steps that have a gold label, so that student and ceiling learn from the same steps."""
        given = [float(p > 0.5) if hard else p for p in output]
        known = [p if gold is not None else None for p, gold in zip(given, row["labels"], strict=True)]
        return {**row, "labels": known}
