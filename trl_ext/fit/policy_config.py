"""From the config of a policy to the step that `trl-ext bench fit` estimates: sizes, models, checks.

It knows the arguments of `DenseGRPOTrainer` and `PPOTrainer`, and the inputs of the estimate. It runs nothing.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.fit.rows import PolicySizes


if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

    from trl_ext.fit.policy_models import PolicyStep

PROMPT = 256
"""Tokens of a prompt by default."""


def policy_sizes(training: Any, config: Any, args: argparse.Namespace) -> PolicySizes:
    """Prompts of `--prompt_length` tokens, and completions of the config's `max_completion_length`."""
    if args.candidates is not None:
        raise ValueError("--candidates belongs to reward models. Add --override num_generations=NUMBER.")
    longest = training.max_completion_length
    completion = longest if args.completion_length is None else args.completion_length
    prompt = PROMPT if args.prompt_length is None else args.prompt_length
    if prompt < 1 or completion < 2:
        raise ValueError("Needed: at least 1 token of prompt and 2 of completion.")
    if completion > longest:
        raise ValueError(
            f"--completion_length is {completion} tokens, but the config's max_completion_length is {longest}. Add "
            f"--override max_completion_length={completion}."
        )
    rows = training.per_device_train_batch_size
    generated = rows * training.steps_per_generation
    words = config.get_text_config().vocab_size
    return PolicySizes(prompt, completion, training.num_generations, rows, words, generated)


def policy_step(
    parsed: Any,
    config: Any,
    sizes: PolicySizes,
    dtype: "torch.dtype",
    attention: str,
    card: float,
    on_gpu: bool = True,
) -> "PolicyStep":
    """The step of a policy, in the form that the estimate needs. `card` is the memory of the GPU in GiB."""
    from transformers.training_args import OptimizerNames
    from trl import get_peft_config

    from trl_ext.fit.policy_models import PolicyStep

    training, model = parsed.training, parsed.model
    check_policy(parsed)
    critic, adapter = training.advantage == "gae", get_peft_config(model)
    cycle = training.steps_per_generation * training.num_iterations
    importance = training.use_vllm and training.vllm_importance_sampling_correction
    in_reward = critic and training.beta != 0 and training.kl_in == "reward"
    log_probs = training.gradient_accumulation_steps % cycle != 0 or importance or in_reward
    here = training.use_vllm and training.vllm_mode == "colocate"
    return PolicyStep(
        config=config,
        prompt=sizes.prompt,
        completion=sizes.completion,
        generated=sizes.generated,
        group=sizes.candidates,
        rows=sizes.rows,
        dtype=dtype,
        bf16=bool(training.bf16),
        four_bit=model.load_in_4bit,
        nested=model.use_bnb_nested_quant,
        peft_config=adapter,
        critic=critic,
        critic_config=critic_adapter(parsed, adapter) if critic else None,
        rewards=reward_adapters(parsed, config, sizes),
        reference=training.beta != 0,
        passes=log_probs + (training.beta != 0) + critic,
        gradients_in_generation=cycle % training.gradient_accumulation_steps != 0,
        generates=not training.use_vllm,
        vllm=int(training.vllm_gpu_memory_utilization * card * 2**30) if here else 0,
        vllm_sleeps=here and training.vllm_enable_sleep_mode,
        checkpointing=training.gradient_checkpointing,
        reentrant=bool((training.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)),
        accumulates=training.gradient_accumulation_steps > 1,
        dropout=not training.disable_dropout,
        optimizer=OptimizerNames(training.optim).value,
        attention=attention,
        on_gpu=on_gpu,
    )


