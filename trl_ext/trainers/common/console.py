"""The metrics that a terminal shows while a command trains: the few that tell how it goes.

Knows callbacks and the names of metrics. What it leaves out still goes to W&B and to `trainer_state.json`.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments


SHOWN = 5
# What tells most, first. Of an entry the first five that it has are shown, and its epoch.
ORDER = (
    "train_loss",
    "loss",
    "accuracy",
    "reward",
    "critic/explained_variance",
    "kl",
    "processbench_f1",
    "auc",
    "spearman",
    "margin",
    "grad_norm",
    "learning_rate",
    "length_accuracy",
    "best_of_n",
    "balanced_accuracy",
    "first_error_accuracy",
    "top1_agreement",
    "disagreement",
    "runtime",
)


def important(logs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The five metrics of a log entry that tell most, and its epoch.

    An entry with five metrics or fewer, and one without any known name, is returned as it is.

    ```python
    >>> important({"loss": 0.6, "accuracy": 0.7, "margin": 0.1, "ndcg": 0.9, "grad_norm": 1.0, "learning_rate": 1e-4,
    ...            "kendall_tau": 0.4, "epoch": 1.0})
    {'loss': 0.6, 'accuracy': 0.7, 'margin': 0.1, 'grad_norm': 1.0, 'learning_rate': 0.0001, 'epoch': 1.0}
    ```
    """
    rest = {name: value for name, value in logs.items() if name not in ("epoch", "total_flos")}
    if len(rest) <= SHOWN:
        return dict(logs)
    ranked = sorted((name for name in rest if _rank(name) < len(ORDER)), key=_rank)
    if not ranked:
        return dict(logs)
    chosen = {name: rest[name] for name in ranked[:SHOWN]}
    return {**chosen, **({"epoch": logs["epoch"]} if "epoch" in logs else {})}


def _rank(name: str) -> int:
    plain = name.removeprefix("eval_")
    if plain in ORDER:
        return ORDER.index(plain)
    if plain.startswith(("min_", "mean_", "max_")):  # `min_reward` of a reward model is not a policy's `reward`
        return len(ORDER)
    # one of several evaluation sets, or of several categories: `eval_maths_loss`, `factuality_auc`
    ends = [place for place, known in enumerate(ORDER) if plain.endswith(f"_{known}") and "member" not in plain]
    return min(ends, default=len(ORDER))


class ShortProgressCallback(ProgressCallback):
    """Transformers' progress bar, which writes the important metrics only."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_log(args, state, control, logs=important(logs or {}), **kwargs)


class ShortPrinterCallback(PrinterCallback):
    """Transformers' printer, which prints the important metrics only."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_log(args, state, control, logs=important(logs or {}), **kwargs)


def show_important_metrics(trainer: Trainer) -> None:
    """Put these callbacks in the place of transformers' own; one that the user wrote stays."""
    short = {ProgressCallback: ShortProgressCallback, PrinterCallback: ShortPrinterCallback}
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if type(callback) in short:
            callbacks[place] = short[type(callback)]()
