"""Scoring text with reward models: `scorer` makes a TRL reward function of one model, `ensemble` of several.

`shared_base_scorer` makes one of an adapter on the base of a policy in training. The names are resolved when they are
first used, because `trl-ext plugins` needs only the reducers and aggregations of this package.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl_ext.scoring.ensemble import RewardEnsemble
    from trl_ext.scoring.scorer import RewardScorer
    from trl_ext.scoring.shared_base_scorer import SharedBaseScorer

__all__ = ["RewardEnsemble", "RewardScorer", "SharedBaseScorer"]

_HOME = {"RewardEnsemble": "ensemble", "RewardScorer": "scorer", "SharedBaseScorer": "shared_base_scorer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
