"""`trl-ext segment`: train rewards for segments of a text, with TRL's flags and ours.

A row has `prompt`, `completion` and `segments`. On several GPUs use
`accelerate launch -m trl_ext.cli.segment --config CONFIG.yaml`. `common/train.py` holds the steps.
"""

import sys
from typing import TYPE_CHECKING

from trl_ext.cli.common.train import train_main, train_parser


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


def make_parser(prog: str | None = "trl-ext segment") -> "Parser":
    """The parser over `DataArguments`, our `SegmentRewardConfig`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext import SegmentRewardConfig

    return train_parser(SegmentRewardConfig, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from trl_ext import SegmentRewardTrainer

    return train_main(make_parser(), SegmentRewardTrainer, argv)


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["segment", *sys.argv[1:]]))
