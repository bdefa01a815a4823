"""`EvaluationReport`: what an evaluation found, as JSON, Markdown, a table for the terminal, and W&B tables.

It knows numbers and their names. Pictures are made by `figures`, the HTML page by `page`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl_ext.evaluation.probes import ProbeResult


Level = Literal["good", "look", "bad"]
_MARKS = {"good": "ok", "look": "look", "bad": "bad"}


@dataclass(frozen=True)
class Verdict:
    """
    One judgement of the summary.

    Args:
        flag (`str`): its name, in `EvaluationReport.flags` unless the level is `"good"`.
        level (`str`): `"good"` (green), `"look"` (amber) or `"bad"` (red).
        reason (`str`): one sentence with the numbers.
        advice (`str`): what to do about it; empty for a good one.
    """

    flag: str
    level: Level
    reason: str
    advice: str = ""


@dataclass(frozen=True)
class Mistake:
    """
    A row that the model gets wrong, to be read by a person.

    Args:
        row (`int`): index of the row.
        family (`str`): of its data set.
        margin (`float`): how wrong, in units of the score; the lower, the worse.
        prompt (`str`): the prompt as text.
        completions (`list[tuple[str, float, float]]`): text, score and rating of each candidate or step.
    """

    row: int
    family: str
    margin: float
    prompt: str
    completions: list[tuple[str, float, float]]


@dataclass
class EvaluationReport:
    """
    What an evaluation found.

    Args:
        model (`str`): name of what was evaluated.
        metrics (`dict[str, float]`): every number by name; NaN where it is not defined.
        intervals (`dict[str, tuple[float, float]]`): the confidence interval of each metric that has one.
        flags (`list[str]`): names of what is wrong or should be looked at.
        verdicts (`list[Verdict]`): the summary, with reasons.
        detectable (`dict[str, float]`): the smallest true difference that this sample shows with 80 % power.
        reasons (`dict[str, str]`): why a metric has no interval.
        sizes (`dict[str, int]`): units of each metric.
        probes (`list[ProbeResult]`): the bias probes.
        omitted (`dict[str, int]`): rows that do not count, by reason.
        curves (`dict[str, list]`): points of the best-of-n curve and of the reliability diagram.
        histogram (`dict[str, list[float]]`): scores, by what they belong to; at most 2,000 of each.
        mistakes (`list[Mistake]`): the worst ones first.
        compared (`dict[str, Any]`): name of the second model and, by metric, the paired differences.
        settings (`dict[str, Any]`): data, rows, seed, versions, seconds.
    """

    model: str
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    detectable: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    probes: list[ProbeResult] = field(default_factory=list)
    omitted: dict[str, int] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    histogram: dict[str, list[float]] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    compared: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as values that JSON holds; a number that is not finite becomes `None`."""
        return _plain(asdict(self))

    def save(self, output_dir: str | Path) -> list[Path]:
        """
        Write `evaluation.json`, `evaluation.md`, `evaluation.html` and, where matplotlib is installed, PNG pictures.

        Returns:
            `list[Path]`: the files.
        """
        from trl_ext.evaluation.figures import draw, matplotlib_is_there
        from trl_ext.evaluation.page import to_html

        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "evaluation.json": json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            "evaluation.md": self.to_markdown(),
            "evaluation.html": to_html(self),
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        written = [folder / name for name in files]
        if matplotlib_is_there():
            for name, picture in draw(self, "png").items():
                (folder / f"{name}.png").write_bytes(picture)
                written.append(folder / f"{name}.png")
        return written

    def to_markdown(self, heading: str = "# Evaluation") -> str:
        """The summary, the metrics and the probes as Markdown, e.g. for a model card."""
        lines = [f"{heading} of {self.model}", ""]
        lines += [f"- **{_MARKS[v.level]}** {v.reason} {v.advice}".rstrip() for v in self.verdicts]
        lines += ["", "| metric | value | 95 % interval | detectable | n |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        if self.probes:
            lines += ["", "| probe | effect (sd) | interval | p | n | bias |", "|---|---|---|---|---|---|"]
            lines += [f"| {' | '.join(row)} |" for row in self.probe_rows()]
        if self.compared:
            lines += ["", f"Compared with {self.compared['model']}:", "", "| metric | difference | interval | p |"]
            lines += ["|---|---|---|---|"]
            lines += [f"| {' | '.join(row)} |" for row in self.comparison_rows()]
        if self.omitted:
            lines += ["", "Rows that do not count: " + ", ".join(f"{k}: {v}" for k, v in self.omitted.items()) + "."]
        return "\n".join(lines) + "\n"

    def rows(self) -> list[tuple[str, ...]]:
        """The metrics as texts: name, value, interval (or why there is none), detectable effect, units."""
        return [
            (
                name,
                number(value),
                interval_text(self.intervals.get(name)) or self.reasons.get(name, ""),
                number(self.detectable.get(name)),
                str(self.sizes.get(name, "")),
            )
            for name, value in self.metrics.items()
        ]

    def probe_rows(self) -> list[tuple[str, ...]]:
        """The probes as texts: name, effect, interval, p-value, completions, whether it is a bias."""
        return [
            (
                probe.name,
                number(probe.effect),
                interval_text(probe.interval) or (probe.reason or ""),
                number(probe.p_value),
                str(probe.size),
                "yes" if probe.found else "no",
            )
            for probe in self.probes
        ]

    def comparison_rows(self) -> list[tuple[str, ...]]:
        """The paired differences as texts: metric, difference, interval, p-value."""
        return [
            (
                name,
                number(d["difference"]),
                interval_text(d["interval"]) or d.get("reason") or "",
                number(d["p_value"]),
            )
            for name, d in self.compared.get("differences", {}).items()
        ]

    def print(self) -> None:
        """Show the summary, metrics and probes in the terminal."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        colours = {"good": "green", "look": "yellow", "bad": "red"}
        console.print(f"[bold]{self.model}[/bold]", highlight=False)
        for verdict in self.verdicts:
            mark = f"[{colours[verdict.level]}]{_MARKS[verdict.level]:>4}[/]"
            console.print(f"{mark}  {verdict.reason} {verdict.advice}".rstrip(), highlight=False, soft_wrap=False)
        tables = [
            ("metric", "value", "interval", "detectable", "n"),
            ("probe", "effect", "interval", "p", "n", "bias"),
        ]
        for names, rows in zip(tables, (self.rows(), self.probe_rows()), strict=True):
            if rows:
                table = Table(*names)
                for row in rows:
                    table.add_row(*row)
                console.print(table)

    def log_to_wandb(self) -> None:
        """Put metrics, probes and the worst mistakes on the W&B run that is open; nothing happens without one."""
        import wandb

        if wandb.run is None:
            return
        tables = {
            "evaluation/metrics": (["metric", "value", "interval", "detectable", "n"], self.rows()),
            "evaluation/probes": (["probe", "effect", "interval", "p", "n", "bias"], self.probe_rows()),
            "evaluation/mistakes": (
                ["row", "margin", "prompt", "completions"],
                [(m.row, m.margin, m.prompt, repr(m.completions)) for m in self.mistakes],
            ),
        }
        logged = {
            name: wandb.Table(columns=columns, data=[*map(list, rows)]) for name, (columns, rows) in tables.items()
        }
        finite = {f"evaluation/{name}": value for name, value in self.metrics.items() if math.isfinite(value)}
        wandb.run.log(finite | logged)


def number(value: float | None) -> str:
    """Three significant digits; empty for `None` and NaN."""
    return "" if value is None or not math.isfinite(value) else f"{value:.3g}"


def interval_text(interval: Sequence[float] | None) -> str:
    """`0.61 to 0.72`; empty for `None`."""
    return "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)
