"""What a judge did with a data set, in numbers: counts, position bias, and agreement with people.

As JSON, as a table in the terminal, and as tables on W&B. This module knows judgements and ratings of people. It knows
nothing of models or questions.
"""

import logging
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from trl_ext.evaluation.agreement import Agreement
from trl_ext.evaluation.measures import Measure
from trl_ext.pipelines.feedback.judge_ratings import Judgement
from trl_ext.pipelines.stages.values import plain


logger = logging.getLogger(__name__)

_LOW_MASS = 0.5
_SHOWN = 64  # rows of the W&B table


@dataclass
class JudgeReport:
    """
    What a judge did with a data set.

    Args:
        rows, kept (`int`): input and output rows.
        left_out (`dict[str, int]`): input rows that are not in the output, by reason.
        ties (`int`): output and left-out rows on which the judge has no preference.
        answers (`dict[str, int]`): how many answers were `asked` for now, `reused` from an earlier run, and `failed`.
        failed (`dict[str, int]`): answers without a label, by reason.
        metrics (`dict[str, float]`): numbers by name, see the docs on judges.
        intervals (`dict[str, tuple[float, float]]`): the 95 % interval of each number that has one.
        sizes (`dict[str, int]`): units of each number.
        by_confidence (`list[dict]`): `confidence`, share `right` and `size` of the pairs in each tenth of confidence.
        judge (`dict`): what the answers depend on.
        settings (`dict`): all settings.
    """

    rows: int = 0
    kept: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    ties: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    by_confidence: list[dict[str, float]] = field(default_factory=list)
    judge: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    samples: list[list[Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sample rows, as values that JSON holds; a number that is not finite becomes `None`."""
        content = plain({name: value for name, value in asdict(self).items() if name != "samples"})
        content["metrics"] = {k: v if math.isfinite(v) else None for k, v in content["metrics"].items()}
        return content

    def table(self) -> list[tuple[str, str, str, str]]:
        """A row for each number: name, value, interval and units."""
        found = []
        for name, value in self.metrics.items():
            ends = self.intervals.get(name)
            interval = "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
            found.append((name, f"{value:.3f}", interval, str(self.sizes[name])))
        return found

    def print(self) -> None:
        """Show counts and numbers in the terminal."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        for line in self.summary():
            console.print(line, highlight=False)
        tables = [(("metric", "value", "95 % interval", "n"), self.table())]
        if self.by_confidence:
            rows = [
                (f"{one['confidence']:.3f}", f"{one['right']:.3f}", str(one["size"])) for one in self.by_confidence
            ]
            tables.append((("confidence", "right", "pairs"), rows))
        for names, rows in tables:
            table = Table(*names)
            for row in rows:
                table.add_row(*row)
            console.print(table)

    def summary(self) -> list[str]:
        """What happened to the rows and to the answers, in sentences."""
        reasons = "".join(f", {count} {reason.replace('_', ' ')}" for reason, count in self.left_out.items())
        lines = [f"{self.kept} of {self.rows} rows are labelled{reasons}; {self.ties} ties."]
        failed = "".join(f" {count}: {reason}." for reason, count in self.failed.items())
        lines.append(f"{self.answers['asked']} answers asked, {self.answers['reused']} reused.{failed}")
        return lines

    def log_to_wandb(self) -> None:
        """Put the numbers and a table of rows on the W&B run that is open; nothing happens without one."""
        import wandb

        if wandb.run is None:
            return
        columns = ["row", "prompt", "completions", "ratings", "position_bias", "people"]
        logged = {f"judge/{name}": value for name, value in self.metrics.items() if math.isfinite(value)}
        logged |= {f"judge/left_out/{reason}": count for reason, count in self.left_out.items()}
        logged["judge/metrics"] = wandb.Table(
            columns=["metric", "value", "interval", "n"], data=[list(row) for row in self.table()]
        )
        logged["judge/rows"] = wandb.Table(columns=columns, data=self.samples)
        wandb.run.log(logged)


class Tally:
    """Collects judgements row by row, and makes the report."""

    def __init__(self) -> None:
        self.report = JudgeReport()
        self.left_out: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._agreement = Agreement()
        self._columns: dict[str, list[float]] = {
            name: [] for name in ("position_bias", "position_bias_size", "consistent", "confidence", "label_mass")
        }
        self._clusters: dict[str, list[Hashable]] = {name: [] for name in self._columns}

    def add(self, row: int, cluster: Hashable, judgement: Judgement, ratings: Sequence[float]) -> None:
        """
        Count one judgement.

        Args:
            row (`int`): index of the row.
            cluster (`Hashable`): rows of one cluster are not independent.
            judgement ([`Judgement`]): what the judge says.
            ratings (sequence of `float`): what people say, one for each completion; empty if that is not known.
        """
        self._failed.update(judgement.failed)
        if judgement.position_bias is not None:
            self._note("position_bias", cluster, judgement.position_bias)
            self._note("position_bias_size", cluster, abs(judgement.position_bias))
        if judgement.label_mass is not None:
            self._note("label_mass", cluster, judgement.label_mass)
        for pair in judgement.comparisons:
            self._note("confidence", cluster, max(pair.probability, 1 - pair.probability))
            if pair.consistent is not None:
                self._note("consistent", cluster, pair.consistent)
        if ratings:
            self._agree(row, cluster, judgement, ratings)

    def show(self, row: int, prompt: str, completions: Sequence[str], judgement: Judgement, people: Any) -> None:
        """Keep one of the first rows for the table on W&B."""
        if len(self.report.samples) < _SHOWN:
            bias = judgement.position_bias
            self.report.samples.append(
                [row, prompt, "\n\n---\n\n".join(completions), str(judgement.ratings), bias, str(people)]
            )

    def finish(self, seed: int, resamples: int) -> JudgeReport:
        """The report, with intervals from `resamples` bootstrap resamples over clusters."""
        report = self.report
        report.left_out, report.failed = dict(self.left_out), dict(self._failed)
        measures = [
            Measure(name, values=values, clusters=self._clusters[name], proportion=name == "consistent")
            for name, values in self._columns.items()
            if values
        ]
        for measure in [*measures, *self._agreement.measures()]:
            estimate = measure.estimate(0.95, resamples, seed)
            report.metrics[measure.name], report.sizes[measure.name] = estimate.value, estimate.size
            # resampling shows no spread where all pairs are right, or none is
            if estimate.interval is not None and estimate.interval[0] < estimate.interval[1]:
                report.intervals[measure.name] = estimate.interval
        report.by_confidence = self._agreement.by_confidence()
        mass = report.metrics.get("label_mass", 1.0)
        if mass < _LOW_MASS:
            logger.warning(
                f"The labels have only {mass:.3g} of the judge's probability on average, so its preferences are read "
                "from what it nearly never says. Ask for the labels more clearly in the template, begin its answer "
                "(answer_prefix), switch its thinking off (chat_template_kwargs), or let it reason (reasoning=True)."
            )
        return report

    def _note(self, name: str, cluster: Hashable, value: float) -> None:
        self._columns[name].append(float(value))
        self._clusters[name].append(cluster)

    def _agree(self, row: int, cluster: Hashable, judgement: Judgement, people: Sequence[float]) -> None:
        compared = {(pair.first, pair.second): pair for pair in judgement.comparisons}
        for first, second in combinations(range(len(people)), 2):
            sign = (people[first] > people[second]) - (people[first] < people[second])
            if not sign:
                continue  # people see no difference, or do not say
            pair = compared.get((first, second))
            if pair is not None:
                orders = [one for one in (pair.when_first, pair.when_second) if one is not None]
                orders = [one if sign > 0 else 1 - one for one in orders]
                chance = pair.probability if sign > 0 else 1 - pair.probability
                self._agreement.add(row, cluster, chance - 0.5, chance, orders)
            elif not judgement.comparisons and None not in (judgement.ratings[first], judgement.ratings[second]):
                difference = judgement.ratings[first] - judgement.ratings[second]
                self._agreement.add(row, cluster, sign * difference)
