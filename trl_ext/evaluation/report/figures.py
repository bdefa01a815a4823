"""The pictures of a report, made by matplotlib: reliability, scores, probes, best of n.

They have grey text and no background, so that they can stand on a light and on a dark page. It knows a report's
numbers.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from trl_ext.evaluation.report.findings import Findings
from trl_ext.style import BLUE, GREEN, GREY, ORANGE, PICTURE_STYLE, as_file


def draw(report: Findings, kind: Literal["png", "svg"]) -> dict[str, bytes]:
    """Every picture that the report has numbers for, by name; of several data sets `<picture>_<data set>`."""
    import matplotlib
    from matplotlib.figure import Figure

    pictures = {}
    with matplotlib.rc_context(PICTURE_STYLE):
        for prefix in report.prefixes():
            for name, make in _PICTURES.items():
                figure = Figure(figsize=(5.4, 3.6), layout="constrained")
                if make(figure, report, prefix):
                    pictures[name + _suffix(prefix)] = as_file(figure, kind)
        figure = Figure(layout="constrained")
        if _probes(figure, report):
            pictures["probes"] = as_file(figure, kind)
    return pictures


def _suffix(prefix: str) -> str:
    """The name of a data set as part of a file's name."""
    return f"_{re.sub('[^A-Za-z0-9.-]+', '-', prefix[:-1])}" if prefix else ""


def _title(what: str, prefix: str) -> str:
    return f"{what}: {prefix[:-1]}" if prefix else what


def _reliability(figure: Any, report: Findings, prefix: str) -> bool:
    points = report.curves.get(f"{prefix}reliability", [])
    if len(points) < 2:
        return False
    axes = figure.subplots()
    x, y = ([point[name] for point in points] for name in ("confidence", "right"))
    sizes = np.array([point["size"] for point in points])
    low = 0.5 if min(x) >= 0.5 else 0.0
    axes.plot([low, 1], [low, 1], color=GREY, linestyle=":", label="perfectly calibrated")
    axes.plot(x, y, color=BLUE)
    axes.scatter(x, y, s=12 + 120 * sizes / sizes.max(), color=BLUE, label="this model (area: rows)")
    title = _title("Calibration", prefix)
    axes.set(xlabel="confidence", ylabel="share that is right", title=title, xlim=(low, 1.02), ylim=(0, 1.05))
    axes.legend(loc="lower right")
    return True


def _scores(figure: Any, report: Findings, prefix: str) -> bool:
    found = {
        key.removeprefix(prefix): np.asarray(scores)
        for key, scores in sorted(report.histogram.items())
        if key.startswith(prefix)
    }
    if not any(len(scores) > 1 for scores in found.values()):
        return False
    axes = figure.subplots()
    values = np.concatenate(list(found.values()))
    low, high = np.quantile(values, [0.001, 0.999])
    edges = np.linspace(low, high, 41) if high > low else 10
    for name, scores in found.items():
        colour = GREEN if name in ("chosen", "right") else ORANGE if len(found) > 1 else BLUE
        axes.hist(scores, bins=edges, alpha=0.55, color=colour, label=f"{name} ({len(scores)})")
    axes.set(xlabel="score", ylabel="completions", title=_title("Scores", prefix))
    axes.legend()
    return True


def _best_of_n(figure: Any, report: Findings, prefix: str) -> bool:
    points = report.curves.get(f"{prefix}best_of_n", [])
    if len(points) < 2:
        return False
    axes = figure.subplots()
    n = [point["n"] for point in points]
    axes.plot(n, [point["oracle"] for point in points], color=GREY, linestyle="--", label="oracle (gold)")
    axes.plot(n, [point["gold"] for point in points], color=GREEN, marker="o", label="picked by this model (gold)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [f"{point['n']}\n{point['kl']:.1f}" for point in points])
    for name, colour in (("best_n", GREEN), ("predicted_n", ORANGE)):
        found = report.metrics.get(prefix + name, math.nan)
        if math.isfinite(found):
            axes.axvline(found, color=colour, linestyle=":", label=f"{name.replace('_', ' ')}: {found:.0f}")
    other = axes.twinx()
    other.spines.right.set_visible(True)
    other.plot(n, [point["proxy"] for point in points], color=BLUE, marker=".", label="picked by this model (score)")
    other.set_ylabel("score (blue)")
    axes.set(xlabel="n, and below it the KL from the policy in nats", ylabel="gold reward")
    axes.set_title(_title("Best of n", prefix))
    lines = [line for each in (axes, other) for line in each.get_legend_handles_labels()[0]]
    figure.set_size_inches(5.4, 4.3)
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=2, fontsize=8)
    return True


def _probes(figure: Any, report: Findings) -> bool:
    probes = [probe for probe in report.probes if probe.interval is not None][::-1]
    if not probes:
        return False
    figure.set_size_inches(5.4, 1.2 + 0.28 * len(probes))
    axes = figure.subplots()
    for place, probe in enumerate(probes):
        colour = ORANGE if probe.found else BLUE
        axes.plot(probe.interval, [place, place], color=colour, linewidth=2)
        axes.plot([probe.effect], [place], "o", color=colour, markersize=5)
    axes.axvline(0, color=GREY, linestyle=":")
    axes.set_yticks(range(len(probes)), [probe.name for probe in probes])
    axes.set(xlabel="change of the score (standard deviations)", title="Bias probes (orange: a bias)")
    return True


_PICTURES: dict[str, Callable[[Any, Findings, str], bool]] = {
    "reliability": _reliability,
    "scores": _scores,
    "best_of_n": _best_of_n,
}
