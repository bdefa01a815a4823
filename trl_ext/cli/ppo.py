"""`trl-ext ppo`: train a policy with PPO and a critic.

A row has a `prompt` and the columns that the reward functions need. On several GPUs use
`accelerate launch -m trl_ext.cli.ppo --config CONFIG.yaml`. `common/policy.py` holds the steps.
"""

import sys
from typing import TYPE_CHECKING

from trl_ext.cli.common.policy import policy_parser, train_policy


if TYPE_CHECKING:
    from trl_ext.trainers.common.command_line import Parser


def make_parser(prog: str | None = "trl-ext ppo") -> "Parser":
    """The parser over `PPOArguments`, our `PPOConfig`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext import PPOConfig
    from trl_ext.trainers.common.command_line import PPOArguments

    return policy_parser(PPOArguments, PPOConfig, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from trl_ext import PPOTrainer

    return train_policy(make_parser(), PPOTrainer, argv)


if __name__ == "__main__":
    from trl_ext.cli.main import main as trl_ext

    sys.exit(trl_ext(["ppo", *sys.argv[1:]]))
