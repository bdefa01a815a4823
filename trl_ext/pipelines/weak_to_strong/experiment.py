"""`weak_to_strong`: the whole experiment. A weak model learns from ground truth and labels data for a strong model.

    split A, gold labels  ->  weak supervisor  ->  weak labels for split B  ->  strong student
    split B, gold labels  ->  strong ceiling
    test split            ->  all three are judged on the same rows         ->  performance gap recovered

See *Weak-to-Strong Generalization* by C. Burns et al. (https://huggingface.co/papers/2312.09390). Each run trains one
model. A run is kept, and reused until something changes that it depends on. This module plans the runs, starts them
and collects their results. `runs` trains and judges one model, `tasks` knows the data, `splits` divides the rows.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from trl_ext.logs import follow_transformers
from trl_ext.models.fingerprint import model_identity
from trl_ext.pipelines.stages.cached_stages import Outcome, Stage, StageContext, run_stages
from trl_ext.pipelines.stages.runner import run_job
from trl_ext.pipelines.stages.training_arguments import arguments_key
from trl_ext.pipelines.stages.values import plain
from trl_ext.pipelines.weak_to_strong.config import TASKS, WeakToStrongArguments
from trl_ext.pipelines.weak_to_strong.labels import combine, learnt_weights
from trl_ext.pipelines.weak_to_strong.report import WeakToStrongReport, pair_report
from trl_ext.pipelines.weak_to_strong.runs import (
    Run,
    changed_arguments,
    read_judgements,
    train_and_judge_job,
)
from trl_ext.pipelines.weak_to_strong.splits import content_hash, group_of, make_splits
from trl_ext.pipelines.weak_to_strong.tasks import Judgement, Metric, Row, Task


logger = logging.getLogger(__name__)

# Arguments that a run does not depend on, in addition to those of every training.
RUN_IRRELEVANT = {
    "seed": "Each run has its own seed, which is part of its cache key.",
    "data_seed": "Runs leave it unset and draw the order of rows from their seed.",
}

# Arguments that the experiment sets for each run; weak_training must not set them.
SET_BY_THE_EXPERIMENT = ("output_dir", "run_name", "seed", "data_seed", "save_strategy", "eval_strategy", "report_to")


def weak_to_strong(
    config: WeakToStrongArguments,
    args: TrainingArguments,
    train_dataset: Dataset | IterableDataset,
    test_dataset: Dataset | IterableDataset | None = None,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    weak_peft_config: PeftConfig | None = None,
    weak_quantization_config: BitsAndBytesConfig | None = None,
    metric: Metric | None = None,
    on_start: Callable[[Stage], None] = lambda stage: None,
    on_progress: Callable[[Stage, float], None] = lambda stage, share: None,
    on_end: Callable[[Stage, Outcome], None] = lambda stage, outcome: None,
) -> WeakToStrongReport:
    """
    Run the experiment, or the part of it that has not run yet, and report the performance gap recovered.

    Args:
        config ([`WeakToStrongArguments`]): models, task, splits, seeds.
        args (`TrainingArguments`):
            Arguments of the task's trainer ([`RewardConfig`], [`ORMConfig`], [`PRMConfig`] or [`WeakToStrongConfig`]),
            for every run; `config.weak_training` changes them for weak supervisors. `args.output_dir` holds the runs
            and the report.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows of the task with ground truth, split by prompt into A and B; a stream is read to its end.
        test_dataset (`Dataset` or `IterableDataset`, *optional*):
            Rows to test on; by default a share of the prompts of `train_dataset`.
        peft_config, quantization_config (*optional*): configs of the strong models.
        weak_peft_config, weak_quantization_config (*optional*): configs of the weak supervisors.
        metric (`Callable`, *optional*):
            For generation: a reward function in [0, 1]; an exact match with the row's `completion` by default.
        on_start, on_progress, on_end (`Callable`, *optional*):
            Called before each run that trains, with the share of it that is done, and after each run.

    Returns:
        [`WeakToStrongReport`]: `.weak`, `.weak_to_strong`, `.ceiling`, `.pgr` and `.pgr_interval` of one pair of
        models, `.pairs` of several; written to `report.json`, `report.md` and, with matplotlib, `report.png`.

    Raises:
        TypeError: `args` belong to another trainer than the task's.
        ValueError: splits share a prompt, a split is empty or has one class only, rows lack the task's columns, labels
            or the outputs of a head or loss are not probabilities, `kd` is used between two vocabularies,
            `weak_training` has unknown trainer arguments, or there are several processes.
        ImportError: `weak_ensemble="learned"` is used and scikit-learn is not installed.
    """
    follow_transformers(args.get_process_log_level())
    if PartialState().num_processes > 1:
        raise ValueError(
            "weak_to_strong trains its models one after the other. Start it in one process, without a launcher."
        )
    if config.weak_ensemble == "learned" and find_spec("sklearn") is None:
        raise ImportError("weak_ensemble='learned' needs scikit-learn: pip install 'trl-ext[fusion]'.")
    task = TASKS[config.task].make(metric, config.generation_temperature, config.max_completion_length)
    args = task.accept(args)
    for adapter in (peft_config, weak_peft_config):
        task.check_adapter(adapter)
    task.check(args, config.student_loss, config.weak_model_name_or_path, config.strong_model_name_or_path)
    splits = make_splits(config, train_dataset, test_dataset)
    experiment = Experiment(config, task, args, splits)
    weak, strong = Loading(weak_peft_config, weak_quantization_config), Loading(peft_config, quantization_config)
    stages = experiment.plan(weak, strong)
    report_to = "wandb" if "wandb" in (args.report_to or []) else "none"
    with _one_group(Path(args.output_dir), report_to):
        outcomes = run_stages(
            stages,
            args.output_dir,
            on_start=on_start,
            on_progress=on_progress,
            on_end=on_end,
            open_run=partial(_tracked, report_to=report_to),
        )
        report = experiment.report(outcomes)
        report.save(Path(args.output_dir), report_to=report_to)
    return report


# ------------------------------------------------------------------------------------------------------------- plan
@dataclass(frozen=True)
class Loading:
    """How a model is loaded and which of its weights are trained."""

    peft_config: PeftConfig | None = None
    quantization_config: BitsAndBytesConfig | None = None


class Experiment:
    """
    The runs of an experiment, and the report of their results.

    Args:
        config ([`WeakToStrongArguments`]): the experiment.
        task ([`~trl_ext.pipelines.weak_to_strong.tasks.Task`]): its task.
        args (`TrainingArguments`): the trainer's arguments.
        splits (`dict[str, list]`): rows of each split.
    """

    def __init__(
        self, config: WeakToStrongArguments, task: Task, args: TrainingArguments, splits: Mapping[str, list[Row]]
    ):
        self._config, self._task, self._args, self._splits = config, task, args, splits

    @property
    def _supervisors(self) -> dict[str, list[int]]:
        """The supervisors: each weak model alone, or all together. Maps their names to the numbers of their models."""
        numbers = list(range(len(self._config.weak_model_name_or_path)))
        return {"ensemble": numbers} if self._config.weak_ensemble else {f"weak-{i}": [i] for i in numbers}

    def plan(self, weak: Loading, strong: Loading) -> list[Stage]:
        """All runs, each after those that it needs."""
        config, model_key = self._config, cache(model_identity)  # cached, because it reads whole models
        clash = sorted(set(SET_BY_THE_EXPERIMENT) & set(config.weak_training))
        if clash:
            raise ValueError(f"weak_training sets {clash}, which the experiment sets for each run. Leave it out.")
        weak_args = changed_arguments(self._args, config.weak_training, "weak_training")
        judged_by_weak = tuple(name for name in self._splits if name != "weak")

        def stage(
            name: str, title: str, run: Run, rows: str, judged: tuple[str, ...], needs: tuple[str, ...] = ()
        ) -> Stage:
            key = model_key(run.model, (run.args.model_init_kwargs or {}).get("revision"))
            settings = {
                "run": cache_settings(run, key, judged),
                "rows": content_hash(self._splits[rows]),
                "judged": {split: content_hash(self._splits[split]) for split in judged},
                "labels": [config.weak_ensemble, config.hard_labels] if needs else None,
            }
            work = partial(self._work, run, rows, judged, needs)
            return Stage(f"{name}-seed-{run.seed}", f"{title}, seed {run.seed}", work, settings, needs, trains=True)

        stages = []
        for seed in config.seeds:
            for i, model in enumerate(config.weak_model_name_or_path):
                supervisor = Run(self._task, model, weak_args, seed, weak.peft_config, weak.quantization_config)
                stages.append(stage(f"weak-{i}", f"weak supervisor {model}", supervisor, "weak", judged_by_weak))
            for j, model in enumerate(config.strong_model_name_or_path):
                ceiling = Run(self._task, model, self._args, seed, strong.peft_config, strong.quantization_config)
                stages.append(stage(f"ceiling-{j}", f"strong ceiling {model}", ceiling, "labelled", ("test",)))
                student = replace(
                    ceiling,
                    loss=config.student_loss,
                    loss_kwargs=config.student_loss_kwargs,
                    teacher_init_kwargs=supervisor.init_kwargs,  # those of all supervisors
                )
                for label, numbers in self._supervisors.items():
                    needs = tuple(f"weak-{i}-seed-{seed}" for i in numbers)
                    title = f"strong student {model} of {label}"
                    stages.append(stage(f"student-{label}-{j}", title, student, "labelled", ("test",), needs))
        return stages

    # ---------------------------------------------------------------------------------------------------------- run
    def _work(
        self, run: Run, rows: str, judged: Sequence[str], supervisors: tuple[str, ...], context: StageContext
    ) -> dict[str, Any]:
        """Train and judge the model of a run; if it has supervisors, it learns from their labels."""
        training, teacher, measured = self._splits[rows], None, {}
        if supervisors:
            labels, _ = self._weak_labels([context.folders[name] for name in supervisors], rows)
            training, measured = self._task.learnable(training, labels, self._config.hard_labels)
            teacher = context.folders[supervisors[0]]
        splits = {name: self._splits[name] for name in judged}
        job = (run, training, splits, context.folder, teacher, context.report_to)
        name = context.folder.name.removesuffix(".partial")
        work = partial(train_and_judge_job, job)
        return measured | run_job(name, work, self._config.isolate, on_progress=context.progress)

    def _weak_labels(self, folders: Sequence[Path], split: str) -> tuple[list[Judgement], list[float] | None]:
        """The joint labels of weak supervisors for a split, and the learned weights of the supervisors."""
        weights = None
        if self._config.weak_ensemble == "learned":
            held_back = [read_judgements(folder, "fusion") for folder in folders]
            weights = learnt_weights(self._task, self._splits["fusion"], held_back)
        judgements = [read_judgements(folder, split) for folder in folders]
        return combine(self._task, self._splits[split], judgements, self._config.weak_ensemble, weights), weights

    # ------------------------------------------------------------------------------------------------------- report
    def report(self, outcomes: Mapping[str, Outcome]) -> WeakToStrongReport:
        """The report of the finished runs."""
        config = self._config
        test = self._splits["test"]
        classes, prompts = [self._task.gold_class(row) for row in test], [group_of(row) for row in test]
        pairs = []
        for j, strong in enumerate(config.strong_model_name_or_path):
            for label, numbers in self._supervisors.items():
                weak = [config.weak_model_name_or_path[i] for i in numbers]
                found = [self._of_seed(outcomes, j, label, numbers, seed) for seed in config.seeds]
                pairs.append(pair_report(weak, strong, found, classes, prompts, not self._task.labels_are_texts))
        memory = {name: outcome.result.get("peak_memory_gib") for name, outcome in outcomes.items()}
        return WeakToStrongReport(
            task=config.task,
            student_loss=config.student_loss,
            rows={name: len(rows) for name, rows in self._splits.items()},
            pairs=pairs,
            seconds={name: outcome.seconds for name, outcome in outcomes.items()},
            peak_memory_gib={name: value for name, value in memory.items() if value is not None},
        )

    def _of_seed(
        self, outcomes: Mapping[str, Outcome], strong: int, label: str, numbers: Sequence[int], seed: int
    ) -> dict[str, Any]:
        """The judgements of the three models of a pair, for one seed."""
        folders = [outcomes[f"weak-{i}-seed-{seed}"].folder for i in numbers]
        weak, weights = self._weak_labels(folders, "test")
        student = outcomes[f"student-{label}-{strong}-seed-{seed}"]
        return {
            "seed": seed,
            "weak": weak,
            "weights": weights,
            "labels": self._weak_labels(folders, "labelled")[0],
            "left_out": student.result.get("left_out"),
            "student": read_judgements(student.folder, "test"),
            "ceiling": read_judgements(outcomes[f"ceiling-{strong}-seed-{seed}"].folder, "test"),
        }


# ---------------------------------------------------------------------------------------------------------- tracking
@contextmanager
def _one_group(folder: Path, report_to: str) -> Iterator[None]:
    """
    All W&B runs of the experiment, including that of the report, share a project and a group: the user's
    (`WANDB_PROJECT`, `WANDB_RUN_GROUP`), or the project of transformers and a group named after the output folder.
    Runs in separate processes inherit these variables. In this process W&B reads them only once, so its settings are
    changed too, in case that it was used before.
    """
    if report_to != "wandb":
        yield
        return
    import wandb

    names = {"WANDB_PROJECT": "huggingface", "WANDB_RUN_GROUP": folder.name}
    added = {name: value for name, value in names.items() if name not in os.environ}
    os.environ.update(added)
    settings = wandb.setup().settings
    before, settings.run_group = settings.run_group, os.environ["WANDB_RUN_GROUP"]
    try:
        yield
    finally:
        settings.run_group = before if before != added.get("WANDB_RUN_GROUP") else None
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _tracked(stage: Stage, report_to: str) -> Iterator[str]:
    """One W&B run for each model, closed after its training. A run that the user opened is used and stays open."""
    if report_to != "wandb":
        yield report_to
        return
    import wandb

    opened_before = wandb.run is not None
    yield report_to
    if not opened_before:
        wandb.finish()


# --------------------------------------------------------------------------------------------------------- cache key
def cache_settings(run: Run, model_key: str, judged: Sequence[str]) -> dict[str, Any]:
    """
    Everything except the rows that the result of a run depends on, as JSON values.

    Args:
        run ([`~trl_ext.pipelines.weak_to_strong.runs.Run`]): the run.
        model_key (`str`): the cache key of its model.
        judged (sequence of `str`): the splits that the model judges.
    """
    overrides = run.task.loss_arguments(run.loss, run.loss_kwargs)
    return {
        "task": plain(run.task.settings(judged)),
        "model": model_key,
        "arguments": arguments_key(run.args, overrides, RUN_IRRELEVANT),
        "seed": run.seed,
        "peft": plain(run.peft_config),
        "quantization": plain(run.quantization_config),
        "loss": [run.loss, plain(run.loss_kwargs)],
    }
