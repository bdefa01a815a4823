"""`trl-ext reward`: train a reward model from pairs or K-way rankings, with TRL's flags and ours.

On several GPUs use `accelerate launch -m trl_ext.cli.reward --config CONFIG.yaml`. `common/train.py` holds the steps.
"""

import sys
from typing import TYPE_CHECKING

from trl_ext.cli.common.train import train_main, train_parser


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


def make_parser(prog: str | None = "trl-ext reward") -> "Parser":
    """The parser over `DataArguments`, our `RewardConfig`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext import RewardConfig

    return train_parser(RewardConfig, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from trl_ext import RewardTrainer

    return train_main(make_parser(), RewardTrainer, argv)


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["reward", *sys.argv[1:]]))
