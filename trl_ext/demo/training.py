"""What the stages that train a reward model share: arguments, adapter, training, and the checked reload.

It knows trainers, folders and scorers. The stages choose the data that a model is trained on, and use its scores.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, Trainer

from trl_ext import RewardScorer
from trl_ext.demo.picking import compare_picks
from trl_ext.demo.task import final_answer
from trl_ext.pipelines.stages.cached_stages import StageContext
from trl_ext.pipelines.stages.progress import ProgressCallback


# Number of held-out prompts that the trainer evaluates, for the run's table and histogram of scores.
EVALUATED_PROMPTS = 100

# Number of completions that are also scored before saving, to compare with the scores after reloading.
RELOADED = 256

# The share of a stage's time that is training. The rest is evaluation and scoring.
TRAINING_SHARE = 0.85

Rows = Sequence[Mapping[str, Any]]
# Maps a scorer, prompts and completions to one or several scores for each completion.
Score = Callable[[RewardScorer, list[str], list[str]], list[list[float]]]


def arguments(context: StageContext, eval_batch_size: int) -> dict[str, Any]:
    """The arguments that all configs share. Reads the settings `steps`, `batch_size`, `learning_rate` and `seed`."""
    settings = context.settings
    return {
        "output_dir": str(context.folder),
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["batch_size"],
        "per_device_eval_batch_size": eval_batch_size,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(50, settings["steps"] // 4),
        "logging_steps": max(1, min(25, settings["steps"] // 4)),
        "save_strategy": "no",
        "report_to": context.report_to,
        "seed": settings["seed"],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def adapter(context: StageContext) -> LoraConfig:
    """LoRA on all linear layers. Reads the setting `lora_rank`."""
    rank = context.settings["lora_rank"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def progress_callback(context: StageContext) -> ProgressCallback:
    """Reports the stage's progress while its trainer trains."""
    return ProgressCallback(lambda share: context.progress(TRAINING_SHARE * share))


def train_and_save(context: StageContext, trainer: Trainer) -> tuple[dict[str, float], dict[str, float]]:
    """Trains, evaluates and saves to the stage's folder. Returns `loss` with `train_seconds`, and the evaluation."""
    trainer.remove_callback(PrinterCallback)
    start = time.monotonic()
    loss = trainer.train().training_loss
    seconds = time.monotonic() - start
    evaluation = trainer.evaluate()
    trainer.save_model(str(context.folder))
    return {"loss": loss, "train_seconds": seconds}, evaluation


def ranked(rows: Rows) -> Dataset:
    """Makes a ranked data set: the samples of each prompt with the verifier's ratings."""
    columns = ("prompt", "completions", "ratings")
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def train_and_reload(
    context: StageContext, trainer: Trainer, rows: Rows, score: Score, metrics: Sequence[str]
) -> tuple[dict[str, Any], list[list[list[float]]]]:
    """
    Trains, evaluates and saves to the stage's folder. Then loads the model from that folder alone and scores rows.

    Args:
        context ([`StageContext`]): the stage.
        trainer ([`~transformers.Trainer`]): a trainer that is ready to train.
        rows (`Sequence[Mapping]`): held-out rows, each with `prompt` and K `completions`.
        score (`Callable`): gets the scores from a scorer, see `Score`.
        metrics (`Sequence[str]`): the metrics of the trainer's evaluation to report. Metrics that are undefined for
            these rows are left out.

    Returns:
        The report and the scores of each completion of each row. The report has the mean `loss`, the metrics, the
        largest change of a score after saving and reloading (`reload_difference`), the standard deviation of the
        scores (`score_std`), and the seconds of training and of scoring.
    """
    trained, evaluation = train_and_save(context, trainer)
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    completions = [text for row in rows for text in row["completions"]]
    in_memory = RewardScorer(trainer.model, processing_class=trainer.processing_class)
    before = _flat(score(in_memory, prompts[:RELOADED], completions[:RELOADED]))
    del in_memory

    start = time.monotonic()
    scores = score(RewardScorer(context.folder), prompts, completions)
    score_seconds = time.monotonic() - start
    context.progress(1.0)
    report = {
        **trained,
        **{name: evaluation[f"eval_{name}"] for name in metrics if f"eval_{name}" in evaluation},
        "reload_difference": (_flat(scores[:RELOADED]) - before).abs().max().item(),
        "score_std": _flat(scores).std().item(),
        "score_seconds": score_seconds,
    }
    remaining = iter(scores)
    return report, [[next(remaining) for _ in row["completions"]] for row in rows]


def picks(rows: Rows, scores: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> dict[str, Any]:
    """[`~trl_ext.demo.picking.compare_picks`] on rows of the stage `samples`, and `n`, the samples per row."""
    answers = [[final_answer(text) for text in row["completions"]] for row in rows]
    found = compare_picks([row["answer_right"] for row in rows], answers, scores, weights)
    return {**found, "n": len(scores[0])}


def _flat(scores: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor([number for several in scores for number in several])
