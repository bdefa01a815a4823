"""What a weak-to-strong experiment found, per pair of models and with intervals: JSON, Markdown, plot, W&B table.

Knows judgements of rows by three models. Knows nothing of models or training.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trl_ext.metrics.pgr import estimate_pgr
from trl_ext.metrics.streams import Calibration
from trl_ext.pipelines.stages.store import write_json


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairReport:
    """
    One weak supervisor and one strong student, over all seeds.

    Args:
        weak_models (`list[str]`), strong_model (`str`): names; several weak models labelled together.
        weak, weak_to_strong, ceiling (`float`): mean performance over test rows and seeds.
        pgr (`float`, *optional*): performance gap recovered, not clipped; `None` where it is undefined.
        pgr_interval (`tuple[float, float]`, *optional*): 95 % bootstrap interval over prompts, paired; an end is
            infinite (null in `report.json`) where the gap may be zero.
        reason (`str`, *optional*): why it is undefined.
        gap_error (`float`): standard error of `ceiling - weak`.
        by_seed (`list[dict]`): the same for each seed, the `weights` of the weak models where they were learnt, and of
            texts how many of split B the student did not learn from, `left_out`: `cut` at the length limit, `empty`.
        agreement (`dict`): how often the student does as its supervisor on test rows that the supervisor gets
            `when_right` and `when_wrong`. A high second one means that it imitates mistakes.
        weak_labels (`dict`): `accuracy` of the weak labels on split B and, of probabilities, their expected
            calibration error (10 bins).
        by_class (`dict`): performance of the three models per gold class.
    """

    weak_models: list[str]
    strong_model: str
    weak: float
    weak_to_strong: float
    ceiling: float
    pgr: float | None
    pgr_interval: tuple[float, float] | None
    reason: str | None
    gap_error: float
    by_seed: list[dict[str, Any]]
    agreement: dict[str, float | None]
    weak_labels: dict[str, float | None]
    by_class: dict[str, dict[str, float]]


def pair_report(
    weak_models: list[str],
    strong_model: str,
    runs: Sequence[dict[str, Any]],
    classes: Sequence[str],
    prompts: Sequence[str],
    outputs_are_probabilities: bool,
) -> PairReport:
    """
    The report of a pair of models.

    Args:
        runs (sequence of `dict`): per seed, `seed` and the judgements `weak`, `student`, `ceiling` of the test rows
            and `labels` of split B; `weights` and `left_out` where there are some.
        classes (sequence of `str`), prompts (sequence of `str`): gold class and prompt of each test row.
        outputs_are_probabilities (`bool`): whether calibration means anything.
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
    same = (right["weak"] == right["student"]).float()  # of right or wrong: the same; of shares: the same share
    was_right = right["weak"] > 0.5
    labels = [judgement for run in runs for judgement in run["labels"]]
    return PairReport(
        weak_models=list(weak_models),
        strong_model=strong_model,
        weak=pooled.weak,
        weak_to_strong=pooled.weak_to_strong,
        ceiling=pooled.ceiling,
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
    """Of the side that a label prefers: how sure it is against how often that is right. Of steps, over rows: none."""
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
    `.ceiling`, `.pgr`, `.pgr_interval`; of several, see `.pairs`.

    Args:
        task (`str`), student_loss (`str`): of the experiment.
        rows (`dict[str, int]`): rows of each split.
        pairs (`list[PairReport]`): strong models in order, with each weak one.
        seconds (`dict[str, float]`): of each leg, when it ran.
        peak_memory_gib (`dict[str, float]`):
            of each leg: GPU memory; on CPU that of its process, where it has one of its own (Linux).
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
        """Column names and a row per pair of models."""
        columns = ["weak", "strong", "weak performance", "weak-to-strong", "ceiling", "PGR", "95 % interval", "seeds"]
        rows = []
        for pair in self.pairs:
            interval = "" if pair.pgr_interval is None else "{:.2f} to {:.2f}".format(*pair.pgr_interval)
            pgr = "undefined" if pair.pgr is None else f"{pair.pgr:.2f}"
            figures = [f"{value:.3f}" for value in (pair.weak, pair.weak_to_strong, pair.ceiling)]
            names = [" + ".join(pair.weak_models), pair.strong_model]
            rows.append([*names, *figures, pgr, interval, str(len(pair.by_seed))])
        return columns, rows

    def markdown(self) -> str:
        """The table, what is undefined and why, and how student and labels relate to the supervisor."""
        columns, rows = self.table()
        lines = [f"# Weak to strong: {self.task}, {self.student_loss}", ""]
        lines += [" | ".join(["", *columns, ""]).strip(), "|" + "---|" * len(columns)]
        lines += [" | ".join(["", *row, ""]).strip() for row in rows]
        lines += ["", "Rows: " + ", ".join(f"{name} {count}" for name, count in self.rows.items()) + "."]
        for pair in self.pairs:
            lines += ["", f"## {' + '.join(pair.weak_models)} -> {pair.strong_model}", ""]
            if pair.reason is not None:
                lines.append(f"- PGR is undefined: {pair.reason}.")
            shares = {name: "none" if value is None else f"{value:.3f}" for name, value in pair.agreement.items()}
            lines.append(
                f"- The student does as its supervisor where that is right: {shares['when_right']}; where it is "
                f"wrong: {shares['when_wrong']}."
            )
            calibration = pair.weak_labels["calibration_error"]
            known = "" if calibration is None else f", expected calibration error {calibration:.3f}"
            lines.append(f"- Weak labels: accuracy {pair.weak_labels['accuracy']:.3f}{known}.")
            left_out = [seed["left_out"] for seed in pair.by_seed if seed["left_out"] is not None]
            if left_out:
                cut, empty = (sum(counts[reason] for counts in left_out) for reason in ("cut", "empty"))
                lines.append(
                    f"- Of {len(left_out) * self.rows['labelled']} weak texts (all seeds) {cut} that were cut at the "
                    f"length limit and {empty} empty ones are left out."
                )
            for name, values in pair.by_class.items():
                figures = ", ".join(f"{model} {value:.3f}" for model, value in values.items())
                lines.append(f"- Class {name}: {figures}.")
        return "\n".join(lines) + "\n"

    def save(self, folder: Path, report_to: str = "none") -> None:
        """Write `report.json`, `report.md`, with matplotlib `report.png`, and log to W&B if asked to."""
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
        """Bars of weak, weak-to-strong and ceiling for each pair; of several pairs also the PGR with its interval."""
        from matplotlib.figure import Figure

        several = len(self.pairs) > 1
        figure = Figure(figsize=(2.5 + 1.8 * len(self.pairs), 7 if several else 4), layout="constrained")
        axes, below = figure.subplots(2, 1) if several else (figure.subplots(), None)
        shown = (("weak", "#9aa5b1"), ("weak_to_strong", "#3b7dd8"), ("ceiling", "#2f9e6e"))
        for number, (name, color) in enumerate(shown):
            values = [asdict(pair)[name] for pair in self.pairs]
            places = [k + 0.27 * (number - 1) for k in range(len(self.pairs))]
            axes.bar(places, values, width=0.25, color=color, label=name.replace("_", "-"))
        for k, pair in enumerate(self.pairs):
            top = max(pair.weak, pair.weak_to_strong, pair.ceiling)
            label = "PGR undefined" if pair.pgr is None else f"PGR {pair.pgr:.2f}"
            axes.text(k, top + 0.01, label, ha="center", va="bottom")
        short = [f"{' + '.join(map(_short, p.weak_models))}\n-> {_short(p.strong_model)}" for p in self.pairs]
        axes.set_xticks(range(len(self.pairs)), short)
        axes.set_ylim(0, 1.12)
        axes.set_ylabel("performance on the test split")
        axes.legend(loc="lower right", frameon=False)
        if below is not None:
            for k, pair in enumerate(self.pairs):
                if pair.pgr is None:
                    below.text(k, 0, "undefined", ha="center", va="bottom")
                else:
                    lengths = [abs(end - pair.pgr) for end in pair.pgr_interval]
                    below.plot(k, pair.pgr, "o", color="#3b7dd8")
                    for length, sign in zip(lengths, (-1, 1), strict=True):  # an arrow where there is no end
                        shown, arrow = (length, "none") if math.isfinite(length) else (1.0, "^" if sign > 0 else "v")
                        ends = [pair.pgr, pair.pgr + sign * shown]
                        below.plot([k, k], ends, color="#3b7dd8", marker=arrow, markevery=[1])
            below.set_xticks(range(len(self.pairs)), short)
            below.set_xlim(axes.get_xlim())
            below.axhline(0, color="#9aa5b1", linewidth=0.8)
            below.set_ylabel("PGR, 95 % interval")
        figure.savefig(path, dpi=150)

    def _log(self, folder: Path) -> None:
        import wandb

        columns, rows = self.table()
        with wandb.init(name=f"weak-to-strong-{self.task}", dir=str(folder)) as run:
            run.log({"weak_to_strong": wandb.Table(columns=columns, data=rows)})
            for number, pair in enumerate(self.pairs):
                figures = {"weak": pair.weak, "weak_to_strong": pair.weak_to_strong, "ceiling": pair.ceiling}
                figures |= {} if pair.pgr is None else {"pgr": pair.pgr}
                run.summary.update({f"pair_{number}/{name}": value for name, value in figures.items()})


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples, and null for the end of an interval that has none."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(name: str) -> str:
    return name.rstrip("/").split("/")[-1]
