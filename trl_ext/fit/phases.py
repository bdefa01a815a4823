"""Phases of a pipeline, each with an estimate and a run: training, scoring, writing.

A phase is what is in memory at one time. Knows models, what the estimates and runs ask for, and not which pipeline a
phase belongs to. Runs nothing itself.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_ext.fit.changes import Change
from trl_ext.fit.config import Parsed, check, estimated_attention, training_step
from trl_ext.fit.rows import Sizes, scoring_batch, write_random_model
from trl_ext.fit.runs import run_scoring, run_text_training, run_training, run_writing


@dataclass
class Phase:
    """
    What is in memory at one time.

    Args:
        name (`str`), model (`str`), batch (`str`): in words. rows (`int`): of the batch.
        estimate (`Callable`, *optional*): whether on a GPU -> `Estimate`.
        run (`Callable`, *optional*): a folder, and whether to count tensors -> what was measured.
        note (`str`, *optional*): what is taken for granted, or why there is no estimate or run.
        same_as (`str`, *optional*): the name of an earlier phase that takes as much.
        attention (`str`, *optional*): `attn_implementation`. config (*optional*): of the model that has it.
        halves (`bool`): whether a batch that does not fit is run in halves.
        changes (`list[Change]`): of the config.
    """

    name: str
    model: str
    batch: str = ""
    rows: int = 1
    estimate: Callable[[bool], Any] | None = None
    run: Callable[[Path, bool], dict[str, Any]] | None = None
    note: str | None = None
    same_as: str | None = None
    attention: str | None = None
    config: Any = None
    halves: bool = False
    changes: list[Change] = field(default_factory=list)


def policy(config: Any, dtype: Any, four_bit: bool, nested: bool, peft_config: Any, attention: str | None) -> Any:
    import torch

    from trl_ext.fit.policy_estimate import Policy
    from trl_ext.models.building import as_dtype

    wanted = as_dtype(dtype)
    saved = config.dtype or torch.bfloat16  # that of the built-in shapes
    wanted = wanted if isinstance(wanted, torch.dtype) else saved
    return Policy(config, wanted, four_bit, nested, peft_config, estimated_attention(attention))


def job(loaded: Any, sampling: Any, rows: int, prompt: int, completion: int) -> Any:
    from trl_ext.fit.policy_estimate import Writing

    limit = loaded.config.get_text_config().to_dict().get("max_position_embeddings")
    if limit is not None and prompt + completion > limit:
        raise ValueError(
            f"{prompt} tokens of a prompt and {completion} new ones are more than the model's {limit} positions. "
            "Lower max_completion_length, or give --prompt_length."
        )
    if min(prompt, rows) < 1 or completion < 2:
        raise ValueError("Needed: at least 1 token of prompt, 2 of completion and 1 row.")
    drawn = {
        name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    return Writing(loaded, rows, prompt, completion, **drawn)


def writing(name: str, model: str, job: Any, sampling: Any, kwargs: dict, args: argparse.Namespace) -> Phase:
    from trl_ext.fit.policy_estimate import estimate_writing

    loads = job.policy
    sizes = Sizes(job.prompt, job.completion, 1, job.rows, _words(loads.config))

    def run(folder: Path, count: bool) -> dict[str, Any]:
        from peft import get_peft_model
        from transformers import AutoTokenizer

        from trl_ext.pipelines.generation.transformers_backend import load_policy

        path = _random(folder, "model", loads.config, loads.dtype, sizes, args, writes=True)
        loaded = load_policy(path, kwargs)
        if loads.peft_config is not None:
            loaded = get_peft_model(loaded, copy.deepcopy(loads.peft_config))
        drawn = replace(sampling, max_completion_length=sizes.completion)
        return run_writing(loaded, AutoTokenizer.from_pretrained(path), drawn, sizes, args, count)

    return Phase(
        name,
        model,
        f"{job.rows} x ({job.prompt} + {job.completion} new)",
        job.rows,
        lambda on_gpu: estimate_writing(replace(job, policy=replace(loads, on_gpu=on_gpu))),
        run,
        attention=kwargs.get("attn_implementation"),
        config=loads.config,
    )


def text_training(
    name: str, parsed: Parsed, config: Any, teacher: Any, sizes: Sizes, args: argparse.Namespace
) -> Phase:
    from transformers.training_args import OptimizerNames
    from trl import get_peft_config

    from trl_ext import WeakToStrongConfig
    from trl_ext.fit.policy_estimate import TextStep, estimate_text_step

    training, model = parsed.training, parsed.model
    check("text", parsed)
    if model.load_in_8bit:
        raise ValueError("8-bit bases are not estimated. Use load_in_4bit, or measure on the device.")
    plain = not isinstance(training, WeakToStrongConfig)
    trained = policy(
        config,
        model.dtype or "float32",
        model.load_in_4bit,
        model.use_bnb_nested_quant,
        get_peft_config(model),
        model.attn_implementation,
    )
    held = None if teacher is None else policy(teacher, trained.dtype, False, False, None, None)
    step = TextStep(
        trained,
        sizes.rows,
        sizes.prompt,
        sizes.completion,
        all_tokens=training.completion_only_loss is False,
        plain=plain,
        teacher=held,
        bf16=bool(training.bf16),
        checkpointing=training.gradient_checkpointing,
        reentrant=bool((training.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)),
        accumulates=training.gradient_accumulation_steps > 1,
        optimizer=OptimizerNames(training.optim).value,
    )
    words = min(_words(shape) for shape in (config, teacher) if shape is not None)
    sizes = replace(sizes, words=words)

    def run(folder: Path, count: bool) -> dict[str, Any]:
        path = _random(folder, "model", config, trained.dtype, sizes, args, writes=True)
        beside = (
            None if held is None else _random(folder, "teacher", held.config, held.dtype, sizes, args, writes=True)
        )
        return run_text_training(parsed, path, beside, plain, sizes, args, count)

    return Phase(
        name,
        model.model_name_or_path,
        f"{sizes.rows} x ({sizes.prompt} + {sizes.completion})",
        sizes.rows,
        lambda on_gpu: estimate_text_step(replace(step, policy=replace(trained, on_gpu=on_gpu))),
        run,
        attention=model.attn_implementation,
        config=config,
    )


def reward_training(
    name: str, command: str, parsed: Parsed, config: Any, sizes: Sizes, args: argparse.Namespace
) -> Phase:
    from trl_ext.fit.memory_estimate import estimate

    def run(folder: Path, count: bool) -> dict[str, Any]:
        dtype = training_step(command, parsed, config, sizes).dtype
        return run_training(command, parsed, _random(folder, "model", config, dtype, sizes, args), sizes, args, count)

    return Phase(
        name,
        parsed.model.model_name_or_path,
        f"{sizes.rows} x {sizes.candidates} x ({sizes.prompt} + {sizes.completion})",
        sizes.rows,
        lambda on_gpu: estimate(training_step(command, parsed, config, sizes, on_gpu)),
        run,
        attention=parsed.model.attn_implementation,
        config=config,
    )


def scoring(name: str, command: str, parsed: Parsed, config: Any, sizes: Sizes, args: argparse.Namespace) -> Phase:
    """`RewardScorer` on as many rows as it takes at a time; heads for steps and segments score padded rows."""
    from trl import get_peft_config

    from trl_ext.fit.memory_estimate import TrainingStep, estimate_scoring
    from trl_ext.models.building import as_dtype

    training, model = parsed.training, parsed.model
    scalar = command in ("reward", "orm")
    labels = 1 if scalar else training.num_labels * max(1, len(vars(training).get("categories") or []))
    batch, rows = scoring_batch(sizes, flat=scalar)
    sizes = replace(sizes, rows=rows, words=_words(config))
    base = policy(config, as_dtype(model.dtype), model.load_in_4bit, model.use_bnb_nested_quant, None, None)
    step = TrainingStep(
        config, batch, labels, not scalar, base.dtype,
        four_bit=base.four_bit, nested=base.nested, peft_config=get_peft_config(model),
    )  # fmt: skip

    def run(folder: Path, count: bool) -> dict[str, Any]:
        return run_scoring(
            parsed, _random(folder, "model", config, base.dtype, sizes, args), sizes, labels, args, count
        )

    return Phase(
        name,
        model.model_name_or_path,
        f"{sizes.rows} x {sizes.candidates} x ({sizes.prompt} + {sizes.completion})",
        sizes.rows,
        lambda on_gpu: estimate_scoring(replace(step, on_gpu=on_gpu)),
        run if scalar else None,
        halves=True,
    )


def _words(config: Any) -> int:
    return min(4096, config.get_text_config().vocab_size)


def _random(
    folder: Path, name: str, config: Any, dtype: Any, sizes: Sizes, args: argparse.Namespace, writes: bool = False
) -> Path:
    """A checkpoint with random weights, made once."""
    path = folder / name
    if not path.is_dir():
        write_random_model(path, copy.deepcopy(config), dtype, sizes.words, args.seed, writes)
    return path
