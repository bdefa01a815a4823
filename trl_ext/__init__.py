"""The public names of trl_ext, resolved when they are first used.

Importing this package imports neither torch nor trl, so that `trl-ext --help` and tools that only want the version are
quick. It knows where each public name lives, and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_HOME = {
    "ORMConfig": "trl_ext.trainers",
    "ORMTrainer": "trl_ext.trainers",
    "PRMConfig": "trl_ext.trainers",
    "PRMTrainer": "trl_ext.trainers",
    "RewardConfig": "trl_ext.trainers",
    "RewardTrainer": "trl_ext.trainers",
    "SegmentRewardConfig": "trl_ext.trainers",
    "SegmentRewardTrainer": "trl_ext.trainers",
    "RewardScorer": "trl_ext.scoring",
    "load_reward_model": "trl_ext.models",
    "merge_reward_model": "trl_ext.models",
}

__all__ = [
    "ORMConfig",
    "ORMTrainer",
    "PRMConfig",
    "PRMTrainer",
    "RewardConfig",
    "RewardScorer",
    "RewardTrainer",
    "SegmentRewardConfig",
    "SegmentRewardTrainer",
    "__version__",
    "load_reward_model",
    "merge_reward_model",
]

if TYPE_CHECKING:
    from trl_ext.models import load_reward_model, merge_reward_model
    from trl_ext.scoring import RewardScorer
    from trl_ext.trainers import (
        ORMConfig,
        ORMTrainer,
        PRMConfig,
        PRMTrainer,
        RewardConfig,
        RewardTrainer,
        SegmentRewardConfig,
        SegmentRewardTrainer,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}. Public names: {', '.join(_HOME)}.")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
