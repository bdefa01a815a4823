"""What the configurations of token-level trainers have in common. Knows single values, and not what they are for."""

from dataclasses import dataclass, field
from typing import Any, Literal

import trl

from trl_ext.trainers.ranking.objective import check_loss_type, loss_name, parse_loss_kwargs


@dataclass
class TokenRewardConfig(trl.RewardConfig):
    r"""
    Arguments of [`TokenRewardTrainer`]: those of `trl.RewardConfig`, with the same defaults, and the ones below.

    `center_rewards_coefficient` and `activation_offloading` have no meaning here and are refused.

    Args:
        loss_type (`str`, *optional*, defaults to `"bce"`):
            Token loss: `"bce"`, `"ce"`, `"mse"`, `"hinge"` (see `trl_ext.losses.token`) or the name of an installed
            plugin. In Python a callable with the same signature is accepted too.
        loss_kwargs (`dict`, *optional*):
            Keyword arguments of the loss, e.g. `{"margin": 0.5}` for `hinge`.
        class_weights (`list[float]`, *optional*):
            A weight for each class: wrong and right, or -1, 0 and 1. Nothing divides by them.
        averaging (`str`, *optional*, defaults to `"token"`):
            `"token"`: each label weighs the same (as in TRL's former PRM trainer); `"sequence"`: each completion.
        label_placement (`str`, *optional*, defaults to `"last"`):
            Where the label of a span goes: on its `"last"` token, on `"all"` of its tokens, or on the token `"before"`
            it.
        shared_prefix (`"auto"`, `True` or `False`, *optional*, defaults to `"auto"`):
            Run a batch as one flat row that holds the prompt of several completions once and no padding, wherever that
            saves at least 5 % of its tokens. Losses and gradients stay the same. `"auto"` does so if the model passes
            a numerical check at the start (encoders do not); `True` raises if it does not; `False` never does.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Keep the rows of one prompt together, in one batch where they fit, so that a flat row pays for the prompt
            once. Prompts still come in random order. A batch then holds fewer different prompts.
        max_tokens_per_batch (`int`, *optional*):
            Make batches of as many rows as have at most so many tokens: those that go through the model, a shared
            prompt once and padding included. `per_device_train_batch_size` then has no meaning.
        min_survival (`float`, *optional*, defaults to `0.5`):
            Training is refused if a smaller share of the rows is left after over-long and unlabelled ones were
            dropped.
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
            "help": "Keep the rows of one prompt together, so that a flat row pays for it once. Prompts still come in "
            "random order."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Make batches of as many rows as have at most so many tokens (a shared prompt once, padding "
            "included); per_device_train_batch_size then has no meaning."
        },
    )
    min_survival: float = field(
        default=0.5,
        metadata={
            "help": "Refuse to train if a smaller share of the rows is left after over-long and unlabelled ones were "
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
