"""From a training config to the step that `trl-ext bench fit` estimates: arguments, sizes of rows, the step itself.

It parses the config like the command that the config belongs to. It knows trainers, their configs, and the inputs of
the estimate. It runs nothing.
"""

import argparse
import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.fit.policy_config import assumed, policy_sizes, policy_step, refuse
from trl_ext.fit.rows import Sizes, batch_for


if TYPE_CHECKING:
    import torch

    from trl_ext.fit.memory_count import Estimate


TRAINERS = {
    "reward": "RewardTrainer",
    "ensemble": "RewardEnsembleTrainer",
    "orm": "ORMTrainer",
    "prm": "PRMTrainer",
    "segment": "SegmentRewardTrainer",
    "dense_grpo": "DenseGRPOTrainer",
    "ppo": "PPOTrainer",
}
POLICIES = ("dense_grpo", "ppo")
"""The trainers of policies; the others train reward models."""

NOT_ESTIMATED = {
    "sft_coefficient": "the frozen output layer and its logits take memory of their own",
    "activation_offloading": "activations wait in the memory of the CPU",
}
"""Arguments of reward models whose memory is not estimated, and the reason."""

PACKAGES = re.compile(r"^(flash_attention_[234]|flex_attention)$|/")
"""Names of attention kernels that come from packages, from torch's compiler or from the Hub."""


class Parsed(argparse.Namespace):
    """A config as objects: `training` and `model`; for a policy `rewards` too, the names of its reward models."""


def parse(command: str, args: argparse.Namespace) -> Parsed:
    """Parse the config of a command, with the overrides, as the command does."""
    import torch

    import trl_ext
    from trl_ext.trainers.common.command_line import Parser, PolicyArguments, PPOArguments, types_of

    config_class = getattr(trl_ext, TRAINERS[command].replace("Trainer", "Config"))
    flags = [] if torch.cuda.is_available() else ["--use_cpu"]
    types = types_of(config_class)
    if command in POLICIES:
        types = (PPOArguments if command == "ppo" else PolicyArguments, *types[1:])
    parser = Parser(types, prog=f"trl-ext {command}", allow_abbrev=False)
    script, training, model, _ = parser.parse_values(values_of(args), flags, args.config)
    if model.model_name_or_path is None:
        raise ValueError(f"{args.config} names no model. Needed: model_name_or_path.")
    return Parsed(training=training, model=model, rewards=script if command in POLICIES else None)


