"""`trl-ext bench`: our training steps and our scoring beside TRL's way, on the same work, in one process.

Nothing is downloaded: models have random weights, and rows are synthetic or come from a file that you name. It knows
the names of the cases. `trl_ext.bench.runner` runs them; each case is a module of `trl_ext.bench` or `trl_ext.fit`.
"""

import argparse
import logging
import os
import sys

from trl_ext.bench import data as bench_data
from trl_ext.bench import ensemble as bench_ensemble
from trl_ext.bench import generate as bench_generate
from trl_ext.bench import reward as bench_reward
from trl_ext.bench import score as bench_score
from trl_ext.bench import token as bench_token
from trl_ext.bench.runner import run_case
from trl_ext.cli.main import TRACEBACK
from trl_ext.fit import command as bench_fit


MEASURED = {
    "reward": (bench_reward, "RewardTrainer beside trl.RewardTrainer, over shapes and over your data"),
    "token": (bench_token, "ORMTrainer on flat rows beside padded rows, for K answers to a question"),
    "ensemble": (bench_ensemble, "M members trained and scored in one pass beside single members"),
    "fit": (bench_fit, "whether a training config fits on a card, what takes the memory, what would change that"),
    "generate": (bench_generate, "our backend beside a plain generate loop, with and without the store"),
    "data": (bench_data, "RewardTrainer's preparation of pairs beside that of trl.RewardTrainer"),
    "score": (bench_score, "RewardScorer beside padded rows, for N completions of a prompt"),
}


def make_parser(prog: str | None = "trl-ext bench") -> argparse.ArgumentParser:
    """The parser: one sub-command for each thing that is measured."""
    parser = argparse.ArgumentParser(prog=prog, description="Measure ours beside TRL's way in one process.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, line) in MEASURED.items():
        module.add_arguments(commands.add_parser(name, help=line))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    module, _ = MEASURED[args.command]
    trainers = logging.getLogger("trl_ext.trainers.common.head_training")
    trainers.addFilter(_says_news)
    try:
        run_case(args.command, module, args)
    except ValueError as error:
        if os.environ.get(TRACEBACK):
            raise
        parser.error(str(error))
    finally:
        trainers.removeFilter(_says_news)
    return 0


def _says_news(record: logging.LogRecord) -> bool:
    """False for what each of the many trainers would say: that its metrics are reported nowhere."""
    return not record.getMessage().startswith("Metrics are not reported")


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["bench", *sys.argv[1:]]))
