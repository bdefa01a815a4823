"""`EvaluationReport`: what an evaluation found, as files, Markdown, a table for the terminal, and W&B tables.

Pictures are made by `figures`, the HTML page by `page`. It knows findings, and nothing of how they were computed.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_ext.evaluation.report.figures import draw
from trl_ext.evaluation.report.findings import Findings
from trl_ext.evaluation.report.page import to_html
from trl_ext.style import matplotlib_is_there
from trl_ext.trainers.common.model_card import CARD_NAME, put_evaluation


_MARKS = {"good": "ok", "look": "look", "bad": "bad"}


@dataclass
class EvaluationReport(Findings):
    """
    What an evaluation found; see [`~trl_ext.evaluation.report.findings.Findings`] for its fields.

    `metrics`, `intervals` and `flags` are the three that programs read; everything is in `evaluation.json` too.
    """

    def to_dict(self) -> dict[str, Any]:
        """Everything as values that JSON holds; a number that is not finite becomes `None`."""
        return _plain(asdict(self))

    def save(self, output_dir: str | Path) -> list[Path]:
        """
        Write `evaluation.json`, `evaluation.md`, `evaluation.html` and, where matplotlib is installed, PNG pictures.

        Returns:
            `list[Path]`: the files.
        """
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
        lines += ["", f"| metric | value | {self.level()} interval | detectable | n |", "|---|---|---|---|---|"]
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

    def update_model_card(self, folder: str | Path) -> Path:
        """
        Put the summary and all numbers into the model card of a checkpoint, in place of an earlier evaluation.

        `push_to_hub` of a trainer writes the card anew and keeps this section.

        Args:
            folder (`str` or `Path`): the checkpoint; its `README.md` is made where there is none.

        Returns:
            `Path`: the card.

        Raises:
            `NotADirectoryError`: there is no such folder.
        """
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"{folder} is no folder; needed: the folder of a saved model, to hold its card.")
        put_evaluation(folder, self.to_markdown(heading="Results"))
        return Path(folder, CARD_NAME)

    def print(self) -> None:
        """Show the summary, metrics and probes in the terminal."""
        from rich.console import Console
        from rich.table import Column, Table

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
                table = Table(Column(names[0], overflow="fold"), *names[1:])
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
