"""One leg of a weak-to-strong experiment: train a model on rows, save it, reload it, and judge rows with it.

Knows a task, a trainer's arguments and files. Knows nothing of splits, of other legs or of reports.
"""

import copy
import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, PrinterCallback, TrainingArguments

from trl_ext.losses.distillation import LogConfRanking, LogConfToken
from trl_ext.pipelines.generation.records import with_completion
from trl_ext.pipelines.generation.sampling import Sampling
from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator, load_policy
from trl_ext.pipelines.stages.callables import callable_identity
from trl_ext.pipelines.stages.store import read_lines, write_lines
from trl_ext.pipelines.weak_to_strong.tasks import TASKS, GenerationTask, Judgement, Metric, Row, training_rows
from trl_ext.scoring import RewardScorer


@dataclass(frozen=True)
class Leg:
    """
    What is trained, and how. It can be sent to another process.

    Args:
        task (`str`): name of the task.
        model (`str`): path or Hub id.
        args (`TrainingArguments`): the trainer's arguments; output folder, seed and saving are set by the leg.
        overrides (`dict`): arguments that differ here.
        seed (`int`): seed of training.
        peft_config, quantization_config: as the trainer takes them.
        loss (`str`): `"gold"` labels need nothing else; else the student's loss.
        loss_kwargs (`dict`): arguments of `logconf`.
        metric (`Callable`, *optional*): what judges texts.
        sampling_temperature (`float`), max_completion_length (`int`): how texts are written.
    """

    task: str
    model: str
    args: TrainingArguments
    overrides: dict[str, Any]
    seed: int
    peft_config: PeftConfig | None
    quantization_config: BitsAndBytesConfig | None
    loss: str = "gold"
    loss_kwargs: dict[str, Any] | None = None
    metric: Metric | None = None
    sampling_temperature: float = 0.0
    max_completion_length: int = 256

    @property
    def model_init_kwargs(self) -> dict[str, Any]:
        """How the model is loaded."""
        return self.overrides.get("model_init_kwargs", self.args.model_init_kwargs) or {}


def own_arguments(leg: Leg, output_dir: Path, report_to: str) -> TrainingArguments:
    """The leg's copy of the trainer's arguments."""
    args = copy.copy(leg.args)
    given = args.run_name if args.run_name != args.output_dir else None
    values = {
        "output_dir": str(output_dir),
        "run_name": "-".join(filter(None, (given, output_dir.name.removesuffix(".partial")))),
        "seed": leg.seed,
        "data_seed": None,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": [report_to] if report_to != "none" else [],
        **leg.overrides,
    }
    for name, value in values.items():
        if name not in args.__dict__:
            raise ValueError(f"{type(args).__name__} has no argument {name!r} (of weak_training).")
        setattr(args, name, value)
    if leg.task == "generation":
        args.kd_weight = args.kd_weight if leg.loss == "kd" else 0.0
    return args


