"""`weak_to_strong`: the whole experiment. A weak model learns from ground truth and labels what a strong model learns.

    split A, gold  ->  weak model   ->  labels for split B  ->  student (strong model on weak labels)
    split B, gold  ->  ceiling (strong model on ground truth)
    test split     ->  weak, student, ceiling judged on the same rows  ->  performance gap recovered

See *Weak-to-Strong Generalization* by C. Burns et al. (https://huggingface.co/papers/2312.09390). Every leg is a stage
that is kept and used again while nothing that it depends on changes. Knows the order of legs; a leg is in
`weak_to_strong_legs`, a task in `weak_to_strong_tasks`, splits are made in `weak_to_strong_splits`.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainingArguments

from trl_ext.losses.ranking import ranking_losses
from trl_ext.losses.token import token_losses
from trl_ext.models.fingerprint import model_identity, path_identity
from trl_ext.pipelines.reward_functions import reward_identity
from trl_ext.pipelines.stages.cached_stages import Outcome, Stage, StageContext, run_stages
from trl_ext.pipelines.weak_to_strong.config import WeakToStrongArguments
from trl_ext.pipelines.weak_to_strong.labels import combine, learnt_weights
from trl_ext.pipelines.weak_to_strong.report import WeakToStrongReport, pair_report
from trl_ext.pipelines.weak_to_strong.runs import Leg, in_own_process, read_judgements, run_leg
from trl_ext.pipelines.weak_to_strong.splits import content_hash, group_of, make_splits
from trl_ext.pipelines.weak_to_strong.tasks import TASKS, Judgement, Metric, Row
from trl_ext.trainers.weak_to_strong.trainer import check_same_vocabulary


logger = logging.getLogger(__name__)

# Arguments of a trainer that change nothing of what is learnt.
IRRELEVANT = (
    "output_dir",
    "seed",
    "data_seed",
    "run_name",
    "report_to",
    "disable_tqdm",
    "project",
    "trackio_space_id",
)
IRRELEVANT_PREFIXES = ("logging_", "log_", "hub_", "push_to_hub", "save_", "eval_", "dataloader_")
RELEVANT = ("dataloader_drop_last",)  # in spite of its prefix
KD_ONLY = ("kd_weight", "kd_schedule", "teacher_model_init_kwargs")


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
    on_end: Callable[[Stage, Outcome], None] = lambda stage, outcome: None,
) -> WeakToStrongReport:
    """
    Run the experiment, or what of it was not run yet, and report the performance gap recovered.

    Args:
        config ([`WeakToStrongArguments`]): models, task, splits, seeds.
        args (`TrainingArguments`):
            Arguments of the task's trainer ([`RewardConfig`], [`ORMConfig`], [`PRMConfig`] or [`WeakToStrongConfig`]),
            for every leg; `config.weak_training` changes them for weak models. `args.output_dir` holds the legs and
            the report.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows of the task's kind with ground truth, split by prompt into A and B; a stream is read to its end.
        test_dataset (`Dataset` or `IterableDataset`, *optional*):
            Rows to test on; by default a share of the prompts of `train_dataset`.
        peft_config, quantization_config (*optional*): of the strong model.
        weak_peft_config, weak_quantization_config (*optional*): of the weak model.
        metric (`Callable`, *optional*):
            For generation: a reward function in [0, 1]; an exact match with the row's `completion` by default.
        on_start, on_end (`Callable`, *optional*): called before a leg that runs, and after each.

    Returns:
        [`WeakToStrongReport`]: `.weak`, `.weak_to_strong`, `.ceiling`, `.pgr` and `.pgr_interval` of one pair of
        models, `.pairs` of several; written to `report.json`, `report.md` and, with matplotlib, `report.png`.

    Raises:
        ValueError: splits that share a prompt, an empty split, one class only, rows without the task's columns, labels
            that are no probabilities, a head or loss whose outputs are none, `kd` between two vocabularies, or several
            processes.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            "weak_to_strong runs its legs one after the other: start it in one process, without a launcher."
        )
    task = TASKS[config.task]
    check_outputs(config, args)
    if config.student_loss == "kd":
        check_vocabularies(config)
    splits = make_splits(config, train_dataset, test_dataset)
    folder = Path(args.output_dir)
    isolate = config.isolate == "always" or (config.isolate == "auto" and torch.cuda.is_available())
    report_to = "wandb" if "wandb" in (args.report_to or []) else "none"
    identity = cache(model_identity)  # reads whole models

    def leg(model: str, seed: int, weak: bool, loss: str) -> Leg:
        return Leg(
            task=config.task,
            model=model,
            args=args,
            overrides=config.weak_training if weak else {},
            seed=seed,
            peft_config=weak_peft_config if weak else peft_config,
            quantization_config=weak_quantization_config if weak else quantization_config,
            loss=loss,
            loss_kwargs=config.student_loss_kwargs,
            metric=metric,
            sampling_temperature=config.generation_temperature if weak else 0.0,
            max_completion_length=config.max_completion_length,
        )

    def stage(name: str, title: str, job: Leg, rows: str, judged: Sequence[str], needs: tuple[str, ...]) -> Stage:
        settings = {
            "leg": describe(job, identity(job.model, job.model_init_kwargs.get("revision"))),
            "rows": content_hash(splits[rows]),
            "judged": {split: content_hash(splits[split]) for split in judged},
            "labels": [config.weak_ensemble, config.hard_labels] if needs else None,
        }
        work = partial(_run, job, splits, rows, judged, needs, config, isolate)
        return Stage(name, title, work, settings, needs, trains=True)

    stages: list[Stage] = []
    for seed in config.seeds:
        for i, model in enumerate(config.weak_model_name_or_path):
            job = leg(model, seed, weak=True, loss="gold")
            title = f"weak model {model}, seed {seed}"
            judged = tuple(name for name in splits if name != "weak")
            stages.append(stage(f"weak-{i}-seed-{seed}", title, job, "weak", judged, ()))
        for j, model in enumerate(config.strong_model_name_or_path):
            job = leg(model, seed, weak=False, loss="gold")
            title = f"ceiling {model}, seed {seed}"
            stages.append(stage(f"ceiling-{j}-seed-{seed}", title, job, "labelled", ("test",), ()))
            for label, teachers in _teachers(config):
                job = leg(model, seed, weak=False, loss=config.student_loss)
                title = f"student {model} of {label}, seed {seed}"
                needs = tuple(f"weak-{i}-seed-{seed}" for i in teachers)
                name = f"student-{label}-{j}-seed-{seed}"
                stages.append(stage(name, title, job, "labelled", ("test",), needs))
    outcomes = run_stages(
        stages, folder, on_start=on_start, on_end=on_end, open_run=partial(_tracked, report_to=report_to)
    )

    pairs = []
    for j, strong in enumerate(config.strong_model_name_or_path):
        for label, teachers in _teachers(config):
            weak_names = [config.weak_model_name_or_path[i] for i in teachers]
            runs = []
            for seed in config.seeds:
                folders = [outcomes[f"weak-{i}-seed-{seed}"].folder for i in teachers]
                weak, weights = _labels(config, splits, folders, "test")
                student = outcomes[f"student-{label}-{j}-seed-{seed}"]
                runs.append(
                    {
                        "seed": seed,
                        "weak": weak,
                        "weights": weights,
                        "labels": _labels(config, splits, folders, "labelled")[0],
                        "left_out": student.result.get("left_out"),
                        "student": read_judgements(student.folder, "test"),
                        "ceiling": read_judgements(outcomes[f"ceiling-{j}-seed-{seed}"].folder, "test"),
                    }
                )
            classes = [task.gold_class(task, row) for row in splits["test"]]
            prompts = [group_of(row) for row in splits["test"]]
            pairs.append(pair_report(weak_names, strong, runs, classes, prompts, not task.labels_are_texts))
    report = WeakToStrongReport(
        task=config.task,
        student_loss=config.student_loss,
        rows={name: len(rows) for name, rows in splits.items()},
        pairs=pairs,
        seconds={name: outcome.seconds for name, outcome in outcomes.items()},
        peak_memory_gib={
            name: outcome.result["peak_memory_gib"]
            for name, outcome in outcomes.items()
            if "peak_memory_gib" in outcome.result
        },
    )
    report.save(folder, report_to=report_to)
    return report


