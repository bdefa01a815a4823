"""`trl-ext ensemble`: train an ensemble of reward models on one base in one run, with TRL's flags and ours.

`--kind` chooses the kind of the members. Rows and other flags are those of `trl-ext reward`, `orm`, `prm` or
`segment`. On several GPUs use `accelerate launch -m trl_ext.cli.ensemble --config CONFIG.yaml`.
`common/train.py` holds the steps.
"""

import argparse
import sys
from typing import TYPE_CHECKING

import trl_ext
from trl_ext.cli.common.train import train_main, train_parser


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


KINDS = {"reward": "Reward", "orm": "ORM", "prm": "PRM", "segment": "Segment"}
"""Kind of the members -> prefix of the names of its trainer and config."""


def make_parser(prog: str | None = "trl-ext ensemble", kind: str = "reward") -> "Parser":
    """The parser over `DataArguments`, our config for the kind, `ModelConfig` and `DatasetMixtureConfig`."""
    parser = train_parser(getattr(trl_ext, f"{KINDS[kind]}EnsembleConfig"), prog)
    parser.epilog = (
        f"--kind {{{','.join(KINDS)}}}: kind of the members (default: reward). These are the options of {kind}."
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    first = argparse.ArgumentParser("trl-ext ensemble", add_help=False, allow_abbrev=False)
    first.add_argument("--kind", choices=KINDS, default="reward")
    chosen, rest = first.parse_known_args(argv)
    trainer_class = getattr(trl_ext, f"{KINDS[chosen.kind]}EnsembleTrainer")
    return train_main(make_parser(kind=chosen.kind), trainer_class, rest)


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext_command

    sys.exit(trl_ext_command(["ensemble", *sys.argv[1:]]))
