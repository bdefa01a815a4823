"""Trainers: TRL's, with one thing changed each. Importing this checks the versions of trl, transformers and peft."""

from trl_ext.upstream import check_upstream


check_upstream()

from .ensemble_config import (  # noqa: E402
    ORMEnsembleConfig,
    PRMEnsembleConfig,
    RewardEnsembleConfig,
    SegmentEnsembleConfig,
)
from .ensemble_trainer import RewardEnsembleTrainer  # noqa: E402
from .orm_config import ORMConfig  # noqa: E402
from .orm_trainer import ORMTrainer  # noqa: E402
from .prm_config import PRMConfig  # noqa: E402
from .prm_trainer import PRMTrainer  # noqa: E402
from .reward_config import RewardConfig  # noqa: E402
from .reward_trainer import RewardTrainer  # noqa: E402
from .segment_config import SegmentRewardConfig  # noqa: E402
from .segment_trainer import SegmentRewardTrainer  # noqa: E402
from .token_ensemble_trainer import (  # noqa: E402
    ORMEnsembleTrainer,
    PRMEnsembleTrainer,
    SegmentEnsembleTrainer,
)
from .weak_to_strong_config import WeakToStrongConfig  # noqa: E402
from .weak_to_strong_trainer import WeakToStrongTrainer  # noqa: E402


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
