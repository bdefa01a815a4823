"""Reward functions of a run: what a name stands for, what makes two of them the same, and calling one with checks.

A reward function is TRL's: `(prompts, completions, **columns) -> list[float | None]`. Knows nothing of files.
"""

import asyncio
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import trl.rewards
from peft import PeftModel
from transformers import PreTrainedModel

from trl_ext.models.fingerprint import model_identity, tokenizer_identity
from trl_ext.pipelines.generation.records import Sample
from trl_ext.pipelines.stages.callables import callable_identity
from trl_ext.scoring import RewardEnsemble, RewardScorer
from trl_ext.scoring.ensemble import load_scorer


RewardFunc = str | Path | PreTrainedModel | PeftModel | Callable[..., list[float | None]]

TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


class RewardError(RuntimeError):
    """A reward function fails or gives something that is no score."""


def is_by_name(spec: RewardFunc) -> bool:
    """Whether another process can make the same reward function of it."""
    return isinstance(spec, (str, Path))


def _is_dotted(spec: str) -> bool:
    return "." in spec and "/" not in spec and all(part.isidentifier() for part in spec.split("."))


def reward_name(spec: RewardFunc) -> str:
    """The name of its scores: that of the function, or of the model's folder."""
    if isinstance(spec, str) and (spec in TRL_REWARDS or (_is_dotted(spec) and not Path(spec).exists())):
        return spec.rsplit(".", 1)[-1]
    if isinstance(spec, (str, Path)):
        return Path(spec).name
    if isinstance(spec, (PreTrainedModel, PeftModel)):
        return type(spec).__name__
    name = getattr(spec, "__name__", None)  # where TRL looks for it
    return name if isinstance(name, str) else type(spec).__name__


def reward_names(specs: Sequence[RewardFunc]) -> list[str]:
    """The names of all; refuses two with one name."""
    names = [reward_name(spec) for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} reward functions are called {name!r}. Give each a name of its own: "
                "RewardScorer(path, name=...), or another `__name__`."
            )
    return names


def load_reward(spec: RewardFunc) -> Callable[..., list[float | None]]:
    """
    The callable that a name or model stands for.

    A string is one of `trl.rewards` (`accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`), a dotted
    path to a function of yours, as in TRL's scripts, or a folder or Hub id of a reward model.

    Raises:
        `ValueError`: a dotted path leads to no function.
    """
    if isinstance(spec, (PreTrainedModel, PeftModel)):
        return RewardScorer(spec, name=reward_name(spec))
    if not isinstance(spec, (str, Path)):
        if not callable(spec):
            raise ValueError(f"A reward function is a callable, a model or a name, found a {type(spec).__name__}.")
        return spec
    if spec in TRL_REWARDS:
        return getattr(trl.rewards, spec)
    if isinstance(spec, str) and _is_dotted(spec) and not Path(spec).exists():
        module, _, name = spec.rpartition(".")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"The reward function {spec!r} cannot be imported ({error}). Give the dotted path of a function that "
                f"is importable from {os.getcwd()}, or the folder of a reward model."
            ) from error
    return load_scorer(spec, name=reward_name(spec))


def reward_identity(spec: RewardFunc) -> dict[str, Any] | None:
    """
    What its scores depend on, as far as can be known: the content of a model, and of a scorer its choices; of anything
    else that is called see [`~trl_ext.pipelines.stages.callables.callable_identity`].

    Returns:
        `dict`, or `None` for an ensemble in memory, which is not known: its scores are never used again.
    """
    name = reward_name(spec)
    if isinstance(spec, str) and spec in TRL_REWARDS:
        return {"name": name, "trl": metadata.version("trl")}
    if isinstance(spec, (str, Path)) and not (_is_dotted(str(spec)) and not Path(spec).exists()):
        return {"name": name, "model": model_identity(spec)}
    if isinstance(spec, (PreTrainedModel, PeftModel)):
        return {"name": name, "model": model_identity(spec)}
    if isinstance(spec, RewardScorer):
        choices = {
            choice: callable_identity(value) if callable(value) else value for choice, value in spec.choices.items()
        }
        tokenizer = tokenizer_identity(spec.processing_class)
        model = {"model": model_identity(spec.model), "tokenizer": tokenizer, "normalizer": spec.normalizer}
        return {"name": name, **model, **choices}
    function = load_reward(spec)
    return None if isinstance(function, RewardEnsemble) else {"name": name, **callable_identity(function)}


def call_reward(function: Callable[..., Any], name: str, samples: Sequence[Sample]) -> list[float | None]:
    """
    The scores of samples, with the arguments that TRL's trainers give.

    Raises:
        [`RewardError`]: the function raises, or gives a wrong number of scores, or one that is not finite.
    """
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    columns: dict[str, Any] = {name: [sample.columns.get(name) for sample in samples] for name in names}
    columns |= {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
    if all(sample.token_ids is not None for sample in samples):
        columns["completion_ids"] = [sample.token_ids for sample in samples]
    try:
        scores = function(
            prompts=[sample.prompt for sample in samples],
            completions=[sample.completion for sample in samples],
            **columns,
        )
        if inspect.isawaitable(scores):
            scores = asyncio.run(_wait_for(scores))
        scores = list(scores)
    except Exception as error:  # whatever a user's function raises
        raise RewardError(
            f"The reward function {name!r} raised {type(error).__name__}: {error}. Scores of finished shards are "
            "kept: repair it, and run the same again."
        ) from error
    if len(scores) != len(samples):
        raise RewardError(
            f"The reward function {name!r} gave {len(scores)} scores for {len(samples)} completions. It must give one "
            "each, in their order; None for what it cannot score."
        )
    return [_checked(score, name, sample) for score, sample in zip(scores, samples, strict=True)]


def _checked(score: Any, name: str, sample: Sample) -> float | None:
    if score is None:
        return None
    try:
        value = float(score)
    except (TypeError, ValueError) as error:
        raise RewardError(_wrong(f"a {type(score).__name__}", name, sample)) from error
    if not math.isfinite(value):
        raise RewardError(_wrong(str(value), name, sample))
    return value


def _wrong(found: str, name: str, sample: Sample) -> str:
    return (
        f"The reward function {name!r} gave {found} for completion {sample.sample_index} of the prompt "
        f"{sample.prompt_id}; needed: a finite number, or None for what it cannot score. Scores of finished shards "
        "are kept."
    )


async def _wait_for(scores: Any) -> Any:
    return await scores


def _ignore(*args: Any, **kwargs: Any) -> None:
    """In place of a trainer's logging."""


def weighted_total(scores: dict[str, float | None], weights: dict[str, float]) -> float | None:
    """The weighted sum of the scores that are there, as in TRL's GRPO; `None` where there is none."""
    given = [weights[name] * score for name, score in scores.items() if score is not None]
    return sum(given) if given else None


def with_tokenizers(reward_funcs: RewardFunc | list[RewardFunc], tokenizers: Any) -> list[RewardFunc]:
    """The reward functions, with a scorer in place of a model that comes with a tokenizer."""
    rewards = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    given = tokenizers if isinstance(tokenizers, (list, tuple)) else [tokenizers]
    given = [None] * len(rewards) if tokenizers is None else list(given)
    if len(given) != len(rewards):
        raise ValueError(f"Found {len(given)} reward_processing_classes for {len(rewards)} reward functions.")
    return [
        reward if tokenizer is None or callable(reward) and not isinstance(reward, (PreTrainedModel, PeftModel))
        else RewardScorer(reward, processing_class=tokenizer)
        for reward, tokenizer in zip(rewards, given, strict=True)
    ]  # fmt: skip
