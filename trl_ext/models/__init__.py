"""Reward models: building, heads, checkpoints, merging."""

from trl_ext.models.adapters import add_adapter
from trl_ext.models.averaging import AveragingError, merge_reward_models
from trl_ext.models.bases import BaseMismatchError
from trl_ext.models.building import build_reward_model, is_quantized
from trl_ext.models.heads import HeadError, candidate_scores, head_modules
from trl_ext.models.loading import load_reward_model
from trl_ext.models.merging import MergeError, merge_reward_model
from trl_ext.models.sidecar import Sidecar, SidecarError, get_sidecar, read_sidecar


__all__ = [
    "AveragingError",
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
    "merge_reward_models",
    "read_sidecar",
]
