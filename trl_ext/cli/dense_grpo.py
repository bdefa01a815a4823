"""`trl-ext dense-grpo`: train a policy with rewards of steps, segments or tokens (GRPO).

A row has a `prompt` and the columns that the reward functions need. On several GPUs use
`accelerate launch -m trl_ext.cli.dense_grpo --config CONFIG.yaml`. `common/policy.py` holds the steps.
"""

import sys
from typing import TYPE_CHECKING

from trl_ext.cli.common.policy import policy_parser, train_policy


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


def make_parser(prog: str | None = "trl-ext dense-grpo") -> "Parser":
    """The parser over `PolicyArguments`, our `DenseGRPOConfig`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext import DenseGRPOConfig
    from trl_ext.trainers.common.command_line import PolicyArguments

    return policy_parser(PolicyArguments, DenseGRPOConfig, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from trl_ext import DenseGRPOTrainer

    return train_policy(make_parser(), DenseGRPOTrainer, argv)


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["dense-grpo", *sys.argv[1:]]))