def _teachers(config: WeakToStrongArguments) -> list[tuple[str, list[int]]]:
    """Which weak models label: each alone, or all together. (label of the labeller, their numbers)"""
    numbers = list(range(len(config.weak_model_name_or_path)))
    return [("ensemble", numbers)] if config.weak_ensemble else [(f"weak-{i}", [i]) for i in numbers]


@contextmanager
def _tracked(stage: Stage, report_to: str) -> Iterator[str]:
    """One W&B run per leg, closed with it."""
    yield report_to
    if report_to == "wandb":
        import wandb

        wandb.finish()


def _run(
    job: Leg,
    splits: dict[str, list[Row]],
    rows: str,
    judged: Sequence[str],
    teachers: tuple[str, ...],
    config: WeakToStrongArguments,
    isolate: bool,
    context: StageContext,
) -> dict[str, Any]:
    """A leg as a stage: its rows, with the labels of its teachers if it has some."""
    training = splits[rows]
    teacher_folder, told = None, {}
    if teachers:
        labels, _ = _labels(config, splits, [context.folders[name] for name in teachers], rows)
        training, told = learnable(config, training, labels)
        teacher_folder = context.folders[teachers[0]]
    arguments = (job, training, {s: splits[s] for s in judged}, context.folder, teacher_folder, context.report_to)
    return told | (in_own_process(arguments, context.folder) if isolate else run_leg(*arguments))


