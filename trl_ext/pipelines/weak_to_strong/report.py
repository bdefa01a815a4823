"""The report of a weak-to-strong experiment, for each pair of models and with intervals: JSON, Markdown, plot, W&B.

It knows judgements of rows by three models. It knows nothing of models or training.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trl_ext.metrics.pgr import estimate_pgr
from trl_ext.metrics.streams import Calibration
from trl_ext.pipelines.stages.store import write_json


logger = logging.getLogger(__name__)

# The three models of a pair: name of the figure, title and colour.
ROLES = (
    ("weak", "weak supervisor", "#9aa5b1"),
    ("weak_to_strong", "strong student", "#3b7dd8"),
    ("ceiling", "strong ceiling", "#2f9e6e"),
)


@dataclass(frozen=True)
class PairReport:
    """
    One weak supervisor and one strong student, over all seeds.

    Args:
        weak_models (`list[str]`), strong_model (`str`): names. Several weak models label together.
        weak, weak_to_strong, ceiling (`float`): mean performance over test rows and seeds.
        intervals (`dict[str, tuple[float, float]]`, *optional*): their 95 % bootstrap intervals over prompts; `None`
            if the test split has only one prompt.
        pgr (`float`, *optional*): performance gap recovered, not clipped; `None` if it is undefined.
        pgr_interval (`tuple[float, float]`, *optional*): 95 % bootstrap interval over prompts, paired. An end is
            infinite (null in `report.json`) if the gap may be zero.
        reason (`str`, *optional*): why `pgr` is undefined.
        gap_error (`float`): standard error of `ceiling - weak`.
        by_seed (`list[dict]`): the same figures for each seed, and the `weights` of the weak models if they were
            learned. For generation `left_out` counts the texts of split B that the student did not learn from: `cut`
            at the length limit, and `empty`.
        agreement (`dict`): how often student and supervisor agree on test rows where the supervisor is right
            (`when_right`) and wrong (`when_wrong`). A high `when_wrong` means that the student imitates mistakes.
        weak_labels (`dict`): `accuracy` of the weak labels on split B and, for probabilities, their expected
            calibration error (10 bins).
        by_class (`dict`): performance of the three models for each gold class.
    """

    weak_models: list[str]
    strong_model: str
    weak: float
    weak_to_strong: float
    ceiling: float
    intervals: dict[str, tuple[float, float]] | None
    pgr: float | None
    pgr_interval: tuple[float, float] | None
    reason: str | None
    gap_error: float
    by_seed: list[dict[str, Any]]
    agreement: dict[str, float | None]
    weak_labels: dict[str, float | None]
    by_class: dict[str, dict[str, float]]

    def performance(self, name: str) -> str:
        """A figure with its interval, as text: `0.812 (0.790 to 0.834)`."""
        value = f"{getattr(self, name):.3f}"
        return value if self.intervals is None else value + " ({:.3f} to {:.3f})".format(*self.intervals[name])


def pair_report(
    weak_models: list[str],
    strong_model: str,
    runs: Sequence[dict[str, Any]],
    classes: Sequence[str],
    prompts: Sequence[str],
    outputs_are_probabilities: bool,
) -> PairReport:
    """
    Make the report of a pair of models.

    Args:
        runs (sequence of `dict`): for each seed: `seed`, the judgements `weak`, `student` and `ceiling` of the test
            rows, and `labels` of split B; also `weights` and `left_out`, if there are any.
        classes (sequence of `str`), prompts (sequence of `str`): gold class and prompt of each test row.
        outputs_are_probabilities (`bool`): whether a calibration error can be computed.
    """
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    clusters = [order[prompt] for prompt in prompts]
    right = {
        name: torch.tensor([[float(judgement.right) for judgement in run[name]] for run in runs])  # (seeds, N)
        for name in ("weak", "student", "ceiling")
    }

    def estimate(seed: slice) -> Any:
        rows = [right[name][seed] for name in ("weak", "student", "ceiling")]
        return estimate_pgr(*(values.flatten() for values in rows), clusters=clusters * len(rows[0]))

    pooled = estimate(slice(None))
    by_seed = []
    for number, run in enumerate(runs):
        one = estimate(slice(number, number + 1))
        more = {name: run.get(name) for name in ("weights", "left_out")}
        by_seed.append({"seed": run["seed"], **asdict(one), **more})
    same = (right["weak"] == right["student"]).float()  # both right, both wrong, or the same share of steps
    was_right = right["weak"] > 0.5
    labels = [judgement for run in runs for judgement in run["labels"]]
    return PairReport(
        weak_models=list(weak_models),
        strong_model=strong_model,
        weak=pooled.weak,
        weak_to_strong=pooled.weak_to_strong,
        ceiling=pooled.ceiling,
        intervals=pooled.intervals,
        pgr=pooled.pgr,
        pgr_interval=pooled.interval,
        reason=pooled.reason,
        gap_error=pooled.gap_error,
        by_seed=by_seed,
        agreement={
            "when_right": float(same[was_right].mean()) if was_right.any() else None,
            "when_wrong": float(same[~was_right].mean()) if not was_right.all() else None,
        },
        weak_labels={
            "accuracy": sum(label.right for label in labels) / len(labels),
            "calibration_error": _calibration(labels) if outputs_are_probabilities else None,
        },
        by_class={
            name: {model: float(right[model][:, torch.tensor([c == name for c in classes])].mean()) for model in right}
            for name in sorted(set(classes))
        },
    )


def _calibration(labels: Sequence[Any]) -> float | None:
    """Expected calibration error of the side that a label prefers; `None` for steps, which are judged per row."""
    if any(isinstance(label.output, list) for label in labels):
        return None
    sure = [max(label.output, 1.0 - label.output) for label in labels]
    calibration = Calibration(bins=10)
    calibration.add(torch.tensor(sure), torch.tensor([label.right for label in labels]))
    return calibration.summary()["ece"]


@dataclass(frozen=True)
class WeakToStrongReport:
    """
    The report of an experiment. With one pair of models, its figures are attributes: `.weak`, `.weak_to_strong`,
    `.ceiling`, `.pgr`, `.pgr_interval`. With several, look at `.pairs`.

    Args:
        task (`str`), student_loss (`str`): task and loss of the experiment.
        rows (`dict[str, int]`): rows of each split.
        pairs (`list[PairReport]`): strong models in order, with each weak one.
        seconds (`dict[str, float]`): how long each run took when it trained.
        peak_memory_gib (`dict[str, float]`):
            peak GPU memory of each run; on a CPU the peak memory of its process, if that is a separate one (Linux).
    """

    task: str
    student_loss: str
    rows: dict[str, int]
    pairs: list[PairReport]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gib: dict[str, float] = field(default_factory=dict)

    def _only(self) -> PairReport:
        if len(self.pairs) != 1:
            raise ValueError(f"The report has {len(self.pairs)} pairs of models. Look at `.pairs`.")
        return self.pairs[0]

    @property
    def weak(self) -> float:
        return self._only().weak

    @property
    def weak_to_strong(self) -> float:
        return self._only().weak_to_strong

    @property
    def ceiling(self) -> float:
        return self._only().ceiling

    @property
    def pgr(self) -> float | None:
        return self._only().pgr

    @property
    def pgr_interval(self) -> tuple[float, float] | None:
        return self._only().pgr_interval

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and a row for each pair of models."""
        columns = ["weak", "strong", "weak performance", "weak-to-strong", "ceiling", "PGR", "95 % interval", "seeds"]
        rows = []
        for pair in self.pairs:
            interval = "" if pair.pgr_interval is None else _range(pair.pgr_interval)
            pgr = "undefined" if pair.pgr is None else f"{pair.pgr:.2f}"
            figures = [pair.performance(name) for name, *_ in ROLES]
            names = [" + ".join(pair.weak_models), pair.strong_model]
            rows.append([*names, *figures, pgr, interval, str(len(pair.by_seed))])
        return columns, rows

    def markdown(self) -> str:
        """The table of all pairs; for each pair also why PGR is undefined and how often both models agree."""
        columns, rows = self.table()
        lines = [f"# Weak to strong: {self.task}, {self.student_loss}", ""]
        lines += [" | ".join(["", *columns, ""]).strip(), "|" + "---|" * len(columns)]
        lines += [" | ".join(["", *row, ""]).strip() for row in rows]
        lines += ["", "Rows: " + ", ".join(f"{name} {count}" for name, count in self.rows.items()) + "."]
        lines += ["In brackets: 95 % bootstrap intervals over the prompts of the test split."]
        for pair in self.pairs:
            lines += ["", f"## {' + '.join(pair.weak_models)} -> {pair.strong_model}", ""]
            if pair.reason is not None:
                lines.append(f"- PGR is undefined: {pair.reason}.")
            shares = {name: "none" if value is None else f"{value:.3f}" for name, value in pair.agreement.items()}
            lines.append(
                f"- The student agrees with its supervisor where the supervisor is right: {shares['when_right']}; "
                f"where it is wrong: {shares['when_wrong']}."
            )
            calibration = pair.weak_labels["calibration_error"]
            known = "" if calibration is None else f", expected calibration error {calibration:.3f}"
            lines.append(f"- Weak labels: accuracy {pair.weak_labels['accuracy']:.3f}{known}.")
            left_out = [seed["left_out"] for seed in pair.by_seed if seed["left_out"] is not None]
            if left_out:
                cut, empty = (sum(counts[reason] for counts in left_out) for reason in ("cut", "empty"))
                lines.append(
                    f"- The student does not learn from {cut} of {len(left_out) * self.rows['labelled']} weak texts "
                    f"(all seeds) that were cut at the length limit, and from {empty} empty ones."
                )
            for name, values in pair.by_class.items():
                figures = ", ".join(f"{model} {value:.3f}" for model, value in values.items())
                lines.append(f"- Class {name}: {figures}.")
        return "\n".join(lines) + "\n"

    def save(self, folder: Path, report_to: str = "none") -> None:
        """Write `report.json`, `report.md` and (with matplotlib) `report.png`; log to W&B if `report_to` says so."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", _plain(asdict(self)))
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        try:
            self.plot(folder / "report.png")
        except ModuleNotFoundError:
            logger.warning("No plot was drawn: matplotlib is missing. Install it with `pip install trl-ext[plots]`.")
        if report_to == "wandb":
            self._log(folder)

    def plot(self, path: Path) -> None:
        """Bars of the three models for each pair, with intervals; with several pairs also each PGR."""
        from matplotlib.figure import Figure

        several = len(self.pairs) > 1
        figure = Figure(figsize=(4.4 + 1.8 * len(self.pairs), 7.5 if several else 4.4), layout="constrained")
        above, below = figure.subplots(2, 1) if several else (figure.subplots(), None)
        figure.suptitle(f"Weak to strong: {self.task}, student loss {self.student_loss}")
        self._plot_performance(above)
        if below is not None:
            self._plot_pgr(below)
            below.set_xlim(above.get_xlim())
        figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150)

    def _plot_performance(self, axes: Any) -> None:
        tops = [0.0] * len(self.pairs)
        for number, (name, title, color) in enumerate(ROLES):
            for k, pair in enumerate(self.pairs):
                value, place = getattr(pair, name), k + 0.27 * (number - 1)
                axes.bar(place, value, width=0.25, color=color, label=title if k == 0 else None)
                low, high = (value, value) if pair.intervals is None else pair.intervals[name]
                errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar(place, value, yerr=errors, color="black", capsize=3, linewidth=1)
                tops[k] = max(tops[k], value, high)
        for k, (pair, top) in enumerate(zip(self.pairs, tops, strict=True)):
            label = "PGR undefined" if pair.pgr is None else f"PGR {pair.pgr:.2f}\n({_range(pair.pgr_interval)})"
            axes.annotate(label, (k, top), xytext=(0, 6), textcoords="offset points", ha="center", va="bottom")
        axes.set_ylim(0, max(*tops, 0.1) * 1.25)
        axes.set_xlim(-0.6, len(self.pairs) - 0.4)
        axes.set_xticks(range(len(self.pairs)), [name.replace(" -> ", "\n-> ") for name in self.pair_names()])
        axes.set_ylabel("performance on the test split")
        axes.spines[["top", "right"]].set_visible(False)

    def _plot_pgr(self, axes: Any) -> None:
        for k, pair in enumerate(self.pairs):
            if pair.pgr is None:
                axes.text(k, 0, "undefined", ha="center", va="bottom")
                continue
            axes.plot(k, pair.pgr, "o", color="#3b7dd8")
            for end, sign in zip(pair.pgr_interval, (-1, 1), strict=True):  # an arrow for an infinite end
                length, arrow = (abs(end - pair.pgr), "_") if math.isfinite(end) else (1.0, "^" if sign > 0 else "v")
                axes.plot([k, k], [pair.pgr, pair.pgr + sign * length], color="#3b7dd8", marker=arrow, markevery=[1])
        for value in (0, 1):  # 0: as good as the supervisor; 1: as good as the ceiling
            axes.axhline(value, color="#9aa5b1", linewidth=0.8, linestyle="-" if value == 0 else ":")
        axes.set_xticks(range(len(self.pairs)), [name.replace(" -> ", "\n-> ") for name in self.pair_names()])
        axes.set_ylabel("PGR, 95 % interval")
        axes.spines[["top", "right"]].set_visible(False)

    def pair_names(self) -> list[str]:
        """A name for each pair: the last parts of the models' paths, or the whole paths if those are ambiguous."""
        short = [f"{' + '.join(map(_short, pair.weak_models))} -> {_short(pair.strong_model)}" for pair in self.pairs]
        whole = [f"{' + '.join(pair.weak_models)} -> {pair.strong_model}" for pair in self.pairs]
        return short if len(set(short)) == len(short) else whole

    def _log(self, folder: Path) -> None:
        """Log a table and figures to the user's open W&B run, or to a new run for the report."""
        import wandb

        columns, rows = self.table()
        figures: dict[str, float] = {}
        for pair, name in zip(self.pairs, self.pair_names(), strict=True):
            prefix = f"{name}/" if len(self.pairs) > 1 else ""
            found = {role: getattr(pair, role) for role, *_ in ROLES}
            bounds = dict(pair.intervals or {})
            if pair.pgr is not None:
                found["pgr"], bounds["pgr"] = pair.pgr, pair.pgr_interval
            found |= {f"{key}_low": low for key, (low, _) in bounds.items() if math.isfinite(low)}
            found |= {f"{key}_high": high for key, (_, high) in bounds.items() if math.isfinite(high)}
            figures |= {prefix + key: value for key, value in found.items()}
        try:
            opened = wandb.run is None
            project = os.environ.get("WANDB_PROJECT", "huggingface")  # the same default as the trainers' runs
            name = f"weak-to-strong-{self.task}"
            run = wandb.init(project=project, name=name, dir=str(folder)) if opened else wandb.run
            run.log({"weak_to_strong": wandb.Table(columns=columns, data=rows)})
            run.summary.update(figures)
            if opened:
                run.finish()
        except Exception as error:  # a missing key, an unreachable server, a full disk; the report is on disk already
            logger.warning(f"Weights & Biases failed; the report was not logged there: {error!r}")


def _plain(value: Any) -> Any:
    """Convert to JSON values: tuples become lists, and infinite ends of intervals become null."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _range(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else "{:.2f} to {:.2f}".format(*interval)


def _short(name: str) -> str:
    return name.rstrip("/").split("/")[-1]
