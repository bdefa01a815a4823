"""Arguments of [`RankedDPOTrainer`]: those of `trl.DPOConfig`, with a ranking loss in place of losses on pairs."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from trl import DPOConfig

from trl_ext.trainers.common.inherited_arguments import WITHOUT_METRICS_FUNCTION
from trl_ext.trainers.ranking.objective import check_loss_type, loss_name, parse_loss_kwargs


UNUSED = {
    "loss_weights": "there is one loss. `sft_coefficient` adds the loss of supervised fine-tuning",
    "ld_alpha": "it is defined for the lengths of a pair",
    "f_divergence_type": "it is defined for the difference of a pair",
    "f_alpha_divergence_coef": "it belongs to `f_divergence_type`",
    "use_weighting": "it is defined for a pair",
    "discopop_tau": "it belongs to the loss 'discopop'",
    "truncation_mode": "rows above `max_length` are dropped and counted, not cut",
    "padding_free": "flat rows have no padding; see `shared_prefix`",
    "label_smoothing_factor": "use a column `preference_probability`, which says how certain each pair is",
    "label_smoothing": "use a column `preference_probability`, which says how certain each pair is",
}
"""Arguments of `trl.DPOConfig` without a meaning for rankings, and why or what to use. Other values are refused."""

WITHOUT_EFFECT = {
    **WITHOUT_METRICS_FUNCTION,
    "label_names": "labels come from the columns of the rows",
    "average_tokens_across_devices": "the loss is the mean over the rows of a micro-batch, as in TRL",
    "logging_nan_inf_filter": "training stops at a loss that is NaN or infinite",
    "eval_accumulation_steps": "an evaluation returns losses and metrics only",
}
"""Arguments of `trl.DPOConfig` that change nothing, and the reason. Other values are warned about."""


@dataclass
class RankedDPOConfig(DPOConfig):
    r"""
    Configuration of [`RankedDPOTrainer`]. The arguments of `trl.DPOConfig` keep their meaning and their defaults.

    `loss_weights`, `ld_alpha`, `f_divergence_type`, `f_alpha_divergence_coef`, `use_weighting`, `discopop_tau`,
    `truncation_mode`, `padding_free`, `label_smoothing` and `label_smoothing_factor` have no meaning for rankings;
    another value than the default raises an error.

    Args:
        loss_type (`str`, *optional*, defaults to `"plackett_luce"`):
            Ranking loss of the implicit rewards: `"plackett_luce"`, `"bradley_terry"` (pairs; TRL's `"sigmoid"`),
            `"pairwise"`, `"listnet"`, `"lambda_loss"`, `"pointwise"` or the name of an installed plugin. In Python a
            callable with the same signature is accepted too.
        loss_kwargs (`dict`, *optional*):
            Keyword arguments of the loss, e.g. `{"temperature": 0.5}` for `listnet`.
        sft_coefficient (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood per token of the best completion, which is added to the loss. It is
            the α of RPO (https://huggingface.co/papers/2404.19733).
        shared_prefix (`"auto"`, `True` or `False`, *optional*, defaults to `"auto"`):
            Run the completions of a prompt as one flat row that holds the prompt once, if this saves at least 5 % of a
            batch's tokens. Losses and gradients stay the same. `"auto"` does so if the model passes a numerical check.
            `True` raises an error if it does not. `False` always pads.
        min_survival (`float`, *optional*, defaults to `0.5`):
            Smallest share of the rows that must fit `max_length`. Fewer rows raise an error.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + ["loss_kwargs"]

    loss_type: str = field(
        default="plackett_luce",
        metadata={"help": "plackett_luce, bradley_terry, pairwise, listnet, lambda_loss, pointwise or a plugin"},
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON with keyword arguments of the loss"}
    )
    sft_coefficient: float = field(
        default=0.0, metadata={"help": "weight of the negative log-likelihood of the best completion"}
    )
    shared_prefix: Literal["auto", True, False] = field(
        default="auto", metadata={"help": "whether prompts are computed once: auto, true or false"}
    )
    min_survival: float = field(default=0.5, metadata={"help": "smallest share of the rows that must survive"})

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        for name, reason in UNUSED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for RankedDPOTrainer: {reason}. Leave it out."
                )
        check_loss_type(self.loss_type)
        self.loss_kwargs = parse_loss_kwargs(self.loss_kwargs)
        loss_type = self.loss_type
        self.loss_type = ["sigmoid"]  # TRL makes a list of a name and compares it with its own
        super().__post_init__()
        self.loss_type = loss_type
        if self.sft_coefficient < 0:
            raise ValueError(f"sft_coefficient={self.sft_coefficient}; needed: a number of at least 0.")
        if not 0 <= self.min_survival <= 1:
            raise ValueError(f"min_survival={self.min_survival}; needed: a share between 0 and 1.")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "loss_type": loss_name(self.loss_type)}
