"""`trl-ext ranked-dpo`: train a policy on rankings or pairs with a ranking loss (DPO), without a reward model.

On several GPUs use `accelerate launch -m trl_ext.cli.ranked_dpo --config CONFIG.yaml`.
`common/train.py` holds the steps.
"""

import sys
from typing import TYPE_CHECKING

from trl_ext.cli.common.train import train_main, train_parser


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


def make_parser(prog: str | None = "trl-ext ranked-dpo") -> "Parser":
    """The parser over `DataArguments`, our `RankedDPOConfig`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext import RankedDPOConfig

    return train_parser(RankedDPOConfig, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from trl_ext import RankedDPOTrainer

    return train_main(make_parser(), RankedDPOTrainer, argv)


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["ranked-dpo", *sys.argv[1:]]))
