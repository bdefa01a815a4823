"""Scoring text with reward models: `scorer` turns one into a TRL reward function, `ensemble` several."""

from .ensemble import RewardEnsemble
from .scorer import RewardScorer


__all__ = ["RewardEnsemble", "RewardScorer"]
