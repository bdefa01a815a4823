"""Reward functions of a run: loads them by name, checks them before anything is generated, and checks their scores.

A reward function has TRL's signature: `(prompts, completions, **columns) -> list[float | None]`. `user_functions`
imports functions that a string names. This module knows nothing of where scores are kept.
"""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import trl.rewards
from peft import PeftModel
from transformers import PreTrainedModel

from trl_ext.models.fingerprint import model_identity, tokenizer_identity
from trl_ext.pipelines.answers import check_math_verify
from trl_ext.pipelines.feedback.judge_reward import JudgeReward
from trl_ext.pipelines.feedback.judge_settings import read_judge_file
from trl_ext.pipelines.generation.records import Sample
from trl_ext.pipelines.names import (
    MODEL_FILES,
    NEED_MATH_VERIFY,
    TRL_REWARDS,
    check_model_name,
    is_function_name,
    is_judge_file,
    no_model,
)
from trl_ext.pipelines.stages.values import callable_key
from trl_ext.pipelines.user_functions import callable_name, did_you_mean, load_function
from trl_ext.scoring import RewardEnsemble, RewardScorer
from trl_ext.scoring.ensemble import load_scorer
from trl_ext.scoring.members import GIVEN
from trl_ext.scoring.remote import RemoteModel, files_of, is_served, local_files


logger = logging.getLogger(__name__)

RewardFunc = str | Path | PreTrainedModel | PeftModel | Callable[..., list[float | None]]


class RewardError(RuntimeError):
    """A reward function fails, or returns something that is not a score."""


def as_list(reward_funcs: RewardFunc | Sequence[RewardFunc]) -> list[RewardFunc]:
    """One reward function, or a list or tuple of them, as a list."""
    return list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]


def is_by_name(spec: RewardFunc) -> bool:
    """Whether another process can load the same reward function from this value."""
    return isinstance(spec, (str, Path))


def reward_name(spec: RewardFunc) -> str:
    """The name under which scores are reported: that of the function, or of the model's folder."""
    if is_function_name(spec):
        return spec.replace(":", ".").rsplit(".", 1)[-1]
    if is_judge_file(spec):
        return Path(spec).stem
    if isinstance(spec, (str, Path)):
        return Path(spec).name
    if isinstance(spec, (PreTrainedModel, PeftModel)):
        return type(spec).__name__
    return callable_name(spec)


def reward_names(specs: Sequence[RewardFunc]) -> list[str]:
    """The names of all reward functions; raises `ValueError` if two have the same name."""
    names = [reward_name(spec) for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} reward functions are called {name!r}. Give each a different name: "
                "RewardScorer(path, name=...), or another `__name__`."
            )
    return names


def weights_by_name(specs: Sequence[RewardFunc], weights: Sequence[float] | None) -> dict[str, float]:
    """The weight of each reward function, 1 by default; raises `ValueError` if the number of weights is wrong."""
    weights = [1.0] * len(specs) if weights is None else list(weights)
    if len(weights) != len(specs):
        raise ValueError(
            f"reward_weights has {len(weights)} numbers; needed: {len(specs)}, one for each reward function."
        )
    return dict(zip(reward_names(specs), weights, strict=True))


