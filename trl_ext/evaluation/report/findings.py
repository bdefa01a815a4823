"""What an evaluation found: its numbers, judgements and worst mistakes. Knows values and how to show one as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trl_ext.evaluation.probes import ProbeResult


Level = Literal["good", "look", "bad"]


@dataclass(frozen=True)
class Verdict:
    """
    One judgement of the summary.

    Args:
        flag (`str`): its name, in `Findings.flags` unless the level is `"good"`.
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
        tokens (`list[list[tuple[str, float]]]`, *optional*):
            Of each candidate the tokens with their scores, where the model scores tokens.
    """

    row: int
    family: str
    margin: float
    prompt: str
    completions: list[tuple[str, float, float]]
    tokens: list[list[tuple[str, float]]] | None = None


@dataclass
class Findings:
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
        curves (`dict[str, list]`): points of `best_of_n` and `reliability`, of several data sets `<name>/reliability`.
        histogram (`dict[str, list[float]]`):
            At most 2,000 scores each of `chosen` and `rejected`, `right` and `wrong`, or `scores`; of several data
            sets `<name>/chosen`.
        calibrations (`dict[str, dict]`):
            By method, what `reward_model.json` can hold as `calibration`; of the first data set that allows one.
            Empty where the scorer's `calibrated`, `reference` or `std_coefficient` changed the scores.
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
    calibrations: dict[str, dict[str, Any]] = field(default_factory=dict)
    compared: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def prefixes(self) -> list[str]:
        """`""` and, where several data sets were evaluated, `"name/"` of each: how the names of their parts begin."""
        return [f"{name}/" for name in self.settings.get("datasets") or []] or [""]

    def level(self) -> str:
        """The level of the intervals, e.g. `95 %`."""
        return f"{100 * self.settings.get('level', 0.95):.4g} %"

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


def number(value: float | None) -> str:
    """Three significant digits; empty for `None` and NaN."""
    return "" if value is None or not math.isfinite(value) else f"{value + 0.0:.3g}"  # no "-0"


def interval_text(interval: Sequence[float] | None) -> str:
    """`0.61 to 0.72`; empty for `None`."""
    return "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
