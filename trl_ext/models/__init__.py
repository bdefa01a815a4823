"""Reward models: building, heads, checkpoints, merging."""

from .building import add_adapter, build_reward_model, is_quantized
from .heads import HeadError, candidate_scores, head_modules
from .loading import BaseMismatchError, load_reward_model
from .merging import MergeError, merge_reward_model
from .sidecar import Sidecar, SidecarError, get_sidecar, read_sidecar


__all__ = [
    "BaseMismatchError",
    "HeadError",
    "MergeError",
    "Sidecar",
    "SidecarError",
    "add_adapter",
    "build_reward_model",
    "candidate_scores",
    "get_sidecar",
    "head_modules",
    "is_quantized",
    "load_reward_model",
    "merge_reward_model",
    "read_sidecar",
]
