"""The arguments that the configurations of all token-level trainers share, and checks of their values."""

from dataclasses import dataclass, field
from typing import Any, Literal

import trl

from trl_ext.trainers.ranking.objective import check_loss_type, loss_name, parse_loss_kwargs


@dataclass
class TokenRewardConfig(trl.RewardConfig):
    r"""
    Arguments of [`TokenRewardTrainer`]: those of `trl.RewardConfig`, with the same defaults, and the ones below.

    `center_rewards_coefficient` and `activation_offloading` do not apply to token-level rewards and raise an error.

    Args:
        loss_type (`str`, *optional*, defaults to `"bce"`):
            Token loss: `"bce"`, `"ce"`, `"mse"`, `"hinge"` (see `trl_ext.losses.token`) or the name of an installed
            plugin. In Python a callable with the same signature is accepted too.
        loss_kwargs (`dict`, *optional*):
            Keyword arguments of the loss, e.g. `{"margin": 0.5}` for `hinge`.
        class_weights (`list[float]`, *optional*):
            A weight for each class: wrong and right, or -1, 0 and 1. The loss is not divided by their sum.
        averaging (`str`, *optional*, defaults to `"token"`):
            `"token"`: each label has the same weight (as in TRL's former PRM trainer). `"sequence"`: each completion
            has the same weight.
        label_placement (`str`, *optional*, defaults to `"last"`):
            The tokens that get the label of a span: its `"last"` token, `"all"` of its tokens, or the token
            `"before"` it.
        shared_prefix (`"auto"`, `True` or `False`, *optional*, defaults to `"auto"`):
            Run a batch as one flat row, which holds the prompt of several completions once and has no padding, if this
            saves at least 5 % of its tokens. Losses and gradients stay the same. `"auto"` does so if the model passes
            a numerical check at the start (encoders do not). `True` raises an error if the model fails the check.
            `False` always pads.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Keep the rows of one prompt together, in one batch if they fit, so that the model runs their prompt once.
            Prompts still come in random order. A batch then holds fewer different prompts.
        trunk_cache (`str`, *optional*):
            `"memory"` or a folder: keep the hidden states of the layers below the first adapter, so that each text
            runs through them once. Later epochs and evaluations cost only the layers above; with a folder, so do
            other seeds and other settings of the layers above. Losses stay the same. Needs adapters in the upper
            layers only (`layers_to_transform` of `LoraConfig`) and no dropout below them.
        max_tokens_per_batch (`int`, *optional*):
            Fill each batch with as many rows as fit into this number of tokens. The limit counts the tokens that the
            model processes: a shared prompt counts once, and padding counts too. `per_device_train_batch_size` then
            has no effect.
        min_survival (`float`, *optional*, defaults to `0.5`):
            Raise an error if a smaller share of the rows remains after over-long and unlabelled rows were dropped.
        log_table_size (`int`, *optional*, defaults to `16`):
            Number of evaluated completions in the sample table on Weights & Biases; `0` logs no table.
    """

    _VALID_DICT_FIELDS = trl.RewardConfig._VALID_DICT_FIELDS + ["loss_kwargs"]

    loss_type: str = field(
        default="bce",
        metadata={"help": "Token loss: 'bce', 'ce', 'mse', 'hinge' or the name of a plugin (see `trl-ext plugins`)."},
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of the loss as JSON, e.g. '{\"margin\": 0.5}' for hinge."},
    )
    class_weights: list[float] | None = field(
        default=None,
        metadata={"help": "A weight for each class: wrong and right, or -1, 0 and 1."},
    )
    averaging: Literal["token", "sequence"] = field(
        default="token",
        metadata={"help": "'token': each label weighs the same; 'sequence': each completion does."},
    )
    label_placement: Literal["last", "all", "before"] = field(
        default="last",
        metadata={"help": "Label a span on its 'last' token, on 'all' of its tokens, or on the token 'before' it."},
    )
    shared_prefix: Literal["auto", True, False] = field(
        default="auto",
        metadata={
            "help": "Run a batch as one flat row with the prompt of several completions once: 'auto' (if the model "
            "passes a numerical check), True (raise if it does not) or False."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Keep the rows of one prompt together, so that the model runs their prompt once. Prompts still "
            "come in random order."
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
            "help": "Fill each batch with as many rows as fit into this number of tokens (a shared prompt counts "
            "once, padding counts too); per_device_train_batch_size then has no effect."
        },
    )
    min_survival: float = field(
        default=0.5,
        metadata={
            "help": "Raise an error if a smaller share of the rows remains after over-long and unlabelled rows were "
            "dropped."
        },
    )
    log_table_size: int = field(
        default=16,
        metadata={"help": "Evaluated completions in the sample table on Weights & Biases; 0 logs no table."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("center_rewards_coefficient", "activation_offloading"):
            if getattr(self, name):
                raise ValueError(f"{name} does not apply to token-level rewards. Leave it out.")
        for name, known in (("averaging", ("token", "sequence")), ("label_placement", ("last", "all", "before"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known. Needed: one of {', '.join(known)}.")
        if not 0.0 <= self.min_survival <= 1.0:
            raise ValueError(f"min_survival={self.min_survival} is not a share. Needed: a number from 0 to 1.")
        if self.log_table_size < 0:
            raise ValueError(f"log_table_size={self.log_table_size} is negative. Needed: 0 or more rows.")
        check_loss_type(self.loss_type)
        self.loss_kwargs = parse_loss_kwargs(self.loss_kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "loss_type": loss_name(self.loss_type)}
