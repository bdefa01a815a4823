"""Arguments of [`DenseGRPOTrainer`]: those of `trl.GRPOConfig`, and how dense rewards become advantages."""

from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

from trl import GRPOConfig

from trl_ext.losses.advantages import Potential
from trl_ext.trainers.common.inherited_arguments import WITHOUT_METRICS_FUNCTION


WITHOUT_EFFECT = {
    **WITHOUT_METRICS_FUNCTION,
    "label_names": "rewards come from functions",
    "label_smoothing_factor": "there are no labels to smooth",
    "average_tokens_across_devices": "the loss averages over the completions of all processes as `loss_type` says",
    "train_sampling_strategy": "GRPO draws the prompts itself; see `shuffle_dataset`",
    "prediction_loss_only": "an evaluation returns losses and rewards only",
    "eval_accumulation_steps": "an evaluation returns losses and rewards only",
    "logging_nan_inf_filter": "training stops at a loss that is NaN or infinite",
}
"""Arguments of `trl.GRPOConfig` without an effect on [`DenseGRPOTrainer`] and [`PPOTrainer`], and the reason."""


@dataclass
class DenseGRPOConfig(GRPOConfig):
    r"""
    Arguments of [`DenseGRPOTrainer`]. Every argument of `trl.GRPOConfig` keeps its meaning.

    Args:
        advantage (`str`, *optional*, defaults to `"process"`):
            How dense rewards become an advantage for every token:

            - `"process"`: rewards are normalised over all steps of all completions of a prompt. A token gets the sum
              of the normalised rewards at its position and after it (*DeepSeekMath*,
              https://huggingface.co/papers/2402.03300, section 4.1.3).
            - `"return"`: a token gets the discounted sum of the rewards at its position and after it, normalised over
              the tokens of all completions of a prompt.
            - `"min_form"`: as `"return"`, after reweighting the rewards so that they add up to about the worst step's
              reward (*PURE*, https://huggingface.co/papers/2504.15275).
            - `"shaped"`: the scalar reward, with the dense rewards as a potential (Ng et al., ICML 1999): a token
              gets the change of the potential, and the last token gives it all back, so the best policy under the
              scalar reward stays the best. `potential` says what the potential is. `gae_lambda` below 1 keeps the
              change near the token that caused it.
            - `"shrunken"`: a step gets the mean return of the completions that took it, less that of all completions
              with the same beginning, shrunken where few agree (after *ECPO*,
              https://huggingface.co/papers/2606.05885).
            - `"outcome"`: TRL's advantage only. Dense reward functions raise an error.
        dense_reward_weights (`list[float]`, *optional*):
            A weight for each dense reward function. Defaults to 1 for each.
        outcome_weight (`float`, *optional*, defaults to `1.0`):
            Weight of TRL's advantage, which comes from the scalar `reward_funcs` and is the same for every token of a
            completion.
        dense_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the advantage of the dense rewards.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per token in [0, 1], used by `"return"`, `"min_form"`, `"shaped"` and `"shrunken"`.
        potential (`str`, *optional*, defaults to `"last"`):
            The potential of `"shaped"`: the `"last"` reward before a token or the lowest (`"min"`), for rewards that
            are levels, such as P(correct) of a step; or their `"sum"`, for rewards that are changes.
        gae_lambda (`float`, *optional*, defaults to `1.0`):
            Lambda in [0, 1] with which `"shaped"` passes on credit from token to token. At 1 the expected gradient is
            that of the scalar reward. Below 1 it is not, if the potential is no good estimate of the reward to come.
        min_form_temperature (`float`, *optional*, defaults to `0.1`):
            Temperature of `"min_form"`, above 0. The default is the paper's.
        shrinkage (`float`, *optional*, defaults to `1.0`):
            `"shrunken"` trusts a step that n completions took by n / (n + shrinkage). At least 0; the default is ours.
        length_control (`bool`, *optional*, defaults to `False`):
            For `"process"` and `"return"`: take the mean of the rewards at a token and after it instead of their sum,
            so that a completion does not gain by having more steps.
        low_reward (`float`, *optional*, defaults to `0.5`):
            A dense reward below it counts as low in metrics. The default suits probabilities.
        verifier (`str`, *optional*):
            Name of the reward function that tells the truth. A warning says when the reward rises and it does not.
            Give it the weight 0 in `reward_weights` if it is not to be trained on.
    """

    advantage: Literal["outcome", "process", "return", "min_form", "shaped", "shrunken"] = field(
        default="process", metadata={"help": "how dense rewards become advantages"}
    )
    dense_reward_weights: list[float] | None = field(
        default=None, metadata={"help": "a weight for each dense reward function"}
    )
    outcome_weight: float = field(default=1.0, metadata={"help": "weight of the advantage of the scalar rewards"})
    dense_weight: float = field(default=1.0, metadata={"help": "weight of the advantage of the dense rewards"})
    gamma: float = field(default=1.0, metadata={"help": "discount per token, not for process"})
    potential: Literal["last", "min", "sum"] = field(
        default="last",
        metadata={"help": "potential of shaped: last, lowest or summed reward before a token"},
    )
    gae_lambda: float = field(default=1.0, metadata={"help": "lambda of GAE, for shaped"})
    min_form_temperature: float = field(default=0.1, metadata={"help": "temperature of min_form"})
    shrinkage: float = field(default=1.0, metadata={"help": "how much shrunken distrusts rare steps"})
    length_control: bool = field(
        default=False, metadata={"help": "means of rewards instead of sums, for process and return"}
    )
    low_reward: float = field(default=0.5, metadata={"help": "a dense reward below it counts as low in metrics"})
    verifier: str | None = field(
        default=None, metadata={"help": "reward function that tells the truth; a warning says when only rewards rise"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = get_args(get_type_hints(type(self))["advantage"])
        if self.advantage not in known:
            critic = " A critic ('gae') needs PPOConfig and PPOTrainer." if self.advantage == "gae" else ""
            raise ValueError(f"advantage={self.advantage!r}; needed: one of {known}.{critic}")
        if self.length_control and (self.advantage not in ("process", "return") or self.gamma != 1):
            raise ValueError(
                f"length_control=True with advantage={self.advantage!r} and gamma={self.gamma}; needed: 'process' or "
                "'return', and gamma=1."
            )
        if self.potential not in get_args(Potential):
            raise ValueError(f"potential={self.potential!r}; needed: one of {get_args(Potential)}.")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda={self.gae_lambda}; needed: a number from 0 to 1.")
        if self.shrinkage < 0:
            raise ValueError(f"shrinkage={self.shrinkage}; needed: a number of at least 0.")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}; needed: a number from 0 to 1.")
        if self.min_form_temperature <= 0:
            raise ValueError(f"min_form_temperature={self.min_form_temperature}; needed: a number above 0.")

    def without_effect(self, dense: bool) -> dict[str, str]:
        """
        The arguments that change nothing, and the reason, for a trainer with or without dense reward functions.
        """
        found = dict(WITHOUT_EFFECT)
        if not dense:
            names = ("outcome_weight", "dense_weight", "gamma", "low_reward", "length_control")
            found |= dict.fromkeys(names, "there are no dense reward functions")
        elif self.advantage == "process":
            found["gamma"] = "advantage='process' adds rewards up without a discount"
        if not dense or self.advantage != "min_form":
            found["min_form_temperature"] = "it belongs to advantage='min_form' with dense reward functions"
        if not dense or self.advantage != "shrunken":
            found["shrinkage"] = "it belongs to advantage='shrunken' with dense reward functions"
        if not dense or self.advantage != "shaped":
            names = ("potential", "gae_lambda")
            found |= dict.fromkeys(names, "it belongs to advantage='shaped' with dense reward functions")
        if dense and self.advantage in ("shaped", "shrunken"):
            names = ("scale_rewards", "multi_objective_aggregation")
            found |= dict.fromkeys(names, f"advantage={self.advantage!r} reads the weighted sum of the rewards")
        return found
