"""`trl-ext ensemble`: train an ensemble of reward models on one base in one run, with TRL's flags and ours.

Rows are those of `trl-ext reward`. Also a module for launchers:
`accelerate launch -m trl_ext.cli.ensemble --config CONFIG.yaml`. The flow is in `_train`.
"""

import sys
from typing import TYPE_CHECKING

from ._train import train_main, train_parser


if TYPE_CHECKING:
    from trl import TrlParser


def make_parser(prog: str | None = "trl-ext ensemble") -> "TrlParser":
    """TRL's parser over `ScriptArguments`, our `RewardEnsembleConfig`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl_ext import RewardEnsembleConfig

    return train_parser(RewardEnsembleConfig, prog)


def main(argv: list[str] | None = None) -> int:
    """Run the command. `argv` defaults to the arguments of the process. Returns the exit status."""
    from trl_ext import RewardEnsembleTrainer

    return train_main(make_parser(), RewardEnsembleTrainer, argv)


if __name__ == "__main__":
    from .main import main as trl_ext

    sys.exit(trl_ext(["ensemble", *sys.argv[1:]]))
