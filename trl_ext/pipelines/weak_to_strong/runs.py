"""One run of a weak-to-strong experiment: train a model on rows, save it, reload it, and judge rows with it.

It knows a task, a trainer's arguments and files. It knows no splits, no other runs and no reports.
"""

import dataclasses
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import BitsAndBytesConfig, PrinterCallback, TrainingArguments

from trl_ext.pipelines.stages.progress import ProgressCallback
from trl_ext.pipelines.stages.runner import in_own_process
from trl_ext.pipelines.stages.store import read_lines, write_lines
from trl_ext.pipelines.weak_to_strong.tasks import Judgement, Row, SavedModel, Task


# transformers (from 5.23 on) copies the deprecated field to the new one once, when the arguments are made, and then
# reads only the new one.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def changed_arguments(
    args: TrainingArguments, changes: Mapping[str, Any], source: str = "changes"
) -> TrainingArguments:
    """
    Make new training arguments with some values changed, as if the user had passed these values.

    The dataclass is made again, so that everything its `__post_init__` derives (mixed precision, gradient
    checkpointing, devices, plugins) follows the new values.

    Args:
        args (`TrainingArguments`): the arguments as they are.
        changes (`Mapping`): new values by name.
        source (`str`, *optional*): where the changes come from, for the error.

    Raises:
        ValueError: the arguments have no field of a given name.
    """
    known = {one.name for one in dataclasses.fields(args) if one.init}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(f"{source}: {type(args).__name__} has no argument {', '.join(map(repr, unknown))}.")
    changes = dict(changes)
    for old, new in RENAMED.items():
        if old in changes and new in known:
            changes.setdefault(new, changes[old])
    if changes.get("fp16") and args.bf16:  # TRL turned bf16 on because fp16 was not set
        changes.setdefault("bf16", False)
    return dataclasses.replace(args, **changes)


# The share of a run that is training; the rest is judging.
TRAINING_SHARE = 0.8


@dataclass(frozen=True)
class Run:
    """
    A model to train, with its data and arguments. A run can be sent to another process.

    Args:
        task ([`~trl_ext.pipelines.weak_to_strong.tasks.Task`]): the task.
        model (`str`): path or Hub id of the model to train.
        args (`TrainingArguments`): the trainer's arguments; the run sets the output folder and what is saved.
        seed (`int`): seed of training and of generation.
        peft_config, quantization_config (*optional*): arguments of the trainer.
        loss (`str`, *optional*, defaults to `"gold"`): `"gold"` for training on ground truth, otherwise the student's
            loss.
        loss_kwargs (`dict`, *optional*): arguments of that loss.
        teacher_init_kwargs (`dict`, *optional*): `init_kwargs` of the run whose model is the teacher.
    """

    task: Task
    model: str
    args: TrainingArguments
    seed: int
    peft_config: PeftConfig | None = None
    quantization_config: BitsAndBytesConfig | None = None
    loss: str = "gold"
    loss_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_init_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` with which the model is trained, and loaded again."""
        quantization = {"quantization_config": self.quantization_config} if self.quantization_config else {}
        return quantization | (self.args.model_init_kwargs or {})

    def arguments(self, output_dir: Path, report_to: str) -> TrainingArguments:
        """The trainer's arguments for this run. The W&B run is named after the folder."""
        given = self.args.run_name if self.args.run_name != self.args.output_dir else None
        name = "-".join(filter(None, (given, output_dir.name.removesuffix(".partial"))))
        changes = {"output_dir": str(output_dir), "run_name": name, "seed": self.seed, "data_seed": None}
        changes |= {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
        changes["report_to"] = [report_to] if report_to != "none" else []
        return changed_arguments(self.args, changes | self.task.loss_arguments(self.loss, self.loss_kwargs))


def train(
    run: Run,
    rows: Sequence[Row],
    folder: Path,
    teacher: Path | None,
    report_to: str,
    on_progress: Callable[[float], None],
) -> dict[str, float]:
    """Train on rows, save to a folder, and return the trainer's metrics."""
    weak = None if teacher is None else SavedModel(teacher, run.teacher_init_kwargs)
    inputs = run.task.trainer_inputs(run.model, run.arguments(folder, report_to), run.quantization_config, weak)
    data = run.task.training_data(rows)
    trainer = run.task.trainer(train_dataset=data, peft_config=run.peft_config, **inputs)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(lambda share: on_progress(TRAINING_SHARE * share)))
    output = trainer.train()
    trainer.save_model(str(folder))
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(str(folder))
    return {"train_loss": output.training_loss, "seconds": output.metrics["train_runtime"]}


def train_and_judge(
    run: Run,
    rows: Sequence[Row],
    splits: dict[str, Sequence[Row]],
    folder: Path,
    teacher: Path | None,
    report_to: str,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """
    Train, reload and judge. The judgements go to `<split>.jsonl` in the folder.

    Returns:
        `dict`: training loss and seconds, mean performance on each split, and on a GPU the peak memory.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # earlier runs may have used this process
    measured = train(run, rows, folder, teacher, report_to, on_progress)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for name, judgements in run.task.judge_model(SavedModel(folder, run.init_kwargs), splits, run.seed).items():
        write_lines(folder / f"{name}.jsonl", map(asdict, judgements))
        measured[name] = sum(judgement.right for judgement in judgements) / len(judgements)
    if torch.cuda.is_available():
        measured["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    elif in_own_process() and sys.platform == "linux":  # the peak of the whole process, counted in KiB there
        import resource

        measured["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return measured


def train_and_judge_job(arguments: tuple[Any, ...], on_progress: Callable[[float], None]) -> dict[str, Any]:
    """[`train_and_judge`] as a job of [`~trl_ext.pipelines.stages.runner.run_job`]."""
    return train_and_judge(*arguments, on_progress)


def read_judgements(folder: Path, split: str) -> list[Judgement]:
    """The judgements that [`train_and_judge`] stored."""
    return [Judgement(**record) for record in read_lines(folder / f"{split}.jsonl")]
