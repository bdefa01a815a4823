"""Weights & Biases: one run per trainer, and tables, histograms, pages and pictures on it. It never crashes.

It knows runs, tables and the trainer's arguments. It knows nothing of models or losses. It opens and sends nothing
unless `report_to` names `wandb`. It never passes a step number, because several trainers may share a run.
"""

import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.integrations import WandbCallback, is_wandb_available, rewrite_logs

from trl_ext.metrics.disagreement import error_by_decile


logger = logging.getLogger(__name__)

# Ids of the runs that our trainers opened in this process, and the run that each trainer opened.
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
    """Transformers' callback, but a failure of W&B only gives a warning (once), and training continues."""

    def __init__(self):
        super().__init__()
        self._warned = False

    def _safely(self, event: Callable, *args, **kwargs) -> None:
        try:
            event(*args, **kwargs)
        except Exception as error:  # a full disk, a dead service, a broken connection: none may stop training
            if not self._warned:
                self._warned = True
                logger.warning(f"Weights & Biases failed; training continues and keeps trying to report: {error!r}")

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
    """Remove `wandb` from `report_to`, with a warning, if it is not installed or switched off."""
    if "wandb" in args.report_to and not is_wandb_available():
        logger.warning(
            "report_to names 'wandb', but wandb is not installed, or WANDB_DISABLED is set. Nothing goes to it. "
            "Install it with `pip install wandb`, or leave 'wandb' out of report_to."
        )
        args.report_to = [name for name in args.report_to if name != "wandb"]


def open_run(trainer: Trainer) -> None:
    """
    Open a W&B run for the trainer.

    If you opened a run, the trainer uses it and leaves it open. If another of our trainers opened a run in this
    process, that run is finished first, so that names and steps of the two do not mix. When that other trainer is used
    again, its run is resumed. `WANDB_PROJECT` and `WANDB_RUN_GROUP` apply as usual. If W&B fails, a warning is logged,
    reporting to it is switched off, and training continues.
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
            _replace_callback(trainer, SafeWandbCallback)  # a new callback describes the new run
    except Exception as error:  # a missing key, an unreachable server, a full disk: none may stop training
        logger.warning(f"Weights & Biases could not be started and is switched off for this run: {error!r}")
        trainer.remove_callback(WandbCallback)
        trainer.args.report_to = [name for name in trainer.args.report_to if name != "wandb"]


def use_safe_callback(trainer: Trainer) -> None:
    """Replace the callback that Transformers added for `report_to`. A callback of the user's own class stays."""
    _replace_callback(trainer, WandbCallback)


def _replace_callback(trainer: Trainer, kind: type[WandbCallback]) -> None:
    # in place, because the order matters: some callbacks remove entries of the logs, and later ones do not see them
    callbacks = trainer.callback_handler.callbacks
    for position, callback in enumerate(callbacks):
        if type(callback) is kind:
            callbacks[position] = SafeWandbCallback()


def log_evaluation(trainer: Trainer, groups: list[ScoredGroup], scores: list[float], prefix: str) -> None:
    """
    Log a table of sample groups (prompt, completion, score, rank by score, rating) and a histogram of all scores.

    See `log_media` for when it does nothing.
    """
    rows = []
    for number, group in enumerate(groups):
        order = sorted(group.scores, reverse=True)
        for completion, score, rating in zip(group.completions, group.scores, group.ratings, strict=True):
            rows.append([number, group.prompt, completion, score, order.index(score) + 1, rating])
    log_table(trainer, ["group", "prompt", "completion", "score", "rank", "rating"], rows, scores, prefix)


def log_table(trainer: Trainer, columns: list[str], rows: list[list], scores: list[float], prefix: str) -> None:
    """Log the histogram `<prefix>_scores`, and the table `<prefix>_samples` if it has rows. See `log_media`."""

    def content(wandb: Any) -> dict[str, Any]:
        table = {f"{prefix}_samples": wandb.Table(columns=columns, data=rows)} if rows else {}
        return {f"{prefix}_scores": wandb.Histogram(scores)} | table

    if scores:
        log_media(trainer, content)


def log_disagreement(trainer: Trainer, groups: list[tuple[float, float]], prefix: str) -> None:
    """
    Log how the disagreement of an ensemble relates to its errors.

    It logs `<prefix>_disagreement_histogram` and the table `<prefix>_disagreement_deciles`, which splits the groups
    into ten parts by disagreement and has the error rate of each part. See `log_media` for when it does nothing.

    Args:
        trainer (`Trainer`): its run is used.
        groups (`list[tuple[float, float]]`): of each group, the disagreement and the share of wrong pairs.
        prefix (`str`): of the names, e.g. `"eval"`.
    """

    def content(wandb: Any) -> dict[str, Any]:
        columns = ["decile", "groups", "mean_disagreement", "error_rate"]
        return {
            f"{prefix}_disagreement_histogram": wandb.Histogram([spread for spread, _ in groups]),
            f"{prefix}_disagreement_deciles": wandb.Table(columns=columns, data=error_by_decile(groups)),
        }

    if groups:
        log_media(trainer, content)


def log_media(trainer: Trainer, make: Callable[[Any], dict[str, Any]]) -> None:
    """
    Log tables, histograms, pages and pictures at the trainer's step.

    It does nothing unless `report_to` names `wandb`, a run is open and this is the main process. A failure only gives
    a warning.

    Args:
        trainer (`Trainer`): its run is used.
        make (`Callable`): gets the module `wandb` and returns the content by name. It is called only where there is a
            run. `train/` goes before names that do not begin with `eval_` or `test_`, as for metrics.
    """
    if "wandb" not in trainer.args.report_to or not trainer.is_world_process_zero():
        return
    try:
        import wandb

        if wandb.run is None:
            return
        content = make(wandb)
        if content:
            wandb.log({**rewrite_logs(content), "train/global_step": trainer.state.global_step})
    except Exception as error:
        logger.warning(f"Tables or pictures could not be logged to Weights & Biases: {error!r}")
