"""Arguments of [`PPOTrainer`]: those of [`DenseGRPOConfig`], and the critic's."""

from dataclasses import dataclass, field
from typing import Literal

from trl_ext.trainers.policy.config import WITHOUT_EFFECT, DenseGRPOConfig


_OF_THE_CRITIC = (
    "gae_lambda",
    "value_learning_rate",
    "vf_coef",
    "cliprange_value",
    "kl_in",
    "kl_estimator",
    "whiten_advantages",
    "whiten_rewards",
)


@dataclass
class PPOConfig(DenseGRPOConfig):
    r"""
    Arguments of [`PPOTrainer`]. Every argument of `trl.GRPOConfig` and [`DenseGRPOConfig`] keeps its meaning.

    Args:
        advantage (`str`, *optional*, defaults to `"gae"`):
            `"gae"`: generalised advantage estimation with a critic. Every other value of [`DenseGRPOConfig`] switches
            the critic off.
        gae_lambda (`float`, *optional*, defaults to `0.95`):
            Lambda of GAE in [0, 1]. 0 is the TD error (A2C), 1 is the return less the value (Monte Carlo). The
            default is TRL's.
        value_learning_rate (`float`, *optional*):
            Learning rate of the critic. Defaults to `learning_rate`.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Factor of the value loss. Policy and critic have separate gradients, and each is clipped to
            `max_grad_norm`; an optimizer such as Adam ignores the factor otherwise. The default is TRL's.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            Range in which the value loss lets a value move away from that at sampling time; `None` for no clipping.
            The default is TRL's.
        kl_in (`str`, *optional*, defaults to `"reward"`):
            Where the KL divergence to the reference counts, with the coefficient `beta`: `"reward"` takes it off the
            reward of each token (InstructGPT, https://huggingface.co/papers/2203.02155), `"loss"` adds it to the
            loss, as GRPO does. Without a critic it is always in the loss.
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            Estimator of the KL divergence in the reward: `"k1"` is the difference of log-probabilities, `"k3"` is
            never negative. The default is TRL's.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Give the advantages of a batch mean 0 and standard deviation 1, as TRL's PPO did.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Divide the rewards of a batch by their standard deviation.
        beta (`float`, *optional*, defaults to `0.05`):
            Coefficient of the KL divergence. The default is that of `kl_coef` in TRL's PPO.
    """

    advantage: Literal["gae", "outcome", "process", "return", "min_form", "shaped", "shrunken"] = field(
        default="gae", metadata={"help": "gae uses the critic, all others switch it off"}
    )
    beta: float = field(default=0.05, metadata={"help": "coefficient of the KL divergence to the reference"})
    gae_lambda: float = field(default=0.95, metadata={"help": "lambda of GAE; 0 is A2C, 1 is Monte Carlo"})
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the critic; that of the policy by default"}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "factor of the value loss"})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "clip range of the value loss"})
    kl_in: Literal["reward", "loss"] = field(
        default="reward", metadata={"help": "where the KL divergence counts: reward (per token) or loss"}
    )
    kl_estimator: Literal["k1", "k3"] = field(
        default="k1", metadata={"help": "estimator of the KL divergence in the reward"}
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "whether to normalise the advantages of a batch"})
    whiten_rewards: bool = field(default=False, metadata={"help": "whether to normalise the rewards of a batch"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_learning_rate is not None and self.value_learning_rate < 0:
            raise ValueError(f"value_learning_rate={self.value_learning_rate}; needed: a number of at least 0.")
        if self.vf_coef <= 0:
            raise ValueError(
                f"vf_coef={self.vf_coef}; needed: a number above 0. To switch the critic off, choose "
                "another `advantage` than 'gae'."
            )
        if self.cliprange_value is not None and self.cliprange_value <= 0:
            raise ValueError(f"cliprange_value={self.cliprange_value}; needed: a number above 0, or None.")
        for name, known in (("kl_in", ("reward", "loss")), ("kl_estimator", ("k1", "k3"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; needed: one of {known}.")
        if self.advantage == "gae" and self.fp16:
            raise ValueError("fp16=True scales the losses, which the critic does not support. Use bf16=True.")

    def without_effect(self, dense: bool) -> dict[str, str]:
        if self.advantage != "gae":
            reason = f"it belongs to the critic, and advantage={self.advantage!r} has none"
            unused = [name for name in _OF_THE_CRITIC if (name, self.advantage) != ("gae_lambda", "shaped")]
            return super().without_effect(dense) | dict.fromkeys(unused, reason)
        found = WITHOUT_EFFECT | {
            "scale_rewards": "the critic's advantages are normalised by `whiten_advantages`",
            "multi_objective_aggregation": "the critic learns the weighted sum of the rewards",
            "min_form_temperature": "it belongs to advantage='min_form'",
            "shrinkage": "it belongs to advantage='shrunken'",
            "potential": "it belongs to advantage='shaped'",
        }
        if not dense:
            found |= dict.fromkeys(("dense_weight", "low_reward"), "there are no dense reward functions")
        if self.kl_in == "loss" or self.beta == 0:
            found["kl_estimator"] = "there is no KL divergence in the reward"
        return found