def learnable(
    config: WeakToStrongArguments, rows: Sequence[Row], labels: Sequence[Judgement]
) -> tuple[list[Row], dict[str, Any]]:
    """Rows with a weak model's labels in place of their own; of texts those to learn from, and a count of the rest."""
    task = TASKS[config.task]()
    labelled = list(zip(rows, labels, strict=True))
    told: dict[str, Any] = {}
    if task.labels_are_texts:
        reasons = [task.why_unusable(label) for label in labels]
        left_out = {reason: reasons.count(reason) for reason in ("cut", "empty")}
        labelled = [pair for pair, reason in zip(labelled, reasons, strict=True) if reason is None]
        found = f"{left_out['cut']} were cut at max_completion_length={config.max_completion_length} and "
        found += f"{left_out['empty']} are empty"
        if not labelled:
            raise ValueError(
                f"The weak model wrote nothing to learn from: of {len(rows)} texts {found}. Train it longer "
                "(weak_training), or raise max_completion_length."
            )
        if len(labelled) < len(rows):
            logger.warning(f"Of {len(rows)} weak texts {found}: the student does not learn from these.")
        told["left_out"] = left_out
    return [task.relabel(row, label.output, config.hard_labels) for row, label in labelled], told


def _labels(
    config: WeakToStrongArguments, splits: dict[str, list[Row]], folders: Sequence[Path], split: str
) -> tuple[list[Judgement], list[float] | None]:
    """What the weak models of these legs say of a split, as one, and the weights that were learnt for it."""
    task, weights = TASKS[config.task](), None
    if config.weak_ensemble == "learned":
        held_back = [read_judgements(folder, "fusion") for folder in folders]
        weights = learnt_weights(task, splits["fusion"], held_back)
    judgements = [read_judgements(folder, split) for folder in folders]
    return combine(task, splits[split], judgements, config.weak_ensemble, weights), weights


# ----------------------------------------------------------------------------------------------------------- checks
def check_outputs(config: WeakToStrongArguments, args: TrainingArguments) -> None:
    """Raise `ValueError` for a head or a loss whose outputs are no log-odds, or that takes no soft label."""
    if (
        config.task == "preference"
        and config.student_loss == "xent"
        and not ranking_losses.properties_of(args.loss_type).takes_target
    ):
        raise ValueError(
            f"loss_type={args.loss_type!r} takes no probability, which a weak label is. Needed: 'bradley_terry', or a "
            "loss that is declared with takes_target=True."
        )
    if config.task not in ("outcome", "steps"):
        return
    if getattr(args, "num_labels", None) == 3:
        raise ValueError(
            "Weak labels are probabilities, and num_labels=3 has three classes. Map the labels to 0 and 1."
        )
    if config.student_loss == "logconf" and config.task == "steps" and args.num_labels != 2:
        raise ValueError("logconf of steps needs a head of two outputs: set num_labels=2 and loss_type='ce'.")
    if token_losses.properties_of(args.loss_type).outputs != "log_odds":
        raise ValueError(
            f"loss_type={args.loss_type!r} gives no log-odds, which weak labels are read from. Needed: 'bce', 'ce' "
            "or a loss that is declared with outputs='log_odds'."
        )


def check_vocabularies(config: WeakToStrongArguments) -> None:
    """Raise `ValueError` for models that `kd` cannot compare, before one of them is trained."""
    for strong in config.strong_model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(strong)
        for weak in config.weak_model_name_or_path:
            check_same_vocabulary(tokenizer, AutoTokenizer.from_pretrained(weak), weak)


# --------------------------------------------------------------------------------------------------------- identity
def describe(leg: Leg, identity: str) -> dict[str, Any]:
    """Everything of a leg that its result depends on, as JSON values; `identity` is that of its model."""
    arguments = {
        name: value
        for name, value in leg.args.to_dict().items()
        if (name in RELEVANT or not (name in IRRELEVANT or name.startswith(IRRELEVANT_PREFIXES)))
        and (name not in KD_ONLY or leg.loss == "kd")
    }
    arguments |= leg.overrides
    if arguments.get("chat_template_path") is not None:
        arguments["chat_template_path"] = path_identity(arguments["chat_template_path"])
    quantization, peft = leg.quantization_config, leg.peft_config
    described = {
        "task": leg.task,
        "model": identity,
        "arguments": arguments,
        "seed": leg.seed,
        "peft": None if peft is None else peft.to_dict(),
        "quantization": None if quantization is None else quantization.to_dict(),
        "loss": [leg.loss, leg.loss_kwargs if leg.loss == "logconf" else None],
        "texts": _describe_texts(leg) if leg.task == "generation" else None,
    }
    return json.loads(json.dumps(described, sort_keys=True, default=_plain))


def _describe_texts(leg: Leg) -> dict[str, Any]:
    metric = None if leg.metric is None else reward_identity(leg.metric)
    if leg.metric is not None and metric is None:
        raise ValueError("The metric is an ensemble in memory, which is not known again: save it, and give a scorer.")
    length = leg.max_completion_length
    return {"metric": metric, "temperature": leg.sampling_temperature, "max_completion_length": length}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
