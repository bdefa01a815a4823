"""The pictures of a report, made by matplotlib: reliability, scores, probes, best of n.

They have grey text and no background, so that they can stand on a light and on a dark page. It knows a report's
numbers.
"""

import importlib.util
import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from trl_ext.evaluation.findings import Findings


GREY = "#808590"
BLUE, ORANGE, GREEN = "#3b7dd8", "#e08a3c", "#3f9b63"


def matplotlib_is_there() -> bool:
    """Whether pictures can be made: matplotlib comes with `pip install "trl-ext[plots]"`."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Findings, kind: Literal["png", "svg"]) -> dict[str, bytes]:
    """Every picture that the report has numbers for, by name."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": GREY,
        "axes.titlesize": 11,
        "font.size": 10,
        "legend.frameon": False,
        "legend.labelcolor": GREY,
        "svg.hashsalt": "trl_ext",  # the same report gives the same file
        "text.color": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
    pictures = {}
    with matplotlib.rc_context(style):
        for name, (there, make) in _PICTURES.items():
            if not there(report):
                continue
            figure = Figure(figsize=(5.4, 3.6), layout="constrained")
            make(figure, report)
            buffer = io.BytesIO()
            options = {"dpi": 144, "facecolor": "white"} if kind == "png" else {"transparent": True}
            figure.savefig(buffer, format=kind, metadata=None if kind == "png" else {"Date": None}, **options)
            pictures[name] = buffer.getvalue()
    return pictures


def _reliability(figure: Any, report: Findings) -> None:
    axes = figure.subplots()
    points = report.curves["reliability"]
    x, y = ([point[name] for point in points] for name in ("confidence", "right"))
    sizes = np.array([point["size"] for point in points])
    low = min(0.5, *x) if min(x) >= 0.5 else 0.0
    axes.plot([low, 1], [low, 1], color=GREY, linestyle=":", label="perfectly calibrated")
    axes.plot(x, y, color=BLUE)
    axes.scatter(x, y, s=12 + 120 * sizes / sizes.max(), color=BLUE, label="this model (area: rows)")
    axes.set(xlabel="confidence", ylabel="share that is right", title="Calibration", xlim=(low, 1.02), ylim=(0, 1.05))
    axes.legend(loc="lower right")


def _scores(figure: Any, report: Findings) -> None:
    axes = figure.subplots()
    values = np.concatenate([np.asarray(scores) for scores in report.histogram.values()])
    edges = np.linspace(*np.quantile(values, [0.001, 0.999]), 41) if np.ptp(values) else 10
    good = {"chosen", "right"}
    for name, scores in sorted(report.histogram.items()):
        colour = GREEN if name in good else ORANGE if len(report.histogram) > 1 else BLUE
        axes.hist(scores, bins=edges, alpha=0.55, color=colour, label=f"{name} ({len(scores)})")
    axes.set(xlabel="score", ylabel="completions", title="Scores")
    axes.legend()


def _probes(figure: Any, report: Findings) -> None:
    probes = [probe for probe in report.probes if probe.interval is not None][::-1]
    figure.set_size_inches(5.4, 1.2 + 0.28 * len(probes))
    axes = figure.subplots()
    for place, probe in enumerate(probes):
        colour = ORANGE if probe.found else BLUE
        axes.plot(probe.interval, [place, place], color=colour, linewidth=2)
        axes.plot([probe.effect], [place], "o", color=colour, markersize=5)
    axes.axvline(0, color=GREY, linestyle=":")
    axes.set_yticks(range(len(probes)), [probe.name for probe in probes])
    axes.set(xlabel="change of the score (standard deviations)", title="Bias probes (orange: a bias)")


def _best_of_n(figure: Any, report: Findings) -> None:
    axes = figure.subplots()
    points = report.curves["best_of_n"]
    n = [point["n"] for point in points]
    axes.plot(n, [point["oracle"] for point in points], color=GREY, linestyle="--", label="oracle (gold)")
    axes.plot(n, [point["gold"] for point in points], color=GREEN, marker="o", label="picked by this model (gold)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, n)
    for name, colour in (("best_n", GREEN), ("predicted_n", ORANGE)):
        found = [value for key, value in report.metrics.items() if key.split("/")[-1] == name]
        if found and np.isfinite(found[0]):
            axes.axvline(found[0], color=colour, linestyle=":", label=f"{name.replace('_', ' ')}: {found[0]:.0f}")
    axes.set(xlabel="n", ylabel="gold reward", title="Best of n")
    axes.legend(fontsize=8)


_PICTURES: dict[str, tuple[Callable[[Findings], bool], Callable[[Any, Findings], None]]] = {
    "reliability": (lambda report: len(report.curves.get("reliability", [])) > 1, _reliability),
    "scores": (lambda report: any(len(scores) > 1 for scores in report.histogram.values()), _scores),
    "probes": (lambda report: any(probe.interval for probe in report.probes), _probes),
    "best_of_n": (lambda report: len(report.curves.get("best_of_n", [])) > 1, _best_of_n),
}
