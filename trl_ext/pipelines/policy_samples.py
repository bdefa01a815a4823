"""Samples of a policy for an evaluation: a few prompts of a data set, several completions of each, kept in one file.

A rerun with the same policy, prompts and settings reads the file, or goes on where it ended. This module knows
generators and files of rows. It does not know what is done with the samples.
"""

import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_ext.pipelines.generation.backends import make_generator, model_of_backend
from trl_ext.pipelines.generation.records import Sample, ends_with_begun_answer, prompt_id, with_completion
from trl_ext.pipelines.generation.sampling import Backend, Sampling
from trl_ext.pipelines.stages.row_file import RowFile


logger = logging.getLogger(__name__)

CHUNK = 16  # prompts that are completed at a time with a seed of their own, and what an interruption costs


def draw_prompts(prompts: Iterable[Any], number: int, seed: int = 0) -> list[Any]:
    """
    Draw different prompts at random.

    Args:
        prompts (iterable of `str`, lists of messages or `None`): those of the rows; `None` is passed over.
        number (`int`): how many to draw; all where there are fewer.
        seed (`int`, *optional*, defaults to `0`): of the draw.

    Raises:
        `ValueError`: no row has a prompt.
    """
    different = {json.dumps(prompt, sort_keys=True): prompt for prompt in prompts if prompt}
    if not different:
        raise ValueError("No row has a prompt for the policy to answer; needed: a column `prompt`.")
    found = list(different.values())
    return random.Random(seed).sample(found, min(number, len(found)))


def policy_samples(
    policy: Any,
    prompts: Sequence[Any],
    output: str | Path,
    num_generations: int = 8,
    *,
    seed: int = 0,
    backend: Backend = "transformers",
    backend_kwargs: dict[str, Any] | None = None,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """
    Complete each prompt several times.

    Args:
        policy: as `model` of [`~trl_ext.best_of_n`].
        prompts (sequence of `str` or lists of messages): what it answers.
        output (`str` or `Path`): JSONL file of the samples, which a rerun continues.
        num_generations (`int`, *optional*, defaults to `8`): completions of each prompt, at least 2.
        seed, backend, backend_kwargs, **sampling: as for [`~trl_ext.best_of_n`].

    Returns:
        `list[dict]`: a row with `prompt` and `completions` for each prompt, in their order. A begun answer is part of
        the completions (see [`~trl_ext.pipelines.generation.records.with_completion`]).

    Raises:
        `ValueError`: fewer than two completions, or a temperature of 0, which gives all of them the same text.
        [`StaleError`]: the file was made by another policy, from other prompts, or with other settings.
    """
    settings = Sampling.of(**sampling)
    if num_generations < 2:
        raise ValueError(f"num_generations={num_generations}; needed: 2 or more, to compare samples of a prompt.")
    if settings.temperature == 0:
        raise ValueError("temperature=0 gives all samples of a prompt the same text; needed: above 0.")
    kwargs = dict(backend_kwargs or {})
    manifest = {
        "policy": model_of_backend(
            policy, backend, kwargs.get("model_init_kwargs") or {}, kwargs.get("processing_class")
        ),
        "num_generations": num_generations,
        "seed": seed,
        "backend": backend,
        "sampling": asdict(settings),
    }
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = RowFile(path, manifest, ("completions", "finish_reasons"), block=CHUNK)
    rows = [_row(prompt) for prompt in prompts]
    done = file.resume(enumerate(rows, start=1), "the prompts", total=len(rows))
    if done < len(rows):
        generator = make_generator(policy, backend, settings, **kwargs)
        for first in range(done, len(rows), CHUNK):
            chunk = prompts[first : first + CHUNK]
            generated = generator.generate(chunk, num_generations, seed + first)
            file.append(_row(prompt) | _answers(prompt, own) for prompt, own in zip(chunk, generated, strict=True))
            logger.info(f"{first + len(chunk)} of {len(rows)} prompts are answered.")
    with open(path, encoding="utf-8") as lines:
        return [{name: row[name] for name in ("prompt", "completions")} for row in map(json.loads, lines)]


def _row(prompt: Any) -> dict[str, Any]:
    """The columns of a row that say what is answered."""
    begun = {"begun_answer": prompt[-1]} if ends_with_begun_answer(prompt) else {}
    return {"prompt": with_completion(prompt, "")[0]} | begun


def _answers(prompt: Any, generated: Sequence[Any]) -> dict[str, Any]:
    """The columns of a row that are sampled."""
    name = prompt_id(prompt, {})
    samples = [Sample.of(name, index, prompt, {}, one) for index, one in enumerate(generated)]
    return {
        "completions": [sample.completion for sample in samples],
        "finish_reasons": [sample.finish_reason for sample in samples],
    }
