"""Scoring text with reward models: `scorer` turns one into a TRL reward function, `ensemble` several."""

from trl_ext.scoring.ensemble import RewardEnsemble
from trl_ext.scoring.scorer import RewardScorer


__all__ = ["RewardEnsemble", "RewardScorer"]
