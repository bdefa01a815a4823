"""`weak_to_strong`: the whole experiment. A weak model learns from ground truth and labels what a strong model learns.

    split A, gold  ->  weak model   ->  labels for split B  ->  student (strong model on weak labels)
    split B, gold  ->  ceiling (strong model on ground truth)
    test split     ->  weak, student, ceiling judged on the same rows  ->  performance gap recovered

See *Weak-to-Strong Generalization* by C. Burns et al. (https://huggingface.co/papers/2312.09390). Every leg is a stage
that is kept and used again while nothing that it depends on changes. Knows splits and the order of legs; a leg is in
`weak_to_strong_legs`, a task in `weak_to_strong_tasks`.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from trl_ext.models.fingerprint import fingerprint

from .cached_stages import Outcome, Stage, StageContext, run_stages
from .records import canonical
from .weak_to_strong_config import WeakToStrongArguments
from .weak_to_strong_labels import combine, learnt_weights
from .weak_to_strong_legs import Leg, in_own_process, read_judgements, run_leg
from .weak_to_strong_report import WeakToStrongReport, pair_report
from .weak_to_strong_tasks import TASKS, Judgement, Metric, Row


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


def weak_to_strong(
    config: WeakToStrongArguments,
    args: TrainingArguments,
    train_dataset: Dataset,
    test_dataset: Dataset | None = None,
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
        train_dataset (`Dataset`): rows of the task's kind with ground truth, split by prompt into A and B.
        test_dataset (`Dataset`, *optional*): rows to test on; by default a share of the prompts of `train_dataset`.
        peft_config, quantization_config (*optional*): of the strong model.
        weak_peft_config, weak_quantization_config (*optional*): of the weak model.
        metric (`Callable`, *optional*):
            For generation: a reward function in [0, 1]; an exact match with the row's `completion` by default.
        on_start, on_end (`Callable`, *optional*): called before a leg that runs, and after each.

    Returns:
        [`WeakToStrongReport`]: `.weak`, `.weak_to_strong`, `.ceiling`, `.pgr` and `.pgr_interval` of one pair of
        models, `.pairs` of several; written to `report.json`, `report.md` and, with matplotlib, `report.png`.

    Raises:
        ValueError: splits that share a prompt, an empty split, one class only, rows without the task's columns, or
            several processes.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            "weak_to_strong runs its legs one after the other: start it in one process, without a launcher."
        )
    task = TASKS[config.task]
    splits = make_splits(config, train_dataset, test_dataset)
    folder = Path(args.output_dir)
    isolate = config.isolate == "always" or (config.isolate == "auto" and torch.cuda.is_available())
    report_to = "wandb" if "wandb" in (args.report_to or []) else "none"

    names = {*config.weak_model_name_or_path, *config.strong_model_name_or_path}
    identities = {name: model_identity(name) for name in names}

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
            sampling_temperature=config.generation_temperature,
            max_completion_length=config.max_completion_length,
        )

    def stage(name: str, title: str, job: Leg, rows: str, judged: Sequence[str], needs: tuple[str, ...]) -> Stage:
        settings = {
            "leg": describe(job, identities[job.model]),
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
                runs.append(
                    {
                        "seed": seed,
                        "weak": weak,
                        "weights": weights,
                        "labels": _labels(config, splits, folders, "labelled")[0],
                        "student": read_judgements(outcomes[f"student-{label}-{j}-seed-{seed}"].folder, "test"),
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
    teacher_folder = None
    if teachers:
        labels, _ = _labels(config, splits, [context.folders[name] for name in teachers], rows)
        task = TASKS[config.task]()
        training = [
            task.relabel(row, label.output, config.hard_labels) for row, label in zip(training, labels, strict=True)
        ]
        training = [row for row in training if config.task != "generation" or _has_text(row["completion"])]
        if not training:
            raise ValueError("The weak model wrote only empty texts: there is nothing to learn from.")
        teacher_folder = context.folders[teachers[0]]
    arguments = (job, training, {s: splits[s] for s in judged}, context.folder, teacher_folder, context.report_to)
    return in_own_process(arguments, context.folder) if isolate else run_leg(*arguments)


def _has_text(completion: str | list[dict]) -> bool:
    return bool(completion if isinstance(completion, str) else completion[-1]["content"])


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


# ----------------------------------------------------------------------------------------------------------- splits
def group_of(row: Row) -> str:
    """What keeps rows together: the prompt, or for rows without one all that they hold."""
    prompt = row.get("prompt")
    return hashlib.sha256(canonical(row if prompt in (None, "", []) else prompt)).hexdigest()


def content_hash(rows: Sequence[Row]) -> str:
    """The identity of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical(row))
    return digest.hexdigest()


