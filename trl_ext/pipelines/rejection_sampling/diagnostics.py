"""Diagnostics of a round of sampling and selecting: metrics, a plot, a warning of reward hacking, and a model card.

This module knows samples, arrays of them and the history of rounds. It does not know models. Only the plot needs
matplotlib.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext.pipelines.generation.records import Sample
from trl_ext.pipelines.rejection_sampling.generate_and_score import length_of
from trl_ext.pipelines.rejection_sampling.scored import Scored, Selection, group_numbers
from trl_ext.pipelines.reward_functions import weighted_total
from trl_ext.trainers.common.model_card import name_in_card
from trl_ext.trainers.common.policy_card import policy_card, rounds_section


logger = logging.getLogger(__name__)


def round_metrics(scored: Scored, selection: Selection) -> dict[str, float]:
    """
    Metrics of the samples of a round and of the selected ones.

    Args:
        scored ([`Scored`]):
            All samples of the round, which [`select`] got.
        selection ([`Selection`]):
            The selection that [`select`] returned.

    Returns:
        `dict[str, float]`: the metrics of the table in `docs/reference/metrics.md`, without those that the data do not
        define (a mean of nothing).
    """
    known = ~np.isnan(scored.score)
    taken = selection.rows if selection.rejected is None else np.concatenate([selection.rows, selection.rejected])
    taken = np.unique(taken)
    metrics = {f"{name}": float(count) for name, count in selection.counts.items()}
    metrics |= _share("acceptance", len(taken), len(scored))
    metrics |= _share("unscorable_share", (~known).sum(), len(scored))
    metrics |= _share("truncated_share", (~scored.finished).sum(), len(scored))
    texts = np.unique(np.stack([scored.prompt.astype(np.uint64), scored.text_hash]), axis=1).shape[1]
    metrics |= _share("distinct_share", texts, len(scored))
    metrics |= _mean("length", scored.length) | _mean("selected_length", scored.length[selection.rows])
    metrics |= _mean("reward", scored.score[known]) | _mean("selected_reward", scored.score[selection.rows])
    if not known.any():
        return metrics
    metrics["reward_std"] = float(scored.score[known].std())

    order = np.argsort(scored.prompt[known], kind="stable")
    score, length = scored.score[known][order], scored.length[known][order].astype(np.float64)
    group, sizes = group_numbers(scored.prompt[known][order])
    first = np.cumsum(sizes) - sizes
    with np.errstate(invalid="ignore"):  # infinite scores
        spread = np.maximum.reduceat(score, first) - np.minimum.reduceat(score, first)
    metrics["decidable"] = float((spread > 0).mean())
    metrics["reward_spread"] = float(spread.mean())
    within_score = score - (np.bincount(group, score) / sizes)[group]
    within_length = length - (np.bincount(group, length) / sizes)[group]
    scale = np.sqrt((within_score**2).sum() * (within_length**2).sum())
    if scale > 0:
        metrics["length_correlation"] = float((within_score * within_length).sum() / scale)
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def evaluation_metrics(
    groups: Iterable[Sequence[Sample]], weights: Mapping[str, float], verifier: str | None
) -> dict[str, float]:
    """
    Mean reward, verifier score and length of a policy's samples.

    Args:
        groups (iterable of `Sequence[Sample]`):
            The scored samples of each prompt.
        weights (`Mapping[str, float]`):
            The weight of each reward function, by name.
        verifier (`str`, *optional*):
            The name of the verifier.

    Returns:
        `dict[str, float]`: `eval_reward`, `eval_verifier` and `eval_length`, means over prompts of means over their
        samples, the first two with the standard error of the mean over prompts (`_error`) if there are several.
    """
    values: dict[str, list[float]] = {"reward": [], "verifier": [], "length": []}
    for group in groups:
        totals = [weighted_total({name: sample.scores[name] for name in weights}, weights) for sample in group]
        columns = {"reward": totals, "length": [float(length_of(sample)) for sample in group]}
        if verifier is not None:
            columns["verifier"] = [sample.scores[verifier] for sample in group]
        for name, column in columns.items():
            known = [value for value in column if value is not None]
            if known:
                values[name].append(sum(known) / len(known))
    metrics = {}
    for name, means in values.items():
        if means:
            metrics[f"eval_{name}"] = float(np.mean(means))
        if len(means) > 1 and name != "length":
            metrics[f"eval_{name}_error"] = float(np.std(means, ddof=1) / np.sqrt(len(means)))
    return metrics


def hacking_warning(history: Sequence[Mapping[str, float]], width: float = 2.0) -> str | None:
    """
    A warning if the reward rises while the verifier, which checks what the reward stands for, does not.

    Args:
        history (`Sequence[Mapping[str, float]]`):
            The metrics of each round, the policy before training first.
        width (`float`, *optional*, defaults to `2.0`):
            How many standard errors of the difference count as a rise. The errors ignore that the rounds share their
            prompts, so the warning comes late rather than too often.

    Returns:
        `str` or `None`: a sentence with the numbers if the last `eval_reward` is above the first by more than `width`
        standard errors and `eval_verifier` is not. `None` otherwise, and if there is no verifier.
    """
    names = ("eval_reward", "eval_verifier")
    if len(history) < 2 or not all(f"{name}_error" in history[at] for at in (0, -1) for name in names):
        return None
    if not _rose(history, "eval_reward", width) or _rose(history, "eval_verifier", width):
        return None
    first, last = history[0], history[-1]
    return (
        f"The reward rose from {first['eval_reward']:.4g} to {last['eval_reward']:.4g} while the verifier went from "
        f"{first['eval_verifier']:.4g} to {last['eval_verifier']:.4g}. The policy may be learning the reward's "
        "mistakes. Look at samples with a high reward, train fewer rounds, or use a better reward."
    )


def no_gain_warning(history: Sequence[Mapping[str, float]], best: int) -> str | None:
    """
    A warning if no round is better than the policy before training: by the verifier if there is one, else the reward.

    Args:
        history (`Sequence[Mapping[str, float]]`): the metrics of each round, the policy before training first.
        best (`int`): the round whose policy is kept.
    """
    name = "eval_verifier" if "eval_verifier" in history[0] else "eval_reward"
    if name not in history[0] or history[best][name] > history[0][name]:
        return None
    return (
        f"No round is better than the policy before training: {name} {history[0][name]:.4g} before training, "
        f"{history[best][name]:.4g} after round {best}. The policy of that round is kept."
    )


def _rose(history: Sequence[Mapping[str, float]], name: str, width: float) -> bool:
    first, last = history[0], history[-1]
    return last[name] - first[name] > width * float(np.hypot(first[f"{name}_error"], last[f"{name}_error"]))


def log_rounds(rows: Sequence[Mapping[str, float]], plot: Path | None) -> None:
    """Log the metrics of rounds, and a plot, to the open W&B run, if there is one. A failure gives a warning."""
    try:
        import wandb

        if wandb.run is None:  # before the first fine-tuning
            return
        wandb.define_metric("round/*", step_metric="round/round")
        for row in rows:
            wandb.log({f"round/{name}": value for name, value in row.items()})
        if plot is not None:
            wandb.log({"round/plot": wandb.Image(str(plot))})
    except Exception as error:  # training should survive a full disk or a dead service
        logger.warning(f"The metrics of round {rows[-1]['round']} could not be logged to Weights & Biases: {error!r}")


def plot_rounds(history: Sequence[Mapping[str, float]], path: str | Path) -> bool:
    """
    Draw reward and verifier, lengths, and shares over the rounds.

    Args:
        history (`Sequence[Mapping[str, float]]`):
            The metrics of each round; a line has a point wherever a round has the metric.
        path (`str` or `Path`):
            The PNG to write.

    Returns:
        `bool`: `False` if nothing was drawn, because matplotlib (the extra `plots`) is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = {
        "rewards": ("reward", "selected_reward", "eval_reward", "eval_verifier"),
        "tokens": ("length", "selected_length"),
        "shares": ("decidable", "acceptance", "distinct_share", "truncated_share"),
    }
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            points = [(row["round"], row[name]) for row in history if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(title=title, xlabel="round")
        axes.set_xticks([row["round"] for row in history])
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _share(name: str, part: int, whole: int) -> dict[str, float]:
    return {name: float(part / whole)} if whole else {}


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(values.mean())} if len(values) else {}


def rounds_card(trainer: Any, weights: dict[str, float], base: str, folder: Path) -> str:
    """
    The model card of the policy that a `RejectionSamplingTrainer` keeps.

    Args:
        trainer: its arguments, `history` and `best_round` are read.
        weights (`dict[str, float]`): the weight of each reward function.
        base (`str`): Hub id or folder of the policy before training; empty for one in memory.
        folder (`Path`): where the policy is saved.
    """
    args, history = trainer.args, trainer.history
    facts = {
        "rounds": f"{len(history) - 1}, of which round {trainer.best_round} is kept",
        "sampling": f"{args.num_generations} completions for each prompt, temperature {args.temperature:g}",
        "reward": ", ".join(f"{weight:g} x {name}" for name, weight in weights.items()),
        "selection": args.selection if isinstance(args.selection, str) else repr(args.selection),
        "learning rate": f"{args.learning_rate:g}",
        "seed": str(args.seed),
    }
    adapter = (folder / "adapter_config.json").is_file()
    what = "A language model that learned from its own best completions."
    return policy_card(trainer, facts, rounds_section(history), name_in_card(trainer, folder), base, adapter, what)