def check_policy(parsed: Any) -> None:
    """Raise `ValueError` for a config whose memory is not estimated."""
    training = parsed.training
    if not reward_names(parsed):
        raise ValueError("No reward was named. Needed: reward_funcs or dense_reward_funcs.")
    refused = {
        "use_transformers_continuous_batching": "it takes the memory that is free for its cache",
        "cast_lm_head_to_fp32": "the logits are then computed by another path",
        "fsdp": "weights and gradients are spread over processes",
        "deepspeed": "weights and gradients are spread over processes",
        "cache_implementation": "only the default cache of a generation is counted",
    }
    refuse(training, refused)


def refuse(training: Any, refused: Mapping[str, str]) -> None:
    """Raise `ValueError` for an argument that is set and not estimated; `refused` maps each to the reason."""
    for name, why in refused.items():
        if vars(training).get(name):
            raise ValueError(f"{name}={vars(training)[name]!r} is not estimated: {why}. Measure it on the device.")


def reward_names(parsed: Any) -> list[str]:
    """The reward functions and models of a config, scalar and dense."""
    return [*(parsed.rewards.reward_funcs or []), *(parsed.rewards.dense_reward_funcs or [])]


def reward_adapters(parsed: Any, config: Any, sizes: PolicySizes) -> list[Any]:
    """
    The reward models that are adapters on the policy's base. Functions and servers take no memory here.

    A model whose folder does not exist yet is taken for an adapter like the policy's.

    Raises:
        `ValueError`: a reward model has a base of its own, or a judge scores.
    """
    from peft import PeftConfig
    from trl import get_peft_config

    from trl_ext.fit.policy_models import RewardAdapter
    from trl_ext.models.shared_prefix import refused_by_config
    from trl_ext.pipelines.names import is_function_name, is_judge_file
    from trl_ext.scoring.shared_base_scorer import shares_base

    model, found = parsed.model, []
    attention = model.attn_implementation or "sdpa"
    can_be_flat = sizes.candidates > 1 and refused_by_config(config.get_text_config(), attention) is None
    for number, name in enumerate(reward_names(parsed)):
        if is_function_name(name) or name.startswith(("http://", "https://")):
            continue
        exists = Path(name).is_dir()
        shared = parsed.rewards.share_base and (shares_base(name, model) if exists else model.use_peft)
        if is_judge_file(name) or not shared:
            raise ValueError(
                f"The reward model {name} is no adapter on the policy's base, and its memory is not estimated. "
                "Leave it out with --override, serve it elsewhere (http://...), or train an adapter on that base."
            )
        adapter = PeftConfig.from_pretrained(name) if exists else get_peft_config(model)
        scalar = number < len(parsed.rewards.reward_funcs or [])
        found.append(RewardAdapter(adapter, dense=not scalar, flat=scalar and can_be_flat))
    return found


def assumed(parsed: Any) -> str | None:
    """A sentence that names the reward models whose folders do not exist, or `None`."""
    from trl_ext.pipelines.names import is_function_name

    critic = [vars(parsed.rewards).get("value_model")] if parsed.training.advantage == "gae" else []
    names = [name for name in dict.fromkeys([*reward_names(parsed), *critic]) if name and not is_function_name(name)]
    absent = [name for name in names if not Path(name).is_dir() and not name.startswith(("http://", "https://"))]
    if not absent:
        return None
    return f"Not found here, and estimated as adapters like the policy's: {', '.join(absent)}."


def critic_adapter(parsed: Any, adapter: "LoraConfig | None") -> "LoraConfig | None":
    """The adapter that the critic starts from, or the policy's. `None` for a critic with all its weights."""
    from peft import PeftConfig

    folder = parsed.rewards.value_model
    if folder is None or not Path(folder).is_dir():
        return adapter
    saved = Path(folder, "adapter_config.json").is_file()
    if saved != (adapter is not None):
        raise ValueError(
            f"The critic in {folder} {'is an adapter' if saved else 'has all weights'} and the policy "
            f"{'has an adapter' if adapter else 'has all weights'}, so they share no base. This is not estimated."
        )
    return PeftConfig.from_pretrained(folder) if saved else None
