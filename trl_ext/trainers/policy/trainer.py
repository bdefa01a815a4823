"""`DenseGRPOTrainer`: TRL's GRPO with an advantage for every token, from rewards of tokens, steps and segments.

TRL's loss accepts advantages of the shape `(B, T)`. This trainer calls TRL's generation and scoring and replaces the
advantages that they return. It changes nothing else of GRPO, so every `loss_type`, vLLM mode, `num_iterations` and
multi-process run works as in TRL.
"""

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from trl_ext.losses.advantages import (
    gae,
    last_tokens,
    mean_to_go,
    min_form,
    normalize_steps,
    potentials_of,
    returns_to_go,
    shrunken_steps,
    whiten,
)
from trl_ext.models.building import keep_4bit_exact_on_cpu
from trl_ext.models.ensemble.ensemble_files import ENSEMBLE_NAME
from trl_ext.models.inputs import text_tokenizer
from trl_ext.trainers.common.health import NotFiniteError
from trl_ext.trainers.common.policy_card import sampling_section
from trl_ext.trainers.common.policy_training import PolicyTraining
from trl_ext.trainers.common.summary import run_facts
from trl_ext.trainers.common.tracking import log_media
from trl_ext.trainers.policy.config import DenseGRPOConfig
from trl_ext.trainers.policy.dense_rewards import DenseRewards
from trl_ext.trainers.policy.pictures import write_pictures
from trl_ext.trainers.policy.report import completions_page, policy_report
from trl_ext.trainers.policy.watch import HackingWatch, repetition_metric, samples_of, step_metrics, write_samples


logger = logging.getLogger(__name__)

# Completions on each page that goes to W&B: a page of long ones has some hundred KB.
SHOWN_ON_WANDB = 4
_ADAPTER_FILES = ("adapter_config.json", ENSEMBLE_NAME)


