"""`trl-ext bench`: compare our training, generation and scoring with TRL's on the same work in one process.

Models have random weights, and rows are synthetic unless you name a data set. This module knows the names of the
cases. `trl_ext.bench.runner` runs them; each case is a module of `trl_ext.bench` or `trl_ext.fit`.
"""

import argparse
import logging
import os
import sys

from trl_ext.bench import data as bench_data
from trl_ext.bench import dpo as bench_dpo
from trl_ext.bench import ensemble as bench_ensemble
from trl_ext.bench import evaluate as bench_evaluate
from trl_ext.bench import generate as bench_generate
from trl_ext.bench import reward as bench_reward
from trl_ext.bench import score as bench_score
from trl_ext.bench import serving as bench_serving
from trl_ext.bench import token as bench_token
from trl_ext.bench import trunk as bench_trunk
from trl_ext.bench.runner import run_case
from trl_ext.cli.main import TRACEBACK
from trl_ext.fit import command as bench_fit
from trl_ext.fit import policy as bench_policy


MEASURED = {
    "reward": (bench_reward, "compare RewardTrainer with trl.RewardTrainer, on given shapes and on your data"),
    "dpo": (bench_dpo, "compare RankedDPOTrainer with trl.DPOTrainer on pairs, and with padded rows on rankings"),
    "token": (bench_token, "compare ORMTrainer on flat rows and on padded rows, with K answers to a question"),
    "trunk": (bench_trunk, "compare training with and without kept states of the layers that are not trained"),
    "ensemble": (bench_ensemble, "compare M members in one pass with single members, in training and scoring"),
    "fit": (bench_fit, "estimate whether a training config fits on a card, and what takes the memory"),
    "generate": (bench_generate, "compare our backend, with and without stored shards, with a plain generate loop"),
    "data": (bench_data, "compare the preparation of pairs in RewardTrainer and in trl.RewardTrainer"),
    "evaluate": (bench_evaluate, "compare evaluate_reward_model with the scorer alone, in time and memory"),
    "policy": (
        bench_policy,
        "compare DenseGRPOTrainer and PPOTrainer with trl.GRPOTrainer, and PPO's memory with SFT's",
    ),
    "score": (bench_score, "compare RewardScorer with padded rows, for N completions of a prompt"),
    "serving": (bench_serving, "our part of the time when a server runs the model"),
}


def make_parser(prog: str | None = "trl-ext bench") -> argparse.ArgumentParser:
    """The parser, with one sub-command for each case."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Measure time and memory of trl-ext and of TRL on the same work in one process."
    )
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
    """False for the warning that metrics are not reported, which each of the many trainers would repeat."""
    return not record.getMessage().startswith("Metrics are not reported")


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["bench", *sys.argv[1:]]))