def weighted_totals(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    The weighted sum of each sample's scores; missing scores add nothing, as in TRL's GRPO.

    Args:
        scores (`np.ndarray` of shape `(M, N)`): scores of M reward functions for N samples; NaN for no score.
        weights (`np.ndarray` of shape `(M,)`): one for each reward function.

    Returns:
        `np.ndarray` of shape `(N,)`: NaN for a sample that no function scored.
    """
    absent = np.isnan(scores)
    total = np.where(absent, 0.0, scores * weights[:, None]).sum(0)
    total[absent.all(0)] = np.nan
    return total


def weighted_total(scores: dict[str, float | None], weights: dict[str, float]) -> float | None:
    """[`weighted_totals`] for one sample, with `None` for a missing score."""
    column = np.array([[math.nan if score is None else score] for score in scores.values()], dtype=np.float64)
    total = float(weighted_totals(column.reshape(len(scores), 1), np.array([weights[name] for name in scores]))[0])
    return None if math.isnan(total) else total


def load_reward(spec: RewardFunc) -> Callable[..., list[float | None]]:
    """
    Turn a reward function's name, or a model, into a callable.

    Args:
        spec (reward function): a callable, which is returned; a reward model in memory; or a string: the name of one
            of `trl.rewards` (`accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`), a function as
            `package.module.function` or `file.py:function`, the YAML file of a judge, or the folder or Hub id of a
            reward model.

    Raises:
        ValueError: the string names no function that can be imported, or the file of a judge is not valid.
        FileNotFoundError: there is no model or file of that name.
    """
    if isinstance(spec, (PreTrainedModel, PeftModel)):
        return RewardScorer(spec, name=reward_name(spec))
    if not isinstance(spec, (str, Path)):
        if not callable(spec):
            raise ValueError(f"A reward function is a callable, a model or a name, found a {type(spec).__name__}.")
        function = spec
    elif is_judge_file(spec):
        return JudgeReward.from_file(spec)
    elif not is_function_name(spec):
        return load_scorer(_folder(spec), name=reward_name(spec))
    else:
        function = getattr(trl.rewards, spec) if spec in TRL_REWARDS else load_function(spec, "reward function")
    if any(function is getattr(trl.rewards, name) for name in NEED_MATH_VERIFY):
        check_math_verify(f"The reward function {reward_name(spec)!r}", "give another reward function")
    return function


def check_rewards(specs: Sequence[RewardFunc], columns: Iterable[str] | None = None) -> None:
    """
    Check before anything is generated that every reward function can be loaded and called.

    Functions are imported. For a model the check looks at its folder (a Hub model is downloaded) and loads no weights.

    Args:
        specs (sequence of reward functions): the reward functions of the run.
        columns (iterable of `str`, *optional*): the data's columns other than `prompt`. With them the arguments are
            checked too: whether a column is missing, or a function does not accept an argument.

    Raises:
        ValueError: a function cannot be imported, needs a package that is missing, or cannot be called with the data.
        FileNotFoundError: there is no model of that name.
    """
    given = None if columns is None else {*columns, *GIVEN}
    for spec in specs:
        if is_judge_file(spec):
            read_judge_file(spec)
        elif isinstance(spec, (str, Path)) and not is_function_name(spec):
            _folder(spec)
        elif not isinstance(spec, (PreTrainedModel, PeftModel)):
            function = load_reward(spec)
            if given is not None:
                _check_call(function, reward_name(spec), given)


def _check_call(function: Callable[..., Any], name: str, given: set[str]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # functions written in C may have no signature
        return
    named = {item.name for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    needed = {item.name for item in parameters if item.name in named and item.default is item.empty}
    for column in sorted(needed - given):
        known = sorted(given - {*GIVEN})
        raise ValueError(
            f"The reward function {name!r} needs the argument {column!r}, and the data has no such column."
            f"{did_you_mean(column, known)} Found: {', '.join(['prompt', *known])}."
        )
    if not any(item.kind == item.VAR_KEYWORD for item in parameters) and given - named:
        raise ValueError(
            f"The reward function {name!r} does not accept the arguments {sorted(given - named)}, which every reward "
            "function gets. Add **kwargs to its parameters."
        )


def _folder(spec: str | Path) -> str:
    """The local folder of a reward model; raises an error if it holds none."""
    if not is_served(spec):
        check_model_name(spec)
    folder = local_files(spec)
    if not any(Path(folder, name).is_file() for name in MODEL_FILES):
        raise FileNotFoundError(no_model(spec))
    return folder if not is_served(spec) and Path(spec).is_dir() else str(spec)


def reward_identity(spec: RewardFunc) -> dict[str, Any] | None:
    """
    The entries of a manifest for a reward function: everything known that its scores depend on.

    For a model this is its content, and for a scorer also its settings. For other callables see
    [`~trl_ext.pipelines.stages.values.callable_key`].

    Returns:
        `dict`, or `None` for an ensemble in memory, because a later run cannot use its scores again.
    """
    name = reward_name(spec)
    if isinstance(spec, str) and spec in TRL_REWARDS:
        return {"name": name, "trl": metadata.version("trl")}
    if is_judge_file(spec) or isinstance(spec, JudgeReward):
        return {"name": name, **load_reward(spec).identity()}
    if isinstance(spec, (str, Path)) and not is_function_name(spec):
        return {"name": name, "model": model_identity(files_of(_folder(spec)))}
    if isinstance(spec, (PreTrainedModel, PeftModel)):
        return {"name": name, "model": model_identity(spec)}
    if isinstance(spec, RewardScorer):
        choices = {choice: callable_key(value) if callable(value) else value for choice, value in spec.choices.items()}
        tokenizer = tokenizer_identity(spec.processing_class)
        what = spec.model.folder if isinstance(spec.model, RemoteModel) else spec.model
        model = {"model": model_identity(what), "tokenizer": tokenizer, "normalizer": spec.normalizer}
        return {"name": name, **model, **choices, **_scale_identity(spec)}
    function = load_reward(spec)
    if isinstance(function, RewardScorer):  # made in a file of the user
        return {**reward_identity(function), "name": name}
    return None if isinstance(function, RewardEnsemble) else {"name": name, **callable_key(function)}


def identity_in_run(spec: RewardFunc) -> dict[str, Any]:
    """[`reward_identity`]. An ensemble in memory has an entry that no other run has, and a warning is logged."""
    identity = reward_identity(spec)
    if identity is None:
        name = reward_name(spec)
        logger.warning(
            f"{name} is an ensemble in memory, so a rerun cannot use its scores. Save it, and give its path."
        )
        identity = {"name": name, "run": time.time_ns()}
    return identity


def warn_of_unseen(identity: dict[str, Any], reused: str, fix: str) -> None:
    """
    Log a warning if a result is used again whose function reads values that cannot be compared.

    Args:
        identity (`dict`): the function's [`reward_identity`].
        reused (`str`): what is used again, with its verb: `"The stored scores are"`.
        fix (`str`): what to do if the values changed.
    """
    if identity.get("unseen"):
        read = ", ".join(f"{variable} ({kind})" for variable, kind in identity["unseen"].items())
        logger.warning(
            f"{reused} used again. The function reads {read}, whose content cannot be compared. If that content "
            f"changed, {fix}."
        )


def reward_setting(spec: RewardFunc, earlier: Path | None) -> dict[str, Any] | str:
    """
    The [`reward_identity`] of a reward function, or the name of an ensemble in memory.

    Args:
        spec (reward function): the reward function.
        earlier (`Path`, *optional*): folder of results that a run goes on with; a warning says if they may be of
            another function.
    """
    name, identity = reward_name(spec), reward_identity(spec)
    if earlier is not None:
        if identity is None:
            logger.warning(
                f"The results in {earlier} go on with {name}, an ensemble in memory, whose content cannot be "
                "compared. If it changed, start over. A saved ensemble, given by its path, is compared."
            )
        else:
            warn_of_unseen(identity, f"The results of {name} in {earlier} are", "start over")
    return identity or name


def _scale_identity(scorer: RewardScorer) -> dict[str, Any]:
    """What else a scorer does to its scores: calibrate them, compare with a reference, subtract deviations."""
    found: dict[str, Any] = {}
    if scorer.calibrated:
        found["calibration"] = scorer.calibration
    if scorer.reference is not None:
        found["reference"] = scorer.reference
    if scorer.std_coefficient:
        found |= {"std_coefficient": scorer.std_coefficient, "posterior": scorer.posterior.digest()}
    return found


def call_reward(function: Callable[..., Any], name: str, samples: Sequence[Sample]) -> list[float | None]:
    """
    Score samples with the arguments that TRL's trainers pass.

    Raises:
        [`RewardError`]: the function raises an error, returns a wrong number of scores, or returns a score that is not
            finite.
    """
    names = dict.fromkeys(name for sample in samples for name in sample.columns if name not in GIVEN)
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
            scores = _awaited(scores)
        scores = list(scores)
    except Exception as error:  # a user's function may raise anything
        raise RewardError(
            f"The reward function {name!r} raised {type(error).__name__}: {error}. Repair the function, "
            "and run the same again; scores that were stored are kept."
        ) from error
    if len(scores) != len(samples):
        raise RewardError(
            f"The reward function {name!r} gave {len(scores)} scores for {len(samples)} completions; needed: one "
            "score for each completion, in order, or None for one that it cannot score."
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
        f"{sample.prompt_id}; needed: a finite number, or None if it cannot score the completion. Scores that were "
        "stored are kept."
    )


def _awaited(scores: Any) -> Any:
    """The result of an asynchronous function, also where an event loop runs already, as in a notebook."""

    async def wait() -> Any:
        return await scores

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(wait())).result()


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Replaces a trainer's logging functions, and does nothing."""


def with_tokenizers(reward_funcs: RewardFunc | Sequence[RewardFunc], tokenizers: Any) -> list[RewardFunc]:
    """The reward functions, with a scorer in place of each model that has a tokenizer."""
    rewards = as_list(reward_funcs)
    given = [None] * len(rewards) if tokenizers is None else as_list(tokenizers)
    if len(given) != len(rewards):
        raise ValueError(f"Found {len(given)} reward_processing_classes for {len(rewards)} reward functions.")
    return [
        reward if tokenizer is None or callable(reward) and not isinstance(reward, (PreTrainedModel, PeftModel))
        else RewardScorer(reward, processing_class=tokenizer)
        for reward, tokenizer in zip(rewards, given, strict=True)
    ]  # fmt: skip