def make_splits(
    config: WeakToStrongArguments, train_dataset: Dataset, test_dataset: Dataset | None
) -> dict[str, list[Row]]:
    """
    Split A (`"weak"`), split B (`"labelled"`) and `"test"`: every prompt is in one of them, by a hash of its content.
    Where the weights of weak models are learnt, a part of A is `"fusion"`.

    Raises:
        ValueError: a column is missing, a split is empty, a test row's prompt is also trained on, or a split of right
            and wrong rows has one class.
    """
    task = TASKS[config.task]()
    for name, data in (("train", train_dataset), ("test", test_dataset)):
        missing = [column for column in task.columns if data is not None and column not in data.column_names]
        if missing:
            raise ValueError(f"The {name} data set has no column {missing}. {config.task} rows need {task.columns}.")
    splits: dict[str, list[Row]] = {"weak": [], "labelled": [], "test": []}
    for row in train_dataset:
        digest = hashlib.sha256(f"{config.split_seed} {group_of(row)}".encode()).digest()
        place, other = (int.from_bytes(digest[k : k + 6], "big") / 2**48 for k in (0, 6))
        if test_dataset is None and place < config.test_share:
            splits["test"].append(row)
        else:
            splits["weak" if other < config.weak_share else "labelled"].append(row)
    if test_dataset is not None:
        splits["test"] = list(test_dataset)
    if config.weak_ensemble == "learned":
        whole, splits["weak"], splits["fusion"] = splits["weak"], [], []
        for row in whole:
            digest = hashlib.sha256(f"{config.split_seed} fusion {group_of(row)}".encode()).digest()
            held_back = int.from_bytes(digest[:6], "big") / 2**48 < config.fusion_share
            splits["fusion" if held_back else "weak"].append(row)
    if config.task == "steps":
        for name, rows in splits.items():
            labelled = [row for row in rows if any(label is not None for label in row["labels"])]
            if len(labelled) < len(rows):
                logger.warning(f"{len(rows) - len(labelled)} rows of the split '{name}' have no label: left out.")
            splits[name] = labelled
    check_splits(splits)
    if config.task == "outcome":
        for name, rows in splits.items():
            classes = {task.gold_class(row) for row in rows}
            if len(classes) == 1:
                raise ValueError(
                    f"All {len(rows)} rows of the split '{name}' are {classes.pop()}: nothing to learn or to test. "
                    "Give right and wrong solutions."
                )
    return splits


def check_splits(splits: dict[str, list[Row]]) -> None:
    """Raise `ValueError` for an empty split, or a prompt that is in two of them."""
    groups = {}
    for name, rows in splits.items():
        if not rows:
            raise ValueError(f"The split '{name}' has no rows. Give more prompts, or change weak_share or test_share.")
        groups[name] = {group_of(row) for row in rows}
    names = list(groups)
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            shared = groups[first] & groups[second]
            if shared:
                raise ValueError(
                    f"The splits '{first}' and '{second}' share {len(shared)} prompts, so what is tested was trained "
                    "on. Remove them from one data set."
                )


# --------------------------------------------------------------------------------------------------------- identity
def describe(leg: Leg, identity: str) -> dict[str, Any]:
    """Everything of a leg that its result depends on, as JSON values; `identity` is that of its model."""
    arguments = {
        name: value
        for name, value in leg.args.to_dict().items()
        if name not in IRRELEVANT and not name.startswith(IRRELEVANT_PREFIXES)
    }
    quantization, peft = leg.quantization_config, leg.peft_config
    metric = None if leg.metric is None else f"{leg.metric.__module__}.{leg.metric.__qualname__}"
    described = {
        "task": leg.task,
        "model": identity,
        "arguments": {**arguments, **leg.overrides},
        "seed": leg.seed,
        "peft": None if peft is None else peft.to_dict(),
        "quantization": None if quantization is None else quantization.to_dict(),
        "loss": [leg.loss, leg.loss_kwargs if leg.loss == "logconf" else None],
        "texts": [metric, leg.sampling_temperature, leg.max_completion_length] if leg.task == "generation" else None,
    }
    return json.loads(json.dumps(described, sort_keys=True, default=_plain))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def model_identity(name: str) -> str:
    """A Hub id as it is; a folder by its content."""
    return fingerprint(Path(name)) if Path(name).is_dir() else name
