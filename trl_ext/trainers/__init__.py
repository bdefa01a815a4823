"""Trainers on top of TRL's. The import of this package checks the versions of trl, transformers and peft."""

from trl_ext.upstream import check_upstream


check_upstream()

from trl_ext.trainers.ensemble.config import (  # noqa: E402
    ORMEnsembleConfig,
    PRMEnsembleConfig,
    RewardEnsembleConfig,
    SegmentEnsembleConfig,
)
from trl_ext.trainers.ensemble.token_trainer import (  # noqa: E402
    ORMEnsembleTrainer,
    PRMEnsembleTrainer,
    SegmentEnsembleTrainer,
)
from trl_ext.trainers.ensemble.trainer import RewardEnsembleTrainer  # noqa: E402
from trl_ext.trainers.ranking.config import RewardConfig  # noqa: E402
from trl_ext.trainers.ranking.trainer import RewardTrainer  # noqa: E402
from trl_ext.trainers.token.orm_config import ORMConfig  # noqa: E402
from trl_ext.trainers.token.orm_trainer import ORMTrainer  # noqa: E402
from trl_ext.trainers.token.prm_config import PRMConfig  # noqa: E402
from trl_ext.trainers.token.prm_trainer import PRMTrainer  # noqa: E402
from trl_ext.trainers.token.segment_config import SegmentRewardConfig  # noqa: E402
from trl_ext.trainers.token.segment_trainer import SegmentRewardTrainer  # noqa: E402
from trl_ext.trainers.weak_to_strong.config import WeakToStrongConfig  # noqa: E402
from trl_ext.trainers.weak_to_strong.trainer import WeakToStrongTrainer  # noqa: E402


__all__ = [
    "ORMConfig",
    "ORMEnsembleConfig",
    "ORMEnsembleTrainer",
    "ORMTrainer",
    "PRMConfig",
    "PRMEnsembleConfig",
    "PRMEnsembleTrainer",
    "PRMTrainer",
    "RewardConfig",
    "RewardEnsembleConfig",
    "RewardEnsembleTrainer",
    "RewardTrainer",
    "SegmentEnsembleConfig",
    "SegmentEnsembleTrainer",
    "SegmentRewardConfig",
    "SegmentRewardTrainer",
    "WeakToStrongConfig",
    "WeakToStrongTrainer",
]
