"""Scoring text with reward models: `scorer` makes a TRL reward function of one model, `ensemble` of several.

`shared_base_scorer` makes one of an adapter on the base of a policy in training.
"""

from trl_ext.scoring.ensemble import RewardEnsemble
from trl_ext.scoring.scorer import RewardScorer
from trl_ext.scoring.shared_base_scorer import SharedBaseScorer


__all__ = ["RewardEnsemble", "RewardScorer", "SharedBaseScorer"]
