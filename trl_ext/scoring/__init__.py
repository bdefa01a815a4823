"""Scoring text with reward models: `scorer` makes a TRL reward function of one model, `ensemble` of several."""

from trl_ext.scoring.ensemble import RewardEnsemble
from trl_ext.scoring.scorer import RewardScorer


__all__ = ["RewardEnsemble", "RewardScorer"]
