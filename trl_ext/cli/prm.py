"""`trl-ext prm`: train a process reward model, with TRL's flags and ours.

A row has `prompt`, `completions` (the steps) and `labels`. On several GPUs use
`accelerate launch -m trl_ext.cli.prm --config CONFIG.yaml`. `common/train.py` holds the steps.
"""

import sys
from typing import TYPE_CHECKING

from trl_ext.cli.common.train import train_main, train_parser


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


def make_parser(prog: str | None = "trl-ext prm") -> "Parser":
    """The parser over `DataArguments`, our `PRMConfig`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext import PRMConfig

    return train_parser(PRMConfig, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from trl_ext import PRMTrainer

    return train_main(make_parser(), PRMTrainer, argv)


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["prm", *sys.argv[1:]]))