def values_of(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the file, with the overrides."""
    import yaml

    try:
        values = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{args.config} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{args.config} holds no arguments. Needed: lines such as `model_name_or_path: NAME`.")
    for override in args.override:
        name, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--override {override} has no value. Needed: NAME=VALUE.")
        values[name] = yaml.safe_load(value)
    return values


def changed(parsed: Parsed, values: dict[str, Any]) -> Parsed:
    """A copy with other values of some arguments."""
    new = Parsed(training=copy.copy(parsed.training), model=copy.copy(parsed.model), rewards=parsed.rewards)
    for name, value in values.items():
        vars(new.training if name in vars(new.training) else new.model)[name] = value
    return new


def sizes_of(command: str, parsed: Parsed, config: Any, args: argparse.Namespace) -> Sizes:
    """The rows that fill the config's `max_length`, and how many make up a batch."""
    if command in POLICIES:
        return policy_sizes(parsed.training, config, args)
    from trl_ext.losses.ranking import ranking_losses

    longest, training = parsed.training.max_length, parsed.training
    wanted = (args.prompt_length or 0) + (args.completion_length or 0)
    if longest is not None and wanted > longest:
        raise ValueError(
            f"--prompt_length and --completion_length are {wanted} tokens, but the config's max_length is {longest}: "
            f"the trainer would drop or cut such rows. Add --override max_length={wanted}."
        )
    if longest is None and None in (args.prompt_length, args.completion_length):
        raise ValueError("The config has no max_length. Give --prompt_length and --completion_length.")
    prompt = args.prompt_length
    if prompt is None:
        prompt = longest // 2 if args.completion_length is None else longest - args.completion_length
    completion = longest - prompt if args.completion_length is None else args.completion_length
    candidates, ranked = args.candidates, command in ("reward", "ensemble")
    most = ranking_losses.properties_of(training.loss_type).max_candidates if ranked else None
    if candidates is None:
        alone = not ranked and not training.group_by_prompt
        candidates = 1 if alone else min(4, most or 4)
    elif most == 2 and candidates != 2:
        raise ValueError(
            f"--candidates is {candidates}, but the config's loss_type {training.loss_type} learns from pairs. Give "
            "--candidates 2, or another loss_type with --override."
        )
    if min(prompt, candidates) < 1 or completion < 2:
        raise ValueError("Needed: at least 1 token of prompt, 2 of completion and 1 candidate.")
    rows, words = training.per_device_train_batch_size, min(4096, config.get_text_config().vocab_size)
    if training.max_tokens_per_batch is not None:
        flat = training.shared_prefix is not False
        of_group = prompt + candidates * completion if flat else candidates * (prompt + completion)
        if command in ("reward", "ensemble"):
            rows = max(1, training.max_tokens_per_batch // of_group)
        else:
            rows = max(1, training.max_tokens_per_batch * candidates // of_group)
    return Sizes(prompt, completion, candidates, rows, words)


def estimate_of(
    command: str, parsed: Parsed, config: Any, sizes: Any, args: argparse.Namespace, on_gpu: bool = True
) -> "Estimate":
    """The estimate for the step of a command."""
    if command in POLICIES:
        from trl_ext.fit.policy_estimate import estimate_policy

        check(command, parsed)
        attention = estimated_attention(parsed.model.attn_implementation)
        dtype = dtype_of(parsed, config)
        return estimate_policy(policy_step(parsed, config, sizes, dtype, attention, args.gpu_memory, on_gpu))
    from trl_ext.fit.memory_estimate import estimate

    return estimate(training_step(command, parsed, config, sizes, on_gpu))


def dtype_of(parsed: Parsed, config: Any) -> "torch.dtype":
    """The dtype in which the base is loaded."""
    import torch

    from trl_ext.models.building import as_dtype

    wanted = as_dtype(parsed.model.dtype)
    return wanted if isinstance(wanted, torch.dtype) else config.dtype or torch.float32


def training_step(command: str, parsed: Parsed, config: Any, sizes: Sizes, on_gpu: bool = True) -> Any:
    """The training step of a command, in the form that the estimate needs."""
    from transformers.training_args import OptimizerNames
    from trl import get_peft_config

    from trl_ext.fit.memory_estimate import TrainingStep

    training, model = parsed.training, parsed.model
    check(command, parsed)
    flat = _flat_rows(training, config, model.attn_implementation or "sdpa")
    members = training.num_members if command == "ensemble" else None
    own_batches = command == "ensemble" and training.data_strategy == "shuffle"
    labels = 1
    if command in ("prm", "segment"):
        labels = training.num_labels
    if command == "segment":
        labels *= max(1, len(training.categories or []))
    return TrainingStep(
        config=config,
        batch=batch_for(command, sizes, flat, training.pad_to_multiple_of, members if own_batches else 1),
        num_labels=labels,
        token_level=command in ("orm", "prm", "segment"),
        dtype=dtype_of(parsed, config),
        bf16=bool(training.bf16),
        four_bit=model.load_in_4bit,
        nested=model.use_bnb_nested_quant,
        peft_config=get_peft_config(model),
        members=members,
        branch_share=training.branch_at if command == "ensemble" else None,
        own_batches=own_batches,
        checkpointing=training.gradient_checkpointing,
        reentrant=bool((training.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)),
        accumulates=training.gradient_accumulation_steps > 1,
        dropout=not training.disable_dropout,
        optimizer=OptimizerNames(training.optim).value,
        attention=estimated_attention(model.attn_implementation),
        on_gpu=on_gpu,
    )


def check(command: str, parsed: Parsed) -> None:
    """Run the trainer's checks of the arguments. Raises the trainer's `ValueError`."""
    from transformers.integrations import get_reporting_integration_callbacks
    from trl import get_peft_config, get_quantization_config

    from trl_ext import trainers
    from trl_ext.trainers.common.setup import check_sharding, uses_fsdp
    from trl_ext.trainers.ensemble.member_training import check_adapter

    training = parsed.training
    if parsed.model.load_in_8bit:
        raise ValueError("8-bit bases are not estimated. Use load_in_4bit, or measure on the device.")
    if command not in POLICIES:
        refuse(training, NOT_ESTIMATED)
        getattr(trainers, TRAINERS[command]).check_arguments(training)
    if command == "ensemble":
        check_adapter(get_peft_config(parsed.model))
    check_sharding(uses_fsdp(training), 0, get_quantization_config(parsed.model))
    get_reporting_integration_callbacks([name for name in training.report_to if name != "wandb"])


def notes(command: str, parsed: Parsed) -> str | None:
    """What the estimate assumes, in words, or `None`."""
    found = [attention_note(parsed.model.attn_implementation)]
    if command in POLICIES:
        found.append(assumed(parsed))
    return " ".join(filter(None, found)) or None


def estimated_attention(wanted: str | None) -> str:
    """The attention that the estimate runs for an `attn_implementation`: kernels of packages become `sdpa`."""
    return "sdpa" if wanted is None or PACKAGES.search(wanted) else wanted


def attention_note(wanted: str | None) -> str | None:
    """A note on how the estimate differs for this `attn_implementation`, or `None`."""
    if wanted in (None, estimated_attention(wanted)):
        return None
    return (
        f"attn_implementation={wanted!r} is estimated as 'sdpa' on padded rows, because flat rows need 'sdpa' or "
        "'eager'. Neither kernel keeps attention weights for the backward pass. The estimate also counts padding, "
        "which the kernel may leave out."
    )


def check_attention(config: Any, wanted: str | None) -> None:
    """Raise `ValueError` if the run needs an attention that is not installed here."""
    import torch
    from transformers import AutoModel

    from trl_ext.models.building import attention_at_hand

    try:
        with torch.device("meta"), attention_at_hand(wanted):
            AutoModel.from_config(config, attn_implementation=wanted)
    except ImportError as error:
        raise ValueError(f"{error} --estimate needs neither.") from error


def _flat_rows(training: Any, config: Any, attention: str) -> bool:
    """Whether the trainer uses flat rows, as far as its config and the model's config show."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from trl_ext.models.shared_prefix import SharedPrefixSupport, is_granted, refused_by_config
    from trl_ext.trainers.common.batching import wants_flat_rows

    if not wants_flat_rows(training):
        return False
    refused = refused_by_config(config.get_text_config(), attention)
    if refused is None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        refused = f"{config.model_type!r} is no decoder"
    return is_granted(training.shared_prefix, SharedPrefixSupport(refused is None, refused or ""))