def train_leg(leg: Leg, rows: Sequence[Row], folder: Path, teacher: Path | None, report_to: str) -> dict[str, float]:
    """Train on rows, save to a folder. Returns what the trainer measured."""
    task = TASKS[leg.task]
    args = own_arguments(leg, folder, report_to)
    more = {}
    if leg.loss == "logconf":
        args.loss_type = (LogConfRanking if leg.task == "preference" else LogConfToken)(**leg.loss_kwargs or {})
    if leg.loss == "kd":
        more["teacher_model"] = load_policy(teacher, args.teacher_model_init_kwargs)
    model: Any = leg.model
    if leg.task == "generation" and leg.quantization_config is not None:
        init_kwargs = {"quantization_config": leg.quantization_config, **(args.model_init_kwargs or {})}
        model = load_policy(leg.model, init_kwargs)
        args.model_init_kwargs = None
    elif leg.task != "generation":
        more["quantization_config"] = leg.quantization_config
    trainer = task.trainer(
        model=model,
        args=args,
        train_dataset=training_rows(task, rows),
        peft_config=leg.peft_config,
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    output = trainer.train()
    trainer.save_model(str(folder))
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(str(folder))
    return {"train_loss": output.training_loss, "seconds": output.metrics["train_runtime"]}


def judge_leg(leg: Leg, folder: Path, splits: dict[str, Sequence[Row]]) -> dict[str, list[Judgement]]:
    """Reload what was saved and judge the rows of each split."""
    if leg.task != "generation":
        scorer = RewardScorer(folder)
        task = TASKS[leg.task]()
        return {name: task.judge(scorer, rows) for name, rows in splits.items()}
    task = GenerationTask(leg.metric) if leg.metric is not None else GenerationTask()
    model, judged = load_policy(folder), {}
    for name, rows in splits.items():
        temperature = leg.sampling_temperature if name == "labelled" else 0.0
        sampling = Sampling(max_completion_length=leg.max_completion_length, temperature=temperature)
        generator = TransformersGenerator(model, sampling, processing_class=AutoTokenizer.from_pretrained(folder))
        found = generator.generate([row["prompt"] for row in rows], num_generations=1, seed=leg.seed)
        texts = [with_completion(row["prompt"], own[0].text)[1] for row, own in zip(rows, found, strict=True)]
        judged[name] = task.judge_texts(texts, rows, [own[0].finish_reason == "stop" for own in found])
    return judged


def run_leg(
    leg: Leg, rows: Sequence[Row], splits: dict[str, Sequence[Row]], folder: Path, teacher: Path | None, report_to: str
) -> dict[str, Any]:
    """Train, reload, judge; the judgements go to `<split>.jsonl` in the folder. Returns what is worth reporting."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of the legs before, in this process
    measured = train_leg(leg, rows, folder, teacher, report_to)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for name, judgements in judge_leg(leg, folder, splits).items():
        write_lines(folder / f"{name}.jsonl", map(asdict, judgements))
        measured[name] = sum(j.right for j in judgements) / len(judgements)
    if torch.cuda.is_available():
        measured["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return measured


def read_judgements(folder: Path, split: str) -> list[Judgement]:
    """What [`run_leg`] wrote."""
    return [Judgement(**record) for record in read_lines(folder / f"{split}.jsonl")]


def in_own_process(job: tuple[Any, ...], folder: Path) -> dict[str, Any]:
    """
    [`run_leg`] in a fresh process, so that all its memory is given back when it is done.

    Args:
        job (`tuple`): the arguments of [`run_leg`].
        folder (`Path`): an existing folder, where the job and its result lie for a moment.
    """
    metric = job[0].metric
    name = "" if metric is None else callable_identity(metric)["function"]
    if name.startswith("__main__.") or "<l" in name:  # <lambda>, <locals>
        raise ValueError(
            f"The metric {name!r} is defined in the script, within a function or as a lambda, and another process "
            "cannot import it. Put it into a module of its own, or set isolate='never'."
        )
    given, result = folder / "job.pickle", folder / "result.json"
    given.write_bytes(pickle.dumps(job))
    try:
        status = subprocess.run([sys.executable, "-m", __name__, str(given), str(result)], check=False).returncode
        if status:
            raise RuntimeError(f"The leg in {folder.name} failed in its own process (exit status {status}).")
        return json.loads(result.read_text(encoding="utf-8"))
    finally:
        given.unlink()
        result.unlink(missing_ok=True)


if __name__ == "__main__":
    outcome = run_leg(*pickle.loads(Path(sys.argv[1]).read_bytes()))  # written by `in_own_process` just now
    if sys.platform == "linux":  # on a CPU, what the whole process took (counted in KiB there)
        import resource

        outcome.setdefault("peak_memory_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    Path(sys.argv[2]).write_text(json.dumps(outcome), encoding="utf-8")
