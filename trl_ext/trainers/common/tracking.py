"""Weights & Biases: one run per trainer, a sample table and histograms of an evaluation, and never a crash.

Knows runs, tables and the trainer's arguments. Knows nothing of models or losses. Nothing is opened or sent unless
`report_to` names `wandb`, and no step number is ever passed (several trainers may share a run).
"""

import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from transformers import Trainer, TrainingArguments
from transformers.integrations import WandbCallback, is_wandb_available, rewrite_logs

from trl_ext.metrics.disagreement import error_by_decile


logger = logging.getLogger(__name__)

# Ids of the runs that our trainers opened in this process, and which trainer opened which.
_OPENED: set[str] = set()
_RUN_OF: weakref.WeakKeyDictionary[Trainer, str] = weakref.WeakKeyDictionary()


@dataclass
class ScoredGroup:
    """One evaluated group as it appears in the sample table."""

    prompt: str
    completions: list[str]
    scores: list[float]
    ratings: list[float]


class SafeWandbCallback(WandbCallback):
    """Transformers' callback, except that a failure of W&B is a warning, given once, and training goes on."""

    def __init__(self):
        super().__init__()
        self._warned = False

    def _safely(self, event: Callable, *args, **kwargs) -> None:
        try:
            event(*args, **kwargs)
        except Exception as error:  # a full disk, a dead service, a broken connection: none may stop training
            if not self._warned:
                self._warned = True
                logger.warning(f"Weights & Biases failed; training goes on and keeps trying to report: {error!r}")

    def on_train_begin(self, *args, **kwargs) -> None:
        self._safely(super().on_train_begin, *args, **kwargs)

    def on_train_end(self, *args, **kwargs) -> None:
        self._safely(super().on_train_end, *args, **kwargs)

    def on_log(self, *args, **kwargs) -> None:
        self._safely(super().on_log, *args, **kwargs)

    def on_save(self, *args, **kwargs) -> None:
        self._safely(super().on_save, *args, **kwargs)

    def on_predict(self, *args, **kwargs) -> None:
        self._safely(super().on_predict, *args, **kwargs)


def without_missing_wandb(args: TrainingArguments) -> None:
    """Take `wandb` out of `report_to`, with a warning, where it is not installed or switched off."""
    if "wandb" in args.report_to and not is_wandb_available():
        logger.warning(
            "report_to names 'wandb', which is not installed or disabled by WANDB_DISABLED: not reported to."
        )
        args.report_to = [name for name in args.report_to if name != "wandb"]


def open_run(trainer: Trainer) -> None:
    """
    Give the trainer a W&B run of its own.

    A run that the user opened is reused and left open. A run that another of our trainers opened in this process is
    finished first, so that its name and steps stay its own; a trainer whose run was finished that way gets it back
    when it is used again. `WANDB_PROJECT` and `WANDB_RUN_GROUP` apply as always. If W&B fails, reporting to it is
    switched off with a warning and training goes on.
    """
    if not trainer.is_world_process_zero() or "wandb" not in trainer.args.report_to:
        return
    try:
        import wandb

        own = _RUN_OF.get(trainer)
        if wandb.run is not None and wandb.run.id in _OPENED and wandb.run.id != own:
            wandb.run.finish()
        if wandb.run is None:
            again = {} if own is None else {"id": own, "resume": "allow"}
            project = os.environ.get("WANDB_PROJECT", "huggingface")
            run = wandb.init(project=project, name=trainer.args.run_name, **again)
            _OPENED.add(run.id)
            _RUN_OF[trainer] = run.id
            _replace_callback(trainer, SafeWandbCallback)  # a new one describes the new run
    except Exception as error:  # a missing key, an unreachable server, a full disk: none may stop training
        logger.warning(f"Weights & Biases could not be started and is switched off for this run: {error!r}")
        trainer.remove_callback(WandbCallback)
        trainer.args.report_to = [name for name in trainer.args.report_to if name != "wandb"]


def use_safe_callback(trainer: Trainer) -> None:
    """Replace the callback that Transformers added for `report_to`; one that the user wrote is left alone."""
    _replace_callback(trainer, WandbCallback)


def _replace_callback(trainer: Trainer, kind: type[WandbCallback]) -> None:
    # in place: a callback before it in the list would see the logs later, and some take entries out
    callbacks = trainer.callback_handler.callbacks
    for position, callback in enumerate(callbacks):
        if type(callback) is kind:
            callbacks[position] = SafeWandbCallback()


def log_evaluation(trainer: Trainer, groups: list[ScoredGroup], scores: list[float], prefix: str) -> None:
    """
    Log a table of sample groups (prompt, completion, score, rank by score, rating) and a histogram of all scores.

    Does nothing unless W&B is reported to and a run is open; a failure is a warning.
    """
    rows = []
    for number, group in enumerate(groups):
        order = sorted(group.scores, reverse=True)
        for completion, score, rating in zip(group.completions, group.scores, group.ratings, strict=True):
            rows.append([number, group.prompt, completion, score, order.index(score) + 1, rating])
    log_table(trainer, ["group", "prompt", "completion", "score", "rank", "rating"], rows, scores, prefix)


def log_table(trainer: Trainer, columns: list[str], rows: list[list], scores: list[float], prefix: str) -> None:
    """Log `<prefix>_samples`, a table, if it has rows, and `<prefix>_scores`, a histogram; as `log_evaluation`."""
    if "wandb" not in trainer.args.report_to or not trainer.is_world_process_zero() or not scores:
        return
    try:
        import wandb

        if wandb.run is None:
            return
        content = {f"{prefix}_scores": wandb.Histogram(scores)}
        if rows:
            content[f"{prefix}_samples"] = wandb.Table(columns=columns, data=rows)
        wandb.log({**rewrite_logs(content), "train/global_step": trainer.state.global_step})
    except Exception as error:
        logger.warning(f"The evaluation's table could not be logged to Weights & Biases: {error!r}")


def log_disagreement(trainer: Trainer, groups: list[tuple[float, float]], prefix: str) -> None:
    """
    Log how an ensemble's disagreement (first) goes with its errors (second, a share of wrong pairs) in groups.

    `<prefix>_disagreement_histogram`, and `<prefix>_disagreement_deciles`: groups in ten parts by disagreement, with
    the error rate of each. As `log_evaluation`, nothing where nobody listens.
    """
    if "wandb" not in trainer.args.report_to or not trainer.is_world_process_zero() or not groups:
        return
    try:
        import wandb

        if wandb.run is None:
            return
        content = {
            f"{prefix}_disagreement_histogram": wandb.Histogram([spread for spread, _ in groups]),
            f"{prefix}_disagreement_deciles": wandb.Table(
                columns=["decile", "groups", "mean_disagreement", "error_rate"], data=error_by_decile(groups)
            ),
        }
        wandb.log({**rewrite_logs(content), "train/global_step": trainer.state.global_step})
    except Exception as error:
        logger.warning(f"The ensemble's disagreement could not be logged to Weights & Biases: {error!r}")
