"""Single changes of a training config that could make it fit or run faster, and the advice which one to make.

It knows the arguments of a command and the effect of each change. It estimates nothing itself.
"""

import json
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple


class Change(NamedTuple):
    """
    One change of a config.

    Args:
        name (`str`): its name in the table.
        values (`dict`): the arguments that it sets.
        same_result (`bool`): whether the run learns the same, apart from rounding and from rows in other batches.
    """

    name: str
    values: dict[str, Any]
    same_result: bool


def changes(command: str, training: Any, model: Any) -> Iterator[Change]:
    """The changes that are possible, from the configs of TRL's parser."""
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if training.gradient_checkpointing:
        yield Change("no gradient checkpointing", {"gradient_checkpointing": False}, True)
    else:
        yield Change("gradient checkpointing", {"gradient_checkpointing": True}, True)
    if training.max_tokens_per_batch is not None:
        half = {"max_tokens_per_batch": training.max_tokens_per_batch // 2, "gradient_accumulation_steps": 2 * steps}
        yield Change("half the tokens in a batch, twice the accumulation", half, True)
    else:
        if rows > 1:  # as many in a step as before
            fewer = rows // 2 if rows % 2 == 0 else 1
            name = "half the rows in a batch, twice" if rows % 2 == 0 else f"one row in a batch, {rows} times"
            values = {"per_device_train_batch_size": fewer, "gradient_accumulation_steps": rows // fewer * steps}
            yield Change(f"{name} the accumulation", values, True)
        if steps > 1 and steps % 2 == 0:
            doubled = {"per_device_train_batch_size": 2 * rows, "gradient_accumulation_steps": steps // 2}
            yield Change("twice the rows in a batch, half the accumulation", doubled, True)
    if training.shared_prefix is False:
        yield Change("flat rows", {"shared_prefix": "auto"}, True)
    if "8bit" not in str(training.optim):
        yield Change("8-bit optimizer", {"optim": "paged_adamw_8bit"}, False)
    if not model.use_peft and command != "ensemble":
        yield Change("LoRA", {"use_peft": True, "lora_target_modules": "all-linear"}, False)
    if model.use_peft and not model.load_in_4bit:
        yield Change("4-bit base", {"load_in_4bit": True}, False)
    if model.dtype in (None, "float32") and model.use_peft:
        yield Change("base in bf16", {"dtype": "bfloat16"}, False)
    if command == "ensemble" and training.branch_at is None:
        yield Change("members branch at 3/4 of the layers", {"branch_at": 0.75}, False)
    if training.max_length is not None and training.max_length > 1:
        yield Change("half the max_length", {"max_length": training.max_length // 2}, False)


def policy_changes(training: Any, model: Any) -> Iterator[Change]:
    """The changes that are possible for a policy. A step learns from as many completions as before."""
    rows, steps, at_once = (
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        training.steps_per_generation,
    )
    if training.gradient_checkpointing:
        yield Change("no gradient checkpointing", {"gradient_checkpointing": False}, True)
    else:
        yield Change("gradient checkpointing", {"gradient_checkpointing": True}, True)
    if rows % 2 == 0:
        halves = {
            "per_device_train_batch_size": rows // 2,
            "gradient_accumulation_steps": 2 * steps,
            "steps_per_generation": 2 * at_once,
        }
        yield Change("half the completions in a batch, twice the accumulation", halves, True)
    prompts = at_once % 2 == 0 and rows * at_once // 2 % training.num_generations == 0
    if prompts and training.num_iterations == 1 and not training.use_vllm:
        fewer = {"steps_per_generation": at_once // 2, "generation_batch_size": None}
        yield Change("half the completions generated at a time", fewer, True)
    if "8bit" not in str(training.optim):
        yield Change("8-bit optimizer", {"optim": "paged_adamw_8bit"}, False)
    if model.use_peft and not model.load_in_4bit:
        yield Change("4-bit base", {"load_in_4bit": True}, False)
    if training.max_completion_length > 2:
        half = {"max_completion_length": training.max_completion_length // 2}
        yield Change("half the max_completion_length", half, False)


def advise(cases: list[dict[str, Any]], now: dict[str, Any]) -> str:
    """
    The advice which change to make, as a sentence.

    If the config does not fit, it prefers changes that learn the same, and among them the one with the fewest
    operations per row. If the config fits, it looks for a change that learns the same, still fits and computes less.

    Args:
        cases (`list[dict]`): the changes, each with `name`, `same_result`, `gib`, `flops_per_row` and `fits`.
        now (`dict`): the unchanged config, with the same keys.
    """
    fitting = [case for case in cases if case["fits"]]
    if not now["fits"]:
        if not fitting:
            return "No single change makes it fit. Combine the changes that save the most."
        best = min(fitting, key=lambda case: (not case["same_result"], case["flops_per_row"], case["gib"]))
        return f"To make it fit: {best['name']} ({_flags(best)}), {best['gib']:.1f} GiB."
    faster = [case for case in fitting if case["same_result"] and case["flops_per_row"] < 0.98 * now["flops_per_row"]]
    if not faster:
        return "It fits, and none of the changes that learn the same computes less."
    best = min(faster, key=lambda case: case["flops_per_row"])
    share = best["flops_per_row"] / now["flops_per_row"]
    return (
        f"It fits. To make it faster: {best['name']} ({_flags(best)}), {share:.0%} of the operations, "
        f"{best['gib']:.1f} GiB."
    )


def _flags(case: dict[str, Any]) -> str:
    return " ".join(
        f"--{name} {shlex.quote(json.dumps(value)) if isinstance(value, dict) else value}"
        for name, value in case["values"].items()
    )
