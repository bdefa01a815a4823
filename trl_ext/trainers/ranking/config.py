"""Arguments of [`RewardTrainer`]: all arguments of `trl.RewardConfig`, and those that rankings need."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import trl

from trl_ext.trainers.ranking.objective import check_loss_type, loss_name, parse_loss_kwargs


@dataclass
class RewardConfig(trl.RewardConfig):
    r"""
    Configuration of [`RewardTrainer`]. All arguments of `trl.RewardConfig` keep their meaning and their defaults.

    Args:
        loss_type (`str`, *optional*, defaults to `"bradley_terry"`):
            Ranking loss: `"bradley_terry"` (TRL's loss), `"pairwise"`, `"plackett_luce"`, `"listnet"`, `"pointwise"`,
            `"lambda_loss"`, `"rao_kupper"`, `"robust_bradley_terry"` or the name of an installed plugin. In Python a
            callable with the same signature is accepted too.
        loss_kwargs (`dict`, *optional*):
            Keyword arguments of the loss, e.g. `{"temperature": 0.5}` for `listnet` or `{"margin_from_ratings": true}`
            for `bradley_terry` and `pairwise`.
        batch_sum_to_zero_coefficient (`float`, *optional*):
            Add the squared mean of all rewards of a batch, times this coefficient, to the training loss: batch-wise
            sum-to-zero regularization (https://huggingface.co/papers/2505.07271). A batch is the
            `per_device_train_batch_size` groups that one process runs at a time, and never a whole accumulated step.
            An ensemble has a penalty for each member. Works with every loss; evaluation leaves it out.
        sft_coefficient (`float`, *optional*, defaults to `0.0`):
            Add the cross-entropy per token of each group's best completion, times this coefficient, to the training
            loss. The frozen output layer of the language model reads the hidden states that the reward head reads, so
            they stay able to write: hidden-state regularization, GRM (https://huggingface.co/papers/2406.10216, which
            uses 0.01). A completion begins after the tokens that all candidates share. It needs a decoder; evaluation
            leaves it out.
        shared_prefix (`"auto"`, `True` or `False`, *optional*, defaults to `"auto"`):
            Run the candidates of a group as one flat row, which holds their common prompt once and has no padding, if
            this saves at least 5 % of a batch's tokens. Losses and gradients stay the same. `"auto"` does so if the
            model passes a numerical check at the start. `True` raises an error if the model fails the check. `False`
            always pads.
        trunk_cache (`str`, *optional*):
            `"memory"` or a folder: keep the hidden states of the layers below the first adapter, so that each text
            runs through them once. Later epochs and evaluations cost only the layers above; with a folder, so do
            other seeds and other settings of the layers above. Losses stay the same. Needs adapters in the upper
            layers only (`layers_to_transform` of `LoraConfig`) and no dropout below them.
        max_tokens_per_batch (`int`, *optional*):
            Fill each batch with as many groups as fit into this number of tokens. The limit counts the tokens that the
            model processes: a shared prompt counts once, and padding counts too. A group is never split.
            `per_device_train_batch_size` then has no effect.
        min_survival (`float`, *optional*, defaults to `0.5`):
            Raise an error if a smaller share of the rows remains after over-long rows were dropped.
        log_table_size (`int`, *optional*, defaults to `16`):
            Number of evaluated groups in the sample table on Weights & Biases; `0` logs no table.

    `center_rewards_coefficient` applies to every loss and any number of candidates: it multiplies
    \\( (2 \cdot \mathrm{mean}_k r_k)^2 \\), which is TRL's \\( (r_c + r_r)^2 \\) for a pair.
    """

    _VALID_DICT_FIELDS = trl.RewardConfig._VALID_DICT_FIELDS + ["loss_kwargs"]

    loss_type: str = field(
        default="bradley_terry",
        metadata={
            "help": "Ranking loss: 'bradley_terry', 'pairwise', 'plackett_luce', 'listnet', 'pointwise', "
            "'lambda_loss', 'rao_kupper', 'robust_bradley_terry' or the name of an installed plugin (see `trl-ext "
            "plugins`)."
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of the loss as JSON, e.g. '{\"temperature\": 0.5}' for listnet."},
    )
    batch_sum_to_zero_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the squared mean of all rewards of a batch (batch-wise sum-to-zero regularization). A "
            "batch is what one process runs at a time."
        },
    )
    sft_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy of each group's best completion under the frozen output layer of the "
            "language model (GRM, which uses 0.01)."
        },
    )
    shared_prefix: Literal["auto", True, False] = field(
        default="auto",
        metadata={
            "help": "Run the candidates of a group as one flat row with their common prompt once: 'auto' (if the "
            "model passes a numerical check), True (raise if it does not) or False."
        },
    )
    trunk_cache: str | None = field(
        default=None,
        metadata={
            "help": "'memory' or a folder: keep the hidden states of the layers below the first adapter, so that each "
            "text runs through them once."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Fill each batch with as many whole groups as fit into this number of tokens (a shared prompt "
            "counts once, padding counts too); per_device_train_batch_size then has no effect."
        },
    )
    min_survival: float = field(
        default=0.5,
        metadata={"help": "Raise an error if a smaller share of the rows remains after over-long rows were dropped."},
    )
    log_table_size: int = field(
        default=16,
        metadata={"help": "Evaluated groups in the sample table on Weights & Biases; 0 logs no table."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_loss_type(self.loss_type)
        if not self.sft_coefficient >= 0:
            raise ValueError(f"sft_coefficient={self.sft_coefficient}; needed: a number of at least 0.")
        if not 0.0 <= self.min_survival <= 1.0:
            raise ValueError(f"min_survival={self.min_survival} is not a share. Needed: a number from 0 to 1.")
        self.loss_kwargs = parse_loss_kwargs(self.loss_kwargs)
        if self.log_table_size < 0:
            raise ValueError(f"log_table_size={self.log_table_size} is negative. Needed: 0 or more groups.")

    @classmethod
    def from_trl(cls, args: trl.RewardConfig) -> "RewardConfig":
        """
        Make a [`RewardConfig`] with every value of a `trl.RewardConfig`, for scripts that swap only the trainer.

        It copies the values and does not run `__post_init__` again. So values that `__post_init__` has derived
        (devices, plugins, parsed dictionaries) and the fields of a subclass stay. Raises `TypeError` for the arguments
        of another trainer.
        """
        if not isinstance(args, trl.RewardConfig) or hasattr(args, "loss_type"):  # TRL's has no such field
            raise TypeError(f"args is a {type(args).__name__}. Needed: a {cls.__name__} or a trl.RewardConfig.")
        config = cls.__new__(cls)
        given = vars(args)
        ours = {f.name: f.default for f in fields(cls) if f.default is not MISSING and f.name not in given}
        vars(config).update({**ours, **given})
        return config

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "loss_type": loss_name(self.loss_type)}
