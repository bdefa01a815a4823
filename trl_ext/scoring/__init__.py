"""Scoring text with a reward model: `scorer` turns a model into a TRL reward function."""

from .scorer import RewardScorer


__all__ = ["RewardScorer"]
