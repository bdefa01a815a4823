"""`PPOTrainer`: PPO with a critic, on TRL's GRPO: policy, reference, reward and value can share one frozen base.

TRL's GRPO generates, scores, clips ratios and averages the loss. This trainer adds one forward pass for the values,
replaces the advantages by those of GAE, and trains the critic after each backward pass of the policy. The two backward
passes follow each other, so at any time only one of them holds its activations.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from trl_ext.losses.advantages import clipped_value_loss, gae, last_tokens, returns_to_go, whiten
from trl_ext.metrics.policy import explained_variance
from trl_ext.models.inputs import text_tokenizer
from trl_ext.trainers.common.health import NotFiniteError
from trl_ext.trainers.policy.critic import CRITIC_FOLDER, Critic, make_critic
from trl_ext.trainers.policy.ppo_config import PPOConfig
from trl_ext.trainers.policy.trainer import DenseGRPOTrainer


class PPOTrainer(DenseGRPOTrainer):
    """
    PPO with a critic. Rewards may belong to whole completions, or to steps, segments and tokens.

    A policy with an adapter (LoRA, QLoRA) lends its frozen base: the reference is the base with its adapters off (or a
    frozen copy of an adapter that is trained further), the critic is another adapter with an fp32 head, and
    `SharedBaseScorer` puts reward models beside them. A policy that trains all its weights gets a separate model as
    critic.

    The critic is saved in the folder `critic/value` beside the policy. It is a token-level reward model:
    `RewardScorer("outputs/ppo/critic/value").score_tokens` gives at each token the value of the state after it.

    Args:
        model, reward_funcs, dense_reward_funcs: as in [`DenseGRPOTrainer`]. The scalar reward of a completion counts
            at its last token.
        args ([`PPOConfig`], *optional*): the arguments of [`DenseGRPOConfig`], and the critic's.
        value_model (`str` or `Path`, *optional*):
            Folder or Hub id of a reward model with one output, or of a saved critic, that the critic starts from. An
            adapter must have been trained on the policy's base. By default the critic starts from a head of zeros.
        value_peft_config (`PeftConfig`, *optional*): adapter of a new critic. Defaults to the policy's.
        **kwargs: as in [`DenseGRPOTrainer`]. `optimizers` raises an error while there is a critic.

    Raises:
        TypeError: if `args` is not a [`PPOConfig`].
        ValueError: for arguments that contradict each other, and for FSDP and DeepSpeed.
        [`BaseMismatchError`]: if `value_model` was trained on another base than the policy's.
        [`NotFiniteError`]: in training, if a reward, a value or a gradient of the critic is NaN or infinite.

    Example:

    ```python
    trainer = PPOTrainer(
        "Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=RewardScorer("outputs/reward"),
        args=PPOConfig(output_dir="outputs/ppo", value_learning_rate=1e-5),
        train_dataset=dataset,
        peft_config=LoraConfig(target_modules="all-linear"),
        value_model="outputs/reward",
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl_ext", "ppo"]
    _name = "PPO"
    _what = "A language model that was trained with PPO."

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        dense_reward_funcs: Any = None,
        args: PPOConfig | None = None,
        value_model: str | Path | None = None,
        value_peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = PPOConfig("ppo") if args is None else args
        if not isinstance(args, PPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}; needed: a PPOConfig, which has all fields of GRPOConfig."
            )
        with_critic = args.advantage == "gae"
        if not with_critic and (value_model is not None or value_peft_config is not None):
            raise ValueError(
                f"advantage={args.advantage!r} needs no critic, but `value_model` or `value_peft_config` is given. "
                "Choose advantage='gae', or leave them out."
            )
        if with_critic and any(kwargs.get("optimizers") or ()):
            raise ValueError(
                "`optimizers` is given, but PPOTrainer adds the critic's parameters to the optimizer itself. Choose "
                "it by `optim`, `learning_rate` and `value_learning_rate` in PPOConfig."
            )
        self._critic: Critic | None = None
        self._batch: dict[str, Any] | None = None
        super().__init__(model, reward_funcs, dense_reward_funcs, args, **kwargs)
        if not with_critic:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "PPOTrainer with a critic runs in one process or with plain data parallelism (`accelerate launch` "
                "without FSDP and DeepSpeed), because critic and policy take turns on one base. Use a quantized base "
                "(QLoRA) if the model is too large, or DenseGRPOTrainer, which needs no critic."
            )
        self._critic = make_critic(
            self.model,
            value_model,
            value_peft_config,
            seed=args.seed,
            gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
        if args.disable_dropout:
            for module in self._critic.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.add_callback(_CriticGradients(self._critic))

    def _loss_in_words(self) -> str:
        if self._critic is None:
            return super()._loss_in_words()
        args = self.args
        kl = f", KL coefficient {self.beta:g} in the {args.kl_in}" if self.beta else ""
        return f"PPO ({args.loss_type}), GAE with gamma {args.gamma:g} and lambda {args.gae_lambda:g}{kl}"

    def _facts(self) -> dict[str, str]:
        facts = super()._facts()
        if self._critic is None:
            return facts
        kind = "a separate model" if self._critic.adapter is None else "an adapter on the policy's base"
        size = sum(parameter.numel() for parameter in self._critic.parameters)
        return facts | {"critic": f"{kind}, {size:,} trained parameters"}

    @property
    def value_model(self) -> nn.Module | None:
        """The critic: a classification model around the policy's base, or a separate one; `None` without a critic."""
        return None if self._critic is None else self._critic.model

    # ---------------------------------------------------------------------------------------------- rewards to credit
    def _credit(
        self, output: dict[str, Any], rewards: torch.Tensor, given: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        if self._critic is None:
            return super()._credit(output, rewards, given, mask)
        args, mode = self.args, "train" if self.model.training else "eval"
        scalar, scored = self._scalar_rewards
        known = mask & (scored | given.any(1)).unsqueeze(1)  # a completion without any reward teaches nothing
        rewards = args.dense_weight * rewards.masked_fill(~given, 0.0)
        rewards = rewards + args.outcome_weight * scalar.unsqueeze(1) * last_tokens(mask)
        if args.kl_in == "reward" and self.beta != 0:
            rewards = rewards - self.beta * self._kl_to_reference(output, mask, mode)
        if args.whiten_rewards:
            rewards = self._across_processes(lambda r, m: whiten(r, m, shift_mean=False), rewards, known)
        values = self._values(output) * mask
        if not bool(values.isfinite().all()):
            raise NotFiniteError(
                "The critic's values are NaN or infinite. Training stops before the weights are damaged. Usual causes "
                "are a `value_learning_rate` that is too high, or broken weights of the base."
            )
        advantages = gae(rewards, values, known, args.gamma, args.gae_lambda)
        output |= {"values": values, "returns": advantages + values, "value_mask": known}
        self._log_critic(mode, values, returns_to_go(rewards, known, args.gamma), known, mask)
        if self._dense is not None:
            self._log_dense(mode, given, mask, advantages)
        return self._across_processes(whiten, advantages, known) if args.whiten_advantages else advantages

    @torch.no_grad()
    def _values(self, output: dict[str, Any]) -> torch.Tensor:
        """The critic's values, `(N, T)`, in batches of the training size."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        size = self.args.per_device_train_batch_size
        with self._critic.active(), self.accelerator.autocast():
            parts = [
                self._critic.values(*(output[name][start : start + size] for name in names))
                for start in range(0, len(output["prompt_ids"]), size)
            ]
        return torch.cat(parts)

    @torch.no_grad()
    def _kl_to_reference(self, output: dict[str, Any], mask: torch.Tensor, mode: str) -> torch.Tensor:
        """The KL divergence at each token, `(N, T)`, between the policy that sampled and the reference."""
        if "old_per_token_logps" not in output:  # TRL leaves them out where the loss does not need them
            output["old_per_token_logps"], *_ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )
        difference = output["old_per_token_logps"] - output["ref_per_token_logps"]
        kl = difference if self.args.kl_estimator == "k1" else (-difference).exp() - 1 + difference
        kl = kl * mask
        total, count = self.accelerator.reduce(torch.stack([kl.sum(), mask.sum()]), reduction="sum").tolist()
        self._metrics[mode]["kl"].append(total / max(count, 1))
        return kl

    def _log_critic(
        self, mode: str, values: torch.Tensor, returns: torch.Tensor, known: torch.Tensor, mask: torch.Tensor
    ) -> None:
        padded = [self.accelerator.pad_across_processes(part, dim=1) for part in (values, returns, known.long())]
        values, returns, known = (self.accelerator.gather(part) for part in padded)
        known = known.bool()
        self._metrics[mode]["critic/explained_variance"].append(explained_variance(values, returns, known))
        self._metrics[mode]["critic/value_mean"].append(values[known].mean().item())
        self._metrics[mode]["critic/return_mean"].append(returns[known].mean().item())
        without = self.accelerator.gather((~known.any(1)).float()).mean().item()
        self._metrics[mode]["critic/completions_without_reward"].append(without)

    # ------------------------------------------------------------------------------------------------------- training
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self._batch = inputs
        beta = self.beta
        if self._critic is not None and self.args.kl_in == "reward":
            self.beta = 0.0  # the reward has it already
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The policy's forward and backward pass, and then the critic's on the same completions."""
        loss = super().training_step(*args, **kwargs)
        if self._critic is not None:
            self._train_critic(self._batch)
        self._batch = None
        return loss

    def _train_critic(self, batch: dict[str, Any]) -> None:
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        mask = batch["value_mask"]
        # as in TRL's loss by tokens: `num_items_in_batch` counts the tokens of all batches and processes
        accumulated = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = batch["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * accumulated
        with self._critic.active(train=True):
            with self.accelerator.autocast():  # as in `_values`: the critic is not prepared, so nothing else does it
                values = self._critic.values(*(batch[name] for name in names))
            errors = clipped_value_loss(values, batch["values"], batch["returns"], self.args.cliprange_value)
            loss = (errors * mask).sum() / tokens
            self.accelerator.backward(self.args.vf_coef * loss)
        with torch.no_grad():
            moved = (values - batch["values"]).abs() * mask
            clipped = (moved > (self.args.cliprange_value or torch.inf)).sum()
            sums = torch.stack([(errors * mask).sum(), clipped.float(), mask.sum().float()])
            error, clipped, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train"]["critic/value_loss"].append(error / max(count, 1))
        self._metrics["train"]["critic/clip_share"].append(clipped / max(count, 1))
        if self.accelerator.sync_gradients:
            norm = self._gradients.set_aside(self.accelerator, self.args.max_grad_norm)
            self._metrics["train"]["critic/grad_norm"].append(norm)

    @property
    def _gradients(self) -> "_CriticGradients":
        return next(c for c in self.callback_handler.callbacks if isinstance(c, _CriticGradients))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the critic's parameters in groups of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._critic is not None and is_new:
            rate = self.args.value_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            for decays in (True, False):  # as Trainer does it: biases and norms do not decay
                parameters = [p for p in self._critic.parameters if (p.dim() > 1) == decays]
                decay = self.args.weight_decay if decays else 0.0
                optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": decay})
        return optimizer

    # --------------------------------------------------------------------------------------------- saving and resuming
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy, and the critic in the folder `critic/value` below it."""
        super().save_model(output_dir, _internal_call)
        if self._critic is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir, CRITIC_FOLDER)
            self._critic.save(folder, text_tokenizer(self.processing_class))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's training; the critic of a checkpoint is loaded too, and at the end that of the best one."""
        if self._critic is not None and resume_from_checkpoint:
            found = resume_from_checkpoint
            found = get_last_checkpoint(self.args.output_dir) if found is True else found
            if found is not None:
                self._critic.load(Path(found, CRITIC_FOLDER))
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        best = self.state.best_model_checkpoint
        if self._critic is not None and self.args.load_best_model_at_end and best is not None:
            self._critic.load(Path(best, CRITIC_FOLDER))
        return result


class _CriticGradients(TrainerCallback):
    """
    Keeps the critic's gradients apart while Trainer clips those of the policy, and gives them back to the optimizer.

    Clipped together, a large error of the critic would shrink the policy's step.
    """

    def __init__(self, critic: Critic):
        self._parameters = critic.parameters
        self._kept: list[torch.Tensor | None] = []

    def set_aside(self, accelerator: Any, max_norm: float) -> float:
        """Average the gradients over processes, clip them, and take them away. Returns their norm before."""
        for parameter in self._parameters:
            if parameter.grad is not None and accelerator.num_processes > 1:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm if max_norm > 0 else torch.inf).item()
        if not norm < float("inf"):
            raise NotFiniteError(
                "A gradient of the critic is NaN or infinite. Training stops before the weights are damaged. Usual "
                "causes: a `value_learning_rate` that is too high, or rewards of extreme size."
            )
        self._kept = [parameter.grad for parameter in self._parameters]
        self._put([None] * len(self._parameters))
        return norm

    def _put(self, gradients: list[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._put(self._kept)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._kept = []
        self._put([None] * len(self._parameters))
