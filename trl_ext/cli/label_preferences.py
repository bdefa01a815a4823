"""`trl-ext label-preferences`: let a judge label the completions of a data set. A rerun asks only what is missing.

The output folder gets `preferences.jsonl`, which `trl-ext reward` takes as it is, `report.json` and `answers`. This
file knows arguments; [`~trl_ext.label_preferences`] explains them.
"""

import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from trl_ext.cli.common.generation import json_object
from trl_ext.cli.common.options import command_parser, parse, report_to_wandb
from trl_ext.pipelines.feedback.judge_settings import JudgeFields


if TYPE_CHECKING:
    from trl_ext.pipelines.feedback.judge_labels import Judged
    from trl_ext.trainers.common.command_line import Parser


@dataclass(kw_only=True)
class LabelPreferencesArguments(JudgeFields):
    """Arguments of `trl-ext label-preferences`."""

    judge: str = field(
        metadata={"help": "folder or Hub id of the judge, a language model; with a server its name there"}
    )
    dataset_name: str = field(
        metadata={"help": "file (.jsonl, .json, .parquet, .csv), folder, or Hub id of the rows to label"}
    )
    output_dir: str = field(metadata={"help": "folder for preferences.jsonl, report.json and the judge's answers"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    dataset_split: str = field(default="train", metadata={"help": "split to label"})
    dataset_format: str | None = field(
        default=None,
        metadata={"help": "the rows are a public data set as released, e.g. helpsteer3: convert them"},
    )
    max_rows: int | None = field(default=None, metadata={"help": "take only the first rows"})
    min_confidence: float = field(
        default=0.5, metadata={"help": "leave out pairs whose larger probability is below this"}
    )
    tie_band: float = field(
        default=0.0,
        metadata={
            "help": "pairs: a probability at most this far from 1/2 is a tie; rankings: a row whose ratings span at "
            "most this much is a tie"
        },
    )
    ties: Literal["keep", "drop"] = field(
        default="keep", metadata={"help": "keep ties, with the probability 1/2 or equal ratings, or leave them out"}
    )
    resamples: int = field(default=2_000, metadata={"help": "bootstrap resamples for the intervals of the report"})
    report_to: Literal["none", "wandb"] = field(
        default="none", metadata={"help": "wandb: put numbers and tables on a run"}
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = json_object("chat_template_kwargs", self.chat_template_kwargs)
        if self.dataset_format is not None:
            from trl_ext.data.recipes import find_recipe

            find_recipe(self.dataset_format)


def make_parser(prog: str | None = "trl-ext label-preferences") -> "Parser":
    """The parser over `LabelPreferencesArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(LabelPreferencesArguments, prog, __doc__)


def run(args: LabelPreferencesArguments) -> "Judged":
    """Read the rows and let the judge label them."""
    from trl_ext.data.sources import load_source, select_split
    from trl_ext.pipelines.feedback.judge_labels import judge_rows

    rows: Any = select_split(
        load_source(args.dataset_name, args.dataset_config), args.dataset_split, "--dataset_split"
    )
    if args.dataset_format is not None:
        from trl_ext.data.recipes import convert

        rows = convert(rows, args.dataset_format)
    names = [item.name for item in fields(JudgeFields)]
    names += ["min_confidence", "tie_band", "ties", "max_rows", "resamples"]
    return judge_rows(args.judge, rows, args.output_dir, **{name: getattr(args, name) for name in names})


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    judged = run(args)
    judged.report.print()
    report_to_wandb("label-preferences", args, judged.report.log_to_wandb)
    print(f"\nThe rows are in {judged.path}: trl-ext reward --dataset_name {judged.path}")
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["label-preferences", *sys.argv[1:]]))
