"""`trl-ext orm`: train an outcome reward model, with TRL's flags and ours.

A row has `prompt`, `completion` and `label`. On several GPUs use
`accelerate launch -m trl_ext.cli.orm --config CONFIG.yaml`. `common/train.py` holds the steps.
"""

import sys
from typing import TYPE_CHECKING

from trl_ext.cli.common.train import train_main, train_parser


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


def make_parser(prog: str | None = "trl-ext orm") -> "Parser":
    """The parser over `DataArguments`, our `ORMConfig`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext import ORMConfig

    return train_parser(ORMConfig, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from trl_ext import ORMTrainer

    return train_main(make_parser(), ORMTrainer, argv)


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["orm", *sys.argv[1:]]))
