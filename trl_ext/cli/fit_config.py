"""What `trl-ext bench fit` reads in a training config: the arguments, the rows that fill it, the step to estimate.

The config is parsed as its own command parses it. Knows commands, their configs, and what the estimate asks for. Runs
nothing.
"""

import argparse
import copy
import importlib
import tempfile
from pathlib import Path
from typing import Any

from .fit_rows import Sizes, batch_for


TRAINERS = {
    "reward": "RewardTrainer",
    "ensemble": "RewardEnsembleTrainer",
    "orm": "ORMTrainer",
    "prm": "PRMTrainer",
    "segment": "SegmentRewardTrainer",
}


class Parsed(argparse.Namespace):
    """What TRL's parser made of a config: `training` and `model`."""


def parse(command: str, args: argparse.Namespace) -> Parsed:
    """The config of a command with the overrides, as the command itself reads it."""
    import torch
    import yaml

    values = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{args.config} holds no arguments. Needed: lines such as `model_name_or_path: NAME`.")
    for override in args.override:
        name, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--override {override} has no value. Needed: NAME=VALUE.")
        values[name] = yaml.safe_load(value)
    parser = importlib.import_module(f"trl_ext.cli.{command}").make_parser()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        flags = [] if torch.cuda.is_available() else ["--use_cpu"]
        _, training, model, _ = parser.parse_args_and_config(["--config", str(file), *flags])
    if model.model_name_or_path is None:
        raise ValueError(f"{args.config} names no model. Needed: model_name_or_path.")
    return Parsed(training=training, model=model)


def changed(parsed: Parsed, values: dict[str, Any]) -> Parsed:
    """A copy with other values of some arguments."""
    new = Parsed(training=copy.copy(parsed.training), model=copy.copy(parsed.model))
    for name, value in values.items():
        vars(new.training if name in vars(new.training) else new.model)[name] = value
    return new


def sizes_of(command: str, parsed: Parsed, config: Any, args: argparse.Namespace) -> Sizes:
    """The rows that fill the config's `max_length`, and how many make up a batch."""
    longest, training = parsed.training.max_length, parsed.training
    if longest is None and None in (args.prompt_length, args.completion_length):
        raise ValueError("The config has no max_length. Give --prompt_length and --completion_length.")
    prompt = args.prompt_length
    if prompt is None:
        prompt = longest // 2 if args.completion_length is None else longest - args.completion_length
    completion = longest - prompt if args.completion_length is None else args.completion_length
    if longest is not None and prompt + completion > longest:  # as the trainer would drop it
        prompt, completion = longest // 2, longest - longest // 2
    candidates = args.candidates
    if candidates is None:
        ranked = command in ("reward", "ensemble")
        alone = not ranked and not training.group_by_prompt
        candidates = 1 if alone else 2 if training.loss_type == "bradley_terry" else 4
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


def training_step(command: str, parsed: Parsed, config: Any, sizes: Sizes, on_gpu: bool = True) -> Any:
    """What the estimate has to know of a command's run."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.training_args import OptimizerNames
    from trl import get_peft_config

    from trl_ext.models.building import as_dtype
    from trl_ext.models.memory_estimate import TrainingStep

    training, model = parsed.training, parsed.model
    if model.load_in_8bit:
        raise ValueError("8-bit bases are not estimated. Use load_in_4bit, or measure on the device.")
    attention = model.attn_implementation or "sdpa"
    flat = training.shared_prefix is not False and attention in ("sdpa", "eager")
    flat = flat and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and training.pad_to_multiple_of is None
    members = training.num_members if command == "ensemble" else None
    own_batches = command == "ensemble" and training.data_strategy == "shuffle"
    labels = 1
    if command in ("prm", "segment"):
        labels = training.num_labels
    if command == "segment":
        labels *= max(1, len(training.categories or []))
    wanted = as_dtype(model.dtype)
    return TrainingStep(
        config=config,
        batch=batch_for(command, sizes, flat, training.pad_to_multiple_of, members if own_batches else 1),
        num_labels=labels,
        token_level=command in ("orm", "prm", "segment"),
        dtype=wanted if isinstance(wanted, torch.dtype) else config.dtype or torch.float32,
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
        attention=attention,
        on_gpu=on_gpu,
    )
