"""Configurations of the ensemble trainers: the arguments of one model's trainer, and those that members need."""

from dataclasses import dataclass, field

from trl_ext.trainers.ensemble.data import COLUMN_PREFIX, STRATEGIES
from trl_ext.trainers.ranking.config import RewardConfig
from trl_ext.trainers.token.orm_config import ORMConfig
from trl_ext.trainers.token.prm_config import PRMConfig
from trl_ext.trainers.token.segment_config import SegmentRewardConfig


@dataclass
class EnsembleFields:
    """
    The arguments that ensembles add to the configuration of one model. The others keep their meaning and defaults.

    `max_grad_norm` applies to each member separately. `seed` decides the order of rows if all members share it.

    Args:
        num_members (`int`, *optional*, defaults to `4`):
            M, the number of members.
        member_seeds (`list[int]`, *optional*):
            A seed for each member. The member gets the head, the adapter and (with `"shuffle"`) the order of rows that
            a trainer of one model has with this seed. Defaults to `seed`, `seed + 1`, ...
        data_strategy (`str`, *optional*, defaults to `"shuffle"`):
            The rows that each member trains on. With `"shuffle"`, each member trains on all rows in a different order.
            With every other strategy all members get the same batches, so that the layers below the first adapted
            layer run once for all members. `"shared"`: all members train on all rows. `"bootstrap"`: each member draws
            from Poisson(1) how often each row counts. `"kfold"`: each member leaves out one fold of the rows.
            `"column:<name>"`: the column assigns rows to members. It has one distinct value per member, in sorted
            order. A list assigns the row to several members, and null assigns it to all.
        branch_at (`float`, *optional*):
            Share of the layers, counted from the first, that have no adapters and run once for all members, e.g. 0.75.
            It sets `layers_to_transform` of the LoRA config, and works with `target_modules="all-linear"` too. With
            `None`, the LoRA config decides which layers have adapters.
    """

    num_members: int = field(default=4, metadata={"help": "Number of members."})
    member_seeds: list[int] | None = field(
        default=None, metadata={"help": "A seed for each member; default: seed, seed + 1, ..."}
    )
    data_strategy: str = field(
        default="shuffle",
        metadata={
            "help": "The rows that members train on: 'shuffle' (all rows, each member in another order), or with the "
            "same batches for all 'shared', 'bootstrap', 'kfold' or 'column:<name>'."
        },
    )
    branch_at: float | None = field(
        default=None,
        metadata={"help": "Share of the layers, counted from the first, without adapters: they run once for all."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_members < 2:
            raise ValueError(f"num_members={self.num_members} is no ensemble. Needed: 2 or more, or RewardTrainer.")
        if self.member_seeds is not None and len(set(self.member_seeds)) != self.num_members:
            raise ValueError(
                f"member_seeds={self.member_seeds} with num_members={self.num_members}. Needed: a different seed for "
                "each member."
            )
        if self.branch_at is not None and not 0.0 <= self.branch_at < 1.0:
            raise ValueError(f"branch_at={self.branch_at} is not a share of the layers. Needed: from 0 to below 1.")
        column = self.data_strategy.removeprefix(COLUMN_PREFIX)
        if self.data_strategy not in STRATEGIES and (column == self.data_strategy or not column):
            raise ValueError(
                f"data_strategy={self.data_strategy!r} is not known. Needed: {', '.join(map(repr, STRATEGIES))} or "
                f"'{COLUMN_PREFIX}<name>'."
            )

    @property
    def seeds(self) -> list[int]:
        """The seed of each member."""
        return self.member_seeds or [self.seed + member for member in range(self.num_members)]


@dataclass
class RewardEnsembleConfig(EnsembleFields, RewardConfig):
    """
    Configuration of [`RewardEnsembleTrainer`]: [`EnsembleFields`] beside all arguments of [`RewardConfig`].

    `sft_coefficient` is for one model, and raises an error here.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.sft_coefficient:
            raise ValueError(
                f"sft_coefficient={self.sft_coefficient} is not supported for ensembles. Leave it out, or train the "
                "members with RewardTrainer."
            )


@dataclass
class ORMEnsembleConfig(EnsembleFields, ORMConfig):
    """Configuration of [`ORMEnsembleTrainer`]: [`EnsembleFields`] beside all arguments of [`ORMConfig`]."""


@dataclass
class PRMEnsembleConfig(EnsembleFields, PRMConfig):
    """Configuration of [`PRMEnsembleTrainer`]: [`EnsembleFields`] beside all arguments of [`PRMConfig`]."""


@dataclass
class SegmentEnsembleConfig(EnsembleFields, SegmentRewardConfig):
    """Configuration of [`SegmentEnsembleTrainer`]: [`EnsembleFields`] beside those of [`SegmentRewardConfig`]."""
