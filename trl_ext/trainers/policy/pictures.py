"""Pictures of a policy's training, made by matplotlib from what the trainer logged: curves, and rewards by step.

They have grey text, and no background as SVG, so that they can stand on a light and on a dark page. The module knows
the names of metrics. It does not know trainers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_ext.style import BLUE, GREEN, GREY, ORANGE, PICTURE_STYLE, as_file, colour, matplotlib_is_there
from trl_ext.trainers.policy.watch import POSITIONS, RISES


# One entry of a trainer's log.
Entry = Mapping[str, Any]


class Curves(NamedTuple):
    """One picture: its title, the quantity and unit of its vertical axis, and its metrics with their names."""

    title: str
    axis: str
    metrics: Mapping[str, str]


# By the name of the picture's file, after `policy_`.
CURVES = {
    "reward": Curves("Reward and verifier", "mean over completions", {"reward": "weighted sum of the scalar rewards"}),
    "dense": Curves(
        "Dense rewards", "mean sum over a completion", {"rewards/dense/mean": "dense rewards of a completion"}
    ),
    "critic": Curves(
        "Critic (1 is perfect, 0 is a constant)", "explained variance", {"critic/explained_variance": "critic"}
    ),
    "kl": Curves("KL divergence to the reference", "nats per token", {"kl": "KL"}),
    "clipped": Curves(
        "Clipped tokens",
        "share of tokens",
        {"clip_ratio/region_mean": "probability ratio (policy)", "critic/clip_share": "value (critic)"},
    ),
    "hacking": Curves(
        "Watch for reward hacking",
        "trend in standard errors",
        {
            "watch/reward_trend": "reward",
            "watch/dense_reward_trend": "dense reward",
            "watch/verifier_trend": "verifier",
        },
    ),
    "length": Curves("Length of completions", "tokens", {"completions/mean_length": "tokens"}),
    "count": Curves("Rewards in a completion", "rewards (of steps)", {"dense/rewards_per_completion": "rewards"}),
    "step_length": Curves("Length of steps", "tokens in a step", {"watch/tokens_per_step": "tokens"}),
    "repetition": Curves(
        "Repetition within a completion", "share of runs of four tokens", {"watch/repetition": "repeated"}
    ),
}
INKS = (BLUE, ORANGE, GREEN, GREY)
SIZE = (5.4, 3.2)


def draw(history: Sequence[Entry], *kinds: str) -> dict[str, dict[str, bytes]]:
    """
    Every picture that the log has numbers for, without matplotlib none.

    Args:
        history (`Sequence[Mapping]`): a trainer's `state.log_history`.
        *kinds (`str`): `"png"` (on white), `"svg"` (without a background), or both.

    Returns:
        `dict[str, dict[str, bytes]]`: the content of each kind of file, by the picture's name (`"policy_reward"`).
    """
    if not matplotlib_is_there():
        return {}
    import matplotlib

    with matplotlib.rc_context(PICTURE_STYLE):
        return {name: {kind: as_file(figure, kind) for kind in kinds} for name, figure in _figures(history)}


def write_pictures(folder: Path, history: Sequence[Entry]) -> list[Path]:
    """Write each picture as a PNG into a folder, which is made, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, content in draw(history, "png").items():
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(content["png"])
    return files


def curve(history: Sequence[Entry], name: str) -> list[tuple[int, float]]:
    """The logged values of a metric with their steps; gaps and values that are not finite are left out."""
    found = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None]
    return [(step, value) for step, value in found if math.isfinite(value)]


def metrics_of(name: str, history: Sequence[Entry]) -> dict[str, str]:
    """The metrics of a picture with their names in its legend; that of the reward has each reward function."""
    metrics = dict(CURVES[name].metrics)
    if name == "reward":
        seen = dict.fromkeys(name for entry in history for name in entry)
        scalar = [name for name in seen if name.startswith("rewards/") and name.endswith("/mean")]
        scalar = [name for name in scalar if name != "rewards/dense/mean"]
        if len(scalar) == 1 and curve(history, scalar[0]) == curve(history, "reward"):
            metrics.clear()  # the only reward function, with weight 1
        metrics |= {name: name.split("/")[1] for name in scalar}
    return metrics


