"""The public names of trl_ext, resolved when they are first used.

Importing this package imports neither torch nor trl, so that `trl-ext --help` and tools that only want the version are
quick. It knows where each public name lives, and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trl_ext.logs import hide_missing_kernel


__version__ = "0.1.0"

hide_missing_kernel()  # before a module imports bitsandbytes

_HOME = {
    "ORMConfig": "trl_ext.trainers",
    "ORMEnsembleConfig": "trl_ext.trainers",
    "ORMEnsembleTrainer": "trl_ext.trainers",
    "ORMTrainer": "trl_ext.trainers",
    "PRMConfig": "trl_ext.trainers",
    "PRMEnsembleConfig": "trl_ext.trainers",
    "PRMEnsembleTrainer": "trl_ext.trainers",
    "PRMTrainer": "trl_ext.trainers",
    "RewardConfig": "trl_ext.trainers",
    "RewardEnsembleConfig": "trl_ext.trainers",
    "RewardEnsembleTrainer": "trl_ext.trainers",
    "RewardTrainer": "trl_ext.trainers",
    "SegmentEnsembleConfig": "trl_ext.trainers",
    "SegmentEnsembleTrainer": "trl_ext.trainers",
    "SegmentRewardConfig": "trl_ext.trainers",
    "SegmentRewardTrainer": "trl_ext.trainers",
    "WeakToStrongConfig": "trl_ext.trainers",
    "WeakToStrongTrainer": "trl_ext.trainers",
    "WeakToStrongArguments": "trl_ext.pipelines.weak_to_strong.config",
    "weak_to_strong": "trl_ext.pipelines.weak_to_strong.experiment",
    "performance_gap_recovered": "trl_ext.metrics.pgr",
    "RewardEnsemble": "trl_ext.scoring",
    "RewardScorer": "trl_ext.scoring",
    "JudgeReward": "trl_ext.pipelines.feedback.judge_reward",
    "label_preferences": "trl_ext.pipelines.feedback.judge_labels",
    "rejection_sample": "trl_ext.pipelines.rejection_sampling.sampler",
    "best_of_n": "trl_ext.pipelines.best_of_n",
    "choose": "trl_ext.pipelines.choice.choose",
    "self_instruct": "trl_ext.pipelines.feedback.self_instruct",
    "label_steps": "trl_ext.pipelines.feedback.step_labels",
    "RejectionSamplingConfig": "trl_ext.pipelines.rejection_sampling.config",
    "RejectionSamplingTrainer": "trl_ext.pipelines.rejection_sampling.trainer",
    "DenseGRPOConfig": "trl_ext.trainers.policy.config",
    "DenseGRPOTrainer": "trl_ext.trainers.policy.trainer",
    "PPOConfig": "trl_ext.trainers.policy.ppo_config",
    "PPOTrainer": "trl_ext.trainers.policy.ppo_trainer",
    "RankedDPOConfig": "trl_ext.trainers.policy.ranked_dpo_config",
    "RankedDPOTrainer": "trl_ext.trainers.policy.ranked_dpo_trainer",
    "EvaluationCallback": "trl_ext.evaluation.callback",
    "EvaluationReport": "trl_ext.evaluation",
    "evaluate_reward_model": "trl_ext.evaluation",
    "load_reward_model": "trl_ext.models",
    "merge_reward_model": "trl_ext.models",
    "merge_reward_models": "trl_ext.models",
}

__all__ = [
    "DenseGRPOConfig",
    "DenseGRPOTrainer",
    "EvaluationCallback",
    "EvaluationReport",
    "JudgeReward",
    "ORMConfig",
    "ORMEnsembleConfig",
    "ORMEnsembleTrainer",
    "ORMTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RankedDPOConfig",
    "RankedDPOTrainer",
    "PRMConfig",
    "PRMEnsembleConfig",
    "PRMEnsembleTrainer",
    "PRMTrainer",
    "RejectionSamplingConfig",
    "RejectionSamplingTrainer",
    "RewardConfig",
    "RewardEnsemble",
    "RewardEnsembleConfig",
    "RewardEnsembleTrainer",
    "RewardScorer",
    "RewardTrainer",
    "SegmentEnsembleConfig",
    "SegmentEnsembleTrainer",
    "SegmentRewardConfig",
    "SegmentRewardTrainer",
    "WeakToStrongArguments",
    "WeakToStrongConfig",
    "WeakToStrongTrainer",
    "__version__",
    "best_of_n",
    "choose",
    "evaluate_reward_model",
    "label_preferences",
    "label_steps",
    "load_reward_model",
    "merge_reward_model",
    "merge_reward_models",
    "performance_gap_recovered",
    "rejection_sample",
    "self_instruct",
    "weak_to_strong",
]

if TYPE_CHECKING:
    from trl_ext.evaluation import EvaluationReport, evaluate_reward_model
    from trl_ext.evaluation.callback import EvaluationCallback
    from trl_ext.metrics.pgr import performance_gap_recovered
    from trl_ext.models import load_reward_model, merge_reward_model, merge_reward_models
    from trl_ext.pipelines.best_of_n import best_of_n
    from trl_ext.pipelines.choice.choose import choose
    from trl_ext.pipelines.feedback.judge_labels import label_preferences
    from trl_ext.pipelines.feedback.judge_reward import JudgeReward
    from trl_ext.pipelines.feedback.self_instruct import self_instruct
    from trl_ext.pipelines.feedback.step_labels import label_steps
    from trl_ext.pipelines.rejection_sampling.config import RejectionSamplingConfig
    from trl_ext.pipelines.rejection_sampling.sampler import rejection_sample
    from trl_ext.pipelines.rejection_sampling.trainer import RejectionSamplingTrainer
    from trl_ext.pipelines.weak_to_strong.config import WeakToStrongArguments
    from trl_ext.pipelines.weak_to_strong.experiment import weak_to_strong
    from trl_ext.scoring import RewardEnsemble, RewardScorer
    from trl_ext.trainers import (
        ORMConfig,
        ORMEnsembleConfig,
        ORMEnsembleTrainer,
        ORMTrainer,
        PRMConfig,
        PRMEnsembleConfig,
        PRMEnsembleTrainer,
        PRMTrainer,
        RewardConfig,
        RewardEnsembleConfig,
        RewardEnsembleTrainer,
        RewardTrainer,
        SegmentEnsembleConfig,
        SegmentEnsembleTrainer,
        SegmentRewardConfig,
        SegmentRewardTrainer,
        WeakToStrongConfig,
        WeakToStrongTrainer,
    )
    from trl_ext.trainers.policy.config import DenseGRPOConfig
    from trl_ext.trainers.policy.ppo_config import PPOConfig
    from trl_ext.trainers.policy.ppo_trainer import PPOTrainer
    from trl_ext.trainers.policy.ranked_dpo_config import RankedDPOConfig
    from trl_ext.trainers.policy.ranked_dpo_trainer import RankedDPOTrainer
    from trl_ext.trainers.policy.trainer import DenseGRPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}. Public names: {', '.join(_HOME)}.")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