class DenseGRPOTrainer(PolicyTraining, GRPOTrainer):
    """
    GRPO with rewards for parts of a completion.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): the policy, as in `trl.GRPOTrainer`.
        reward_funcs (*optional*): scalar reward functions, as in `trl.GRPOTrainer`. Their advantage is the same for
            all tokens of a completion and is added with `outcome_weight`.
        dense_reward_funcs (*optional*):
            One or a list of: a process, segment or outcome [`RewardScorer`]; any object with `score_steps`,
            `score_segments`, or `score_tokens` and `token_texts`; or a function `(prompts, completions, **columns)`
            that returns for each completion a list of `(start, end, reward)` in characters, or `None` for no rewards.
            It gets the arguments of a TRL reward function, and `completion_texts`, the strings that it counts in.
            The token that completes the last character of a span gets its reward. The reward model's tokenizer may
            differ from the policy's.
        args ([`DenseGRPOConfig`], *optional*): the arguments of `trl.GRPOConfig`, and how rewards become advantages.
        **kwargs: as in `trl.GRPOTrainer`. `tools`, `rollout_func` and `environment_factory` raise an error, because
            spans of characters refer to a single answer.

    Raises:
        TypeError: if `args` is not a [`DenseGRPOConfig`], or a dense reward function is a scalar reward model.
        ValueError: if there is no reward function or one is the path of an adapter, if `advantage="outcome"` is
            combined with dense reward functions, if the number of weights differs from the number of functions, or
            for a policy's adapter that could not be loaded again as it was trained.
        [`BaseMismatchError`]: if a policy in memory differs from the files that its adapter or reference needs.
        [`NotFiniteError`]: in training, if a reward is infinite, or a loss is NaN or infinite.
        [`DenseRewardError`]: in training, if a dense reward function returns spans outside a completion, rewards that
            are not finite, or the wrong number of lists.

    Example:

    ```python
    prm = RewardScorer("outputs/prm")
    trainer = DenseGRPOTrainer(
        "Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=accuracy_reward,
        dense_reward_funcs=prm,
        args=DenseGRPOConfig(output_dir="outputs/policy", advantage="process"),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl_ext", "dense-grpo"]
    _name = "Dense GRPO"
    _what = "A language model that was trained with rewards for parts of its completions."

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        dense_reward_funcs: Any = None,
        args: DenseGRPOConfig | None = None,
        **kwargs: Any,
    ):
        args = DenseGRPOConfig("dense-grpo") if args is None else args
        if not isinstance(args, DenseGRPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}; needed: a DenseGRPOConfig, which has all fields of GRPOConfig."
            )
        refused = [name for name in ("tools", "rollout_func", "environment_factory") if kwargs.get(name) is not None]
        if refused:
            raise ValueError(
                f"{refused[0]} is given; dense rewards need completions of one answer, without tools. Leave it out."
            )
        scalar, dense = _listed(reward_funcs), _listed(dense_reward_funcs)
        if not scalar and not dense:
            raise ValueError("Neither reward_funcs nor dense_reward_funcs is given; needed: at least one function.")
        _check_adapters(scalar)
        if dense and args.advantage == "outcome":
            raise ValueError(
                f"{len(dense)} dense reward functions are given with advantage='outcome', which does not use them. "
                "Choose 'process', 'return' or 'min_form', or leave dense_reward_funcs out."
            )
        weights = args.dense_reward_weights or [1.0] * len(dense)
        if len(weights) != len(dense):
            raise ValueError(f"{len(weights)} dense_reward_weights for {len(dense)} functions; needed: one for each.")
        self._sample: dict[str, Any] | None = None
        self._pictured = -1  # the step of the last pictures
        self._scalar_rewards: tuple[torch.Tensor, torch.Tensor] | None = None  # and where there is one
        self._dense: DenseRewards | None = None
        if dense:
            self._dense = DenseRewards(dense, weights)
            args = copy.copy(args)  # do not change the user's config
            args.reward_weights = [*(args.reward_weights or [1.0] * len(scalar)), 0.0]
            classes = kwargs.get("reward_processing_classes")
            if classes is not None:
                kwargs["reward_processing_classes"] = [*_listed(classes), None]
            scalar = [*scalar, self._dense]
        model, args = self._accept(model, args, kwargs, reference=args.beta != 0, copied=True)
        super().__init__(model=model, reward_funcs=scalar, args=args, **kwargs)
        self._finish_set_up(args.without_effect(bool(dense)))
        keep_4bit_exact_on_cpu(self.model)
        for function in [*_listed(reward_funcs), *dense]:
            # only reward functions that wait for the policy's base have the method (SharedBaseScorer)
            getattr(function, "use_base", lambda policy: None)(self.model)
        if args.verifier is not None and args.verifier not in self.reward_func_names:
            raise ValueError(
                f"verifier={args.verifier!r} is none of the reward functions {self.reward_func_names}. Pass it in "
                "`reward_funcs`, with the weight 0 in `reward_weights` if it is not to be trained on."
            )
        self._hacking = None if args.verifier is None else HackingWatch(args.verifier)
        if self._dense is not None:
            self._dense.tokenizer = text_tokenizer(self.processing_class)

    # --------------------------------------------------------------------------------------------- telling and saving
    def _loss_in_words(self) -> str:
        args = self.args
        dense = "" if self._dense is None else f", advantage {args.advantage}"
        return f"GRPO ({args.loss_type}){dense}{f', KL coefficient {self.beta:g}' if self.beta else ''}"

    def _facts(self) -> dict[str, str]:
        names = self.reward_func_names if self._dense is None else self.reward_func_names[:-1]
        weights = [float(weight) for weight in self.reward_weights]
        rewards = [f"{name} x {weight:g}" for name, weight in zip(names, weights, strict=False)]
        if self._dense is not None:
            dense = zip(self._dense.names, self._dense.weights, strict=True)
            rewards += [f"{name} x {weight:g} (dense)" for name, weight in dense]
        facts = run_facts(
            self,
            loss=self._loss_in_words(),
            rewards=", ".join(rewards),
            completions=f"{self.num_generations} of each prompt, up to {self.max_completion_length} tokens",
        )
        # a batch holds completions: the prompts of a step are as many divided by `num_generations`
        return facts | {"batch": facts["batch"].replace("rows", "completions")}

    def _metrics_section(self) -> list[str]:
        return sampling_section(self) if self.eval_dataset is None else super()._metrics_section()

    # ------------------------------------------------------------------------------------------------------- rewards
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"].bool()
        rewards, given = torch.zeros(mask.shape, device=mask.device), torch.zeros_like(mask)
        if self._dense is not None:
            rewards, given = self._dense.take(mask.shape, mask.device)
        output["advantages"] = self._credit(output, rewards, given & mask, mask)
        self._observe(output, rewards, given & mask, mask)
        return output

    def _observe(self, output: dict[str, Any], rewards: torch.Tensor, given: torch.Tensor, mask: torch.Tensor) -> None:
        """Record what the policy wrote; see [`trl_ext.trainers.policy.watch`]."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        reduce = partial(self.accelerator.reduce, reduction="sum")
        found = repetition_metric(output["completion_ids"], mask, reduce)
        if self._dense is not None:
            found |= step_metrics(rewards, given, mask, self.args.low_reward, reduce)
        if self._hacking is not None and self.model.training:
            dense = {} if self._dense is None else {"dense": metrics["rewards/dense/mean"][-1]}
            truth = metrics[f"rewards/{self._hacking.verifier}/mean"][-1]
            found |= self._hacking.add(metrics["reward"][-1], truth, **dense)
        for name, value in found.items():
            metrics[name].append(value)
        if self.log_completions and self.model.training:
            scalar, scored = self._scalar_rewards
            self._sample = output | {"rewards": rewards, "given": given, "scalar": scalar, "scored": scored}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log. With `log_completions=True`, completions and their advantages are kept, and shown on W&B."""
        super().log(logs, start_time)
        if self._sample is not None and self.is_world_process_zero():
            tokenizer = text_tokenizer(self.processing_class)
            samples = samples_of(self.state.global_step, tokenizer, self._sample, self.num_generations)
            write_samples(Path(self.args.output_dir, "completions"), samples)
            page = completions_page(samples[:SHOWN_ON_WANDB])
            log_media(self, lambda wandb: {"completions/advantages": wandb.Html(page, inject=False)})
        self._sample = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's training. At the end W&B gets pictures, and `log_completions=True` writes a report."""
        output = super().train(*args, **kwargs)
        self._log_pictures()
        if self.log_completions and self.is_world_process_zero():
            try:
                policy_report(self.args.output_dir, self.state.log_history)
            except Exception as error:  # a report that fails must not cost a trained policy
                logger.warning(f"The report of the training could not be written: {error!r}")
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy. With a checkpoint, the pictures on W&B are renewed."""
        super().save_model(output_dir, _internal_call)
        if _internal_call:
            self._log_pictures()

    def _log_pictures(self) -> None:
        def pictures(wandb: Any) -> dict[str, Any]:
            files = write_pictures(Path(self.args.output_dir), self.state.log_history)
            return {f"pictures/{file.stem}": wandb.Image(str(file)) for file in files}

        if self._pictured != self.state.global_step:
            self._pictured = self.state.global_step
            log_media(self, pictures)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        scalar = rewards if self._dense is None else rewards[:, :-1]  # the last one is the sum of the dense rewards
        weights = self.reward_weights.to(rewards.device)[: scalar.shape[1]]
        start = self.accelerator.process_index * len(prompts)
        mine = scalar[start : start + len(prompts)]
        self._scalar_rewards = (mine * weights).nansum(1), mine.isfinite().any(1)
        if mine.isinf().any():
            raise NotFiniteError("A reward function returned an infinite reward. Needed: finite numbers, or None.")
        return rewards

    def _credit(
        self, output: dict[str, Any], rewards: torch.Tensor, given: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """
        The advantages of a batch of completions.

        Args:
            output (`dict`): what TRL's scoring returned; `advantages` (N,) are those of the scalar rewards.
            rewards, given (`torch.Tensor` of shape `(N, T)`): the dense rewards, and where there is one.
            mask (`torch.BoolTensor` of shape `(N, T)`): the tokens that the policy wrote.
        """
        if self._dense is None:
            return output["advantages"]
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        function = partial(self._dense_advantages, group_size=group_size)
        scalar = self._scalar_rewards[0].unsqueeze(1).expand(mask.shape)
        dense = self._across_processes(function, rewards, given, mask, scalar, output["completion_ids"])
        self._log_dense(mode, given, mask, dense)
        if self.args.advantage in ("shaped", "shrunken"):  # the scalar rewards are in it
            return dense
        outcome = output["advantages"].unsqueeze(1) * mask
        return self.args.outcome_weight * outcome + self.args.dense_weight * dense

    def _dense_advantages(
        self,
        rewards: torch.Tensor,
        given: torch.Tensor,
        mask: torch.Tensor,
        scalar: torch.Tensor,
        ids: torch.Tensor,
        group_size: int,
    ) -> torch.Tensor:
        """Advantages `(N, T)` of whole groups; see [`DenseGRPOConfig`]. Each row of `scalar` repeats one number."""
        args = self.args
        if args.advantage == "process":
            rewards = normalize_steps(rewards, given, group_size)
            return mean_to_go(rewards, given, mask) if args.length_control else returns_to_go(rewards, mask)
        rewards = rewards.masked_fill(~given, 0.0)
        if args.advantage == "shaped":
            potentials = args.dense_weight * potentials_of(rewards, given, mask, group_size, args.potential)
            outcome = args.outcome_weight * scalar * last_tokens(mask)
            shaped = gae(outcome, potentials, mask, args.gamma, args.gae_lambda)
            # A group without a right completion has shaping rewards only, so its own deviation must not divide them.
            return whiten(shaped, mask, group_size, scale_by="batch")
        elif args.advantage == "shrunken":
            total = args.dense_weight * rewards + args.outcome_weight * scalar * last_tokens(mask)
            returns = returns_to_go(total, mask, args.gamma)
            steps = shrunken_steps(returns, ids, given, mask, group_size, args.shrinkage)
            return whiten(steps, mask, group_size, shift_mean=False)
        elif args.advantage == "min_form":
            rewards = min_form(rewards, given, args.min_form_temperature)
        returns = mean_to_go(rewards, given, mask) if args.length_control else returns_to_go(rewards, mask, args.gamma)
        return whiten(returns, mask, group_size)

    def _across_processes(self, function: Callable, *parts: torch.Tensor) -> torch.Tensor:
        """Gather tensors `(N, T)` from all processes, apply `function`, and return this process's rows."""
        size, width = parts[0].shape
        numbers = [part.long() if part.dtype == torch.bool else part for part in parts]  # a collective takes no bools
        gathered = [self.accelerator.gather(self.accelerator.pad_across_processes(n, dim=1)) for n in numbers]
        gathered = [g.to(part.dtype) for g, part in zip(gathered, parts, strict=True)]
        start = self.accelerator.process_index * size
        return function(*gathered)[start : start + size, :width]

    def _log_dense(self, mode: str, given: torch.Tensor, mask: torch.Tensor, dense: torch.Tensor) -> None:
        counts = torch.stack([given.sum(), given.any(1).sum(), torch.tensor(len(given), device=given.device)]).float()
        rewards, rewarded, completions = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._metrics[mode]["dense/rewards_per_completion"].append(rewards / completions)
        self._metrics[mode]["dense/completions_without_reward"].append(1 - rewarded / completions)
        size = (dense.abs() * mask).sum() / mask.sum().clamp(min=1)
        self._metrics[mode]["dense/advantage_size"].append(self.accelerator.gather(size).mean().item())


def _check_adapters(reward_funcs: list[Any]) -> None:
    """Raise `ValueError` for the folder of an adapter or ensemble, which TRL would score by other token ids."""
    for spec in reward_funcs:
        if isinstance(spec, (str, Path)) and any(Path(spec, name).is_file() for name in _ADAPTER_FILES):
            kind = "RewardEnsemble" if Path(spec, ENSEMBLE_NAME).is_file() else "RewardScorer"
            raise ValueError(
                f"reward_funcs names {spec}, an adapter. TRL would read texts with the tokenizer of its base and "
                f"without the EOS that training appended: other scores. Pass {kind}({str(spec)!r})."
            )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
