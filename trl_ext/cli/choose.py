"""`trl-ext choose`: choose which rows of a pool to annotate next, and write them in order.

This file knows arguments and files; [`~trl_ext.choose`] chooses. A row of the pool has `completions` (two or more) and
a `prompt`, or `chosen` and `rejected`. The output has the chosen rows with `choice_order`, `choice_value` and
`choice_row`, the place in the pool. Standard output gets a report.
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_ext.cli.common.options import command_parser, parse, report_to_wandb
from trl_ext.pipelines.stages.one_process import check_one_process


if TYPE_CHECKING:
    from datasets import Dataset

    from trl_ext.trainers.common.command_line import Parser


@dataclass
class ChooseArguments:
    """Arguments of `trl-ext choose`."""

    dataset_name: str = field(
        metadata={"help": "the pool: file (.jsonl, .json, .parquet, .csv), folder, or Hub id of rows"}
    )
    output: str = field(
        metadata={"help": "JSONL file to write: the chosen rows in order; an existing file is an error"}
    )
    n: int = field(metadata={"help": "how many rows to choose"})
    model: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the scalar reward model, or of an ensemble; only random needs none"},
    )
    strategy: Literal["fisher", "uncertainty", "disagreement", "entropy", "random"] = field(
        default="fisher",
        metadata={
            "help": "what a row is worth: its information about the last layer, the deviation of its score "
            "difference, how much the members of an ensemble disagree, the entropy of its preference, or a random "
            "number"
        },
    )
    diversity: Literal["determinant", "k_centre", "none"] | None = field(
        default=None,
        metadata={
            "help": "how a batch is put together: by the information of the whole batch, by rows that differ from "
            "each other, or by value alone (default: determinant for fisher, else none)"
        },
    )
    shortlist: int | None = field(
        default=None, metadata={"help": "rows with the highest values that diversity picks from (default: 10 * n)"}
    )
    prior_precision: float | None = field(
        default=None,
        metadata={"help": "precision of the prior of each weight of the head (default: from the data or the weights)"},
    )
    fit_uncertainty: str | None = field(
        default=None,
        metadata={
            "help": "first fit the model's uncertainty on the rows that are labelled already (file, folder or Hub id; "
            "split train), and store it with the model"
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    dataset_split: str = field(default="train", metadata={"help": "split of the pool"})
    batch_size: str = field(default="auto", metadata={"help": "completions of a batch, or auto: by tokens"})
    max_length: int | None = field(default=None, metadata={"help": "cut completions with prompts to so many tokens"})
    device: str | None = field(default=None, metadata={"help": "e.g. cpu or cuda:1"})
    base_model: str | None = field(default=None, metadata={"help": "where the base of an adapter is now, if it moved"})
    seed: int = field(default=0, metadata={"help": "seed of the strategy random"})
    report_to: Literal["none", "wandb"] = field(
        default="none", metadata={"help": "wandb: put the report and the chosen rows on a run"}
    )

    def __post_init__(self) -> None:
        if self.model is None and (self.strategy != "random" or self.fit_uncertainty is not None):
            raise ValueError(f"--strategy {self.strategy} needs --model.")
        if self.batch_size != "auto":
            if not str(self.batch_size).isdecimal() or int(self.batch_size) < 1:
                raise ValueError(f"--batch_size is {self.batch_size!r}; needed: auto, or a number of rows >= 1.")
            self.batch_size = int(self.batch_size)
        if Path(self.output).exists():
            raise ValueError(f"--output {self.output} exists. Choose another file, or move it.")


def make_parser(prog: str | None = "trl-ext choose") -> "Parser":
    """The parser over `ChooseArguments`: flags, or `--config x.yaml` with the same names."""
    return command_parser(ChooseArguments, prog, __doc__)


def run(args: ChooseArguments) -> dict[str, Any]:
    """Choose the rows and write them. Returns the report."""
    check_one_process("choose")
    from trl_ext.data.sources import load_source, select_split
    from trl_ext.pipelines.choice.choose import choose_rows, chosen_rows
    from trl_ext.pipelines.stages.store import write_lines

    pool = select_split(load_source(args.dataset_name, args.dataset_config), args.dataset_split, "--dataset_split")
    model = None if args.model is None else _load(args)
    prior = None if args.fit_uncertainty is not None else args.prior_precision
    choice = choose_rows(
        model,
        pool,
        args.n,
        args.strategy,
        diversity=args.diversity,
        shortlist=args.shortlist,
        prior_precision=prior,
        seed=args.seed,
    )
    chosen = chosen_rows(pool, choice)
    write_lines(Path(args.output), map(_as_json, chosen), checksums=False)
    report_to_wandb("choose", args, lambda: log_to_wandb(choice.report, chosen))
    return {**choice.report, "output": args.output}


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a pool in JSON: numbers in full, null for NaN, and dates as texts."""
    return json.loads(json.dumps(row, default=str), parse_constant=lambda name: None)


def _load(args: ChooseArguments) -> Any:
    """The model or ensemble, with its uncertainty fitted if that was asked for."""
    from trl_ext import RewardScorer
    from trl_ext.scoring.ensemble import load_scorer

    options = {name: getattr(args, name) for name in ("batch_size", "max_length", "device", "base_model")}
    scorer = load_scorer(args.model, **options)
    if args.fit_uncertainty is not None:
        if not isinstance(scorer, RewardScorer):
            raise ValueError(f"--fit_uncertainty needs a single model, and {args.model} is an ensemble.")
        about = scorer.fit_uncertainty(args.fit_uncertainty, args.prior_precision)
        print(f"Uncertainty: {json.dumps(about)}", file=sys.stderr)
    return scorer


def log_to_wandb(report: dict[str, Any], chosen: "Dataset") -> None:
    """Log the numbers of the report and a table of the first 100 rows to the run that is open."""
    import wandb

    first = map(_as_json, islice(chosen, 100))
    rows = [[json.dumps(value, ensure_ascii=False) for value in row.values()] for row in first]
    numbers = {f"choose/{name}": value for name, value in report.items() if isinstance(value, (int, float))}
    wandb.run.log(numbers | {"choose/rows": wandb.Table(columns=chosen.column_names, data=rows)})


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    (args,) = parse(make_parser(), argv)
    print(json.dumps(run(args), indent=2))
    return 0


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["choose", *sys.argv[1:]]))