def _figures(history: Sequence[Entry]) -> Iterator[tuple[str, Any]]:
    for name, wanted in CURVES.items():
        curves = {label: curve(history, metric) for metric, label in metrics_of(name, history).items()}
        curves = {label: points for label, points in curves.items() if len(points) > 1}
        if curves:
            yield f"policy_{name}", _lines(wanted, curves, level=RISES if name == "hacking" else None)
        if name == "dense":
            of_steps = {"policy_steps": _by_position(history), "policy_first_low": _first_low(history)}
            yield from ((file, figure) for file, figure in of_steps.items() if figure is not None)


def _axes(title: str, across: str, up: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _lines(wanted: Curves, curves: Mapping[str, Sequence[tuple[int, float]]], level: float | None) -> Any:
    figure, axes = _axes(wanted.title, "training step", wanted.axis)
    for place, (label, points) in enumerate(curves.items()):
        style = "--" if place % 2 else "-"  # curves that coincide show both
        few = "." if len(points) < 40 else None
        axes.plot(*zip(*points, strict=True), color=INKS[place % 4], linestyle=style, marker=few, label=label)
    if level is not None:
        axes.axhline(level, color=GREY, linestyle=":", label="suspicious if the reward alone is above")
    if len(curves) > 1 or level is not None or wanted is CURVES["reward"]:
        axes.legend(fontsize=8)
    low, high = axes.get_ylim()
    if wanted is CURVES["critic"]:  # a critic that has learned nothing yet may be far below 0
        axes.set_ylim(max(-1.05, min(low, -0.1)), 1.05)
    elif wanted.axis.startswith("share"):
        axes.set_ylim(0, max(high, 0.01))
    return figure


def _shares(history: Sequence[Entry], prefix: str) -> list[tuple[int, dict[int, float]]]:
    """Of each entry with such metrics: the training step, and the values by position of the step in a completion."""
    found = []
    for entry in history:
        values = {int(name.removeprefix(prefix)): value for name, value in entry.items() if name.startswith(prefix)}
        values = {position: value for position, value in values.items() if value is not None}
        if values:
            found.append((entry["step"], dict(sorted(values.items()))))
    return found


def _by_position(history: Sequence[Entry]) -> Any:
    """The mean reward of first steps, of second steps, and so on, in the first and in the last entry."""
    logs = _shares(history, "dense/reward_at_step_")
    if not logs:
        return None
    figure, axes = _axes("Reward by step", "position of the step in its completion", "mean reward")
    for (step, values), ink in zip(logs[:1] + logs[1:][-1:], (GREY, BLUE), strict=False):
        axes.plot(list(values), list(values.values()), marker="o", color=ink, label=f"training step {step}")
    last = max(max(values) for _, values in logs)
    axes.set_xticks(range(1, last + 1), _positions(last))
    axes.legend(fontsize=8)
    return figure


def _first_low(history: Sequence[Entry]) -> Any:
    """The shares of completions whose first low reward is at the first step, at the second, and so on, over time."""
    logs = _shares(history, "dense/first_low_at_step_")
    if len(logs) < 2:
        return None
    without = dict(curve(history, "dense/without_low_step"))
    last = max(max(values) for _, values in logs)
    figure, axes = _axes("First step with a low reward", "training step", "share of completions")
    layers = [[values.get(position, 0.0) for _, values in logs] for position in range(1, last + 1)]
    layers.append([without.get(step, 0.0) for step, _ in logs])
    labels = [f"step {position}" for position in _positions(last)] + ["none is low"]
    inks = [tuple(part / 255 for part in colour(0.55 * n / last)) for n in range(last)]
    inks.append(tuple(part / 255 for part in colour(1.0)))
    steps = [step for step, _ in logs]
    axes.stackplot(steps, layers, labels=labels, colors=inks, edgecolor="white", linewidth=0.3)
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1))
    handles = axes.get_legend_handles_labels()[0]
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8)
    return figure


def _positions(last: int) -> list[str]:
    """The names of positions; the metrics count all later steps at the last one."""
    return [f"{n}+" if n == POSITIONS else str(n) for n in range(1, last + 1)]
