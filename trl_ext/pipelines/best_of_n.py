"""The best of n completions at inference: sample, score, and pick by score or by a vote of answers.

This module keeps nothing on disk; `rejection_sampling` is for runs that must survive a crash. It knows generators and
reward functions, and not how either of them works.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from trl_ext.logs import follow_transformers
from trl_ext.metrics.voting import majority_vote, weighted_vote
from trl_ext.pipelines.answers import CANONICALISERS, Canonicaliser, load_answers
from trl_ext.pipelines.generation.backends import make_generator
from trl_ext.pipelines.generation.generator import Generator
from trl_ext.pipelines.generation.records import Sample, prompt_id, prompt_of, text_of
from trl_ext.pipelines.generation.sampling import Backend, Sampling
from trl_ext.pipelines.reward_functions import (
    RewardFunc,
    as_list,
    call_reward,
    check_rewards,
    load_reward,
    weighted_total,
    weights_by_name,
)


logger = logging.getLogger(__name__)

Vote = Literal["majority", "weighted", "softmax"]
VOTES = ("majority", "weighted", "softmax")


@dataclass(slots=True)
class Best:
    """
    The pick for one prompt.

    Args:
        prompt (`str` or `list[dict]`): the prompt. If a chat ended with a begun answer, the prompt ends before it and
            the completion holds the whole answer.
        completion (`str` or `list[dict]`): the picked completion; one assistant message after a chat prompt.
        score (`float`, *optional*): its score; `None` if no candidate could be scored: the pick is then the first.
        sample_index (`int`): index of the pick among the candidates.
        answer (*optional*): with a vote, the answer that won; `None` if no candidate had one.
        candidates (`list[Sample]`, *optional*): all candidates with a score from each function, if
            `return_candidates=True`.
    """

    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]
    score: float | None
    sample_index: int
    answer: Any = None
    candidates: list[Sample] | None = None


class Picker:
    """
    [`best_of_n`] with models that stay loaded from call to call. The arguments are the same.

    Example:

    ```python
    picker = Picker("Qwen/Qwen3-0.6B", "outputs/reward", n=16)
    picker(["2 + 2?"], seed=0)[0].completion
    ```
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        n: int = 16,
        *,
        reward_weights: list[float] | None = None,
        vote: Vote | None = None,
        answers: str | Canonicaliser = "math",
        return_candidates: bool = False,
        backend: Backend = "transformers",
        processing_class: PreTrainedTokenizerBase | None = None,
        backend_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ):
        follow_transformers()
        if n < 1:
            raise ValueError(f"n={n}; needed: 1 or more completions.")
        if vote is not None and vote not in VOTES:
            raise ValueError(f"vote={vote!r}; needed: None (the best score) or one of {', '.join(VOTES)}.")
        if isinstance(answers, str) and answers not in CANONICALISERS:
            raise ValueError(f"answers={answers!r}; needed: a function or one of {', '.join(CANONICALISERS)}.")
        settings = Sampling.of(**sampling)
        if settings.temperature == 0 and n > 1:
            raise ValueError(f"temperature=0 gives the same completion {n} times; needed: a value above 0, or n=1.")
        self._canonicalise = None if vote is None else load_answers(answers)
        self._n = n
        self._vote = vote
        self._return_candidates = return_candidates
        self._rewards = Rewards(as_list(reward_funcs), reward_weights)
        self._generator = make_generator(
            model, backend, settings, processing_class=processing_class, **(backend_kwargs or {})
        )

    def __call__(self, prompts: Sequence[Any], seed: int = 0) -> list[Best]:
        """Return the pick for each prompt (texts, chats, or rows with a `prompt`), in their order."""
        groups = draw_candidates(self._generator, self._rewards, as_rows(prompts), self._n, seed)
        best = [self._pick(samples) for samples in groups]
        missing = sum(pick.score is None for pick in best)
        if missing:
            logger.warning(
                f"{missing} of {len(best)} prompts have no candidate with a score: their first candidate is returned."
            )
        return best

    def _pick(self, samples: list[Sample]) -> Best:
        answer, eligible = None, samples
        if self._vote is not None:
            answers = self._canonicalise([text_of(sample.completion) for sample in samples])
            answer = self._elect(answers, [sample.score for sample in samples])
            if answer is not None:
                eligible = [sample for sample, found in zip(samples, answers, strict=True) if found == answer]
        # among equal scores `max` returns the first
        best = max(eligible, key=lambda sample: -math.inf if sample.score is None else sample.score)
        candidates = samples if self._return_candidates else None
        return Best(best.prompt, best.completion, best.score, best.sample_index, answer, candidates)

    def _elect(self, answers: list[Any], scores: list[float | None]) -> Any:
        if self._vote == "majority":
            return majority_vote(answers)
        if self._vote == "softmax":
            top = max((score for score in scores if score is not None), default=0.0)
            scores = [None if score is None else math.exp(score - top) for score in scores]
        return weighted_vote(answers, scores)


def best_of_n(
    model: Any,
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    prompts: Sequence[Any],
    n: int = 16,
    *,
    reward_weights: list[float] | None = None,
    vote: Vote | None = None,
    answers: str | Canonicaliser = "math",
    return_candidates: bool = False,
    seed: int = 0,
    backend: Backend = "transformers",
    processing_class: PreTrainedTokenizerBase | None = None,
    backend_kwargs: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> list[Best]:
    """
    Sample `n` completions of each prompt and return the one with the highest score.

    Among equal scores the first sample wins. With `vote`, the answers are counted, and the completion with the best
    score among those with the winning answer is returned. Reward functions, answers and columns are checked before
    anything is generated.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            The policy: folder or Hub id, full model or adapter, or a model in memory.
        reward_funcs (reward function, or list or tuple of them):
            As in TRL's trainers: functions, models, or folders or Hub ids of reward models; by name also
            `package.module.function` and `file.py:function`. The scores are summed.
        prompts (`Sequence`):
            Texts, chats (lists of messages), or rows `{"prompt": ..., ...}` (a `Dataset`) whose other columns go to
            the reward functions. A chat may end with a begun answer, which the policy continues.
        n (`int`, *optional*, defaults to `16`):
            Completions of each prompt.
        reward_weights (`list[float]`, *optional*):
            A weight for each reward function. All 1 by default.
        vote (`str`, *optional*):
            `"majority"`: the most frequent answer wins. `"weighted"`: the answer with the largest sum of scores wins;
            scores must not be negative (a verifier's probabilities). `"softmax"`: the same with the softmax of the
            scores. By default there is no vote.
        answers (`str` or `Callable`, *optional*, defaults to `"math"`):
            How a vote reads answers: `"math"` (needs math-verify, the extra `math`), `"number"` (the last number),
            `"line"` (the last line), or a function from the completions of a prompt to their answers, `None` for none.
        return_candidates (`bool`, *optional*, defaults to `False`):
            Whether to return all completions too.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        backend, processing_class, backend_kwargs:
            See [`~trl_ext.pipelines.generation.backends.make_generator`], which receives them.
        sampling:
            GRPO's names: `max_completion_length`, `temperature`, `top_p`, `top_k`, `min_p`, ...; see
            [`~trl_ext.pipelines.generation.sampling.Sampling`].

    Returns:
        `list[Best]`: one for each prompt, in their order.

    Raises:
        ValueError, TypeError: an argument is out of its range, or a reward function cannot be loaded or called.
        [`DataError`]: a prompt cannot be used; names its row.
        [`GenerationError`], [`RewardError`]: the backend or a reward function fails.

    Example:

    ```python
    >>> picks = best_of_n("Qwen/Qwen3-0.6B", "outputs/reward", ["2 + 2?"], n=4, max_completion_length=64)
    >>> picks[0].completion, picks[0].score
    ('4', 1.7)
    ```
    """
    picker = Picker(
        model,
        reward_funcs,
        n,
        reward_weights=reward_weights,
        vote=vote,
        answers=answers,
        return_candidates=return_candidates,
        backend=backend,
        processing_class=processing_class,
        backend_kwargs=backend_kwargs,
        **sampling,
    )
    return picker(prompts, seed)


class Rewards:
    """Reward functions with their names and weights, loaded and ready to be called on samples."""

    def __init__(self, specs: Sequence[RewardFunc], weights: Sequence[float] | None = None):
        if not specs:
            raise ValueError("There is no reward function; needed: at least one.")
        self._weights = weights_by_name(specs, weights)
        check_rewards(specs)  # all of them before the first model is loaded
        self._functions = dict(zip(self._weights, map(load_reward, specs), strict=True))

    def check(self, columns: Iterable[str]) -> None:
        """Raise `ValueError` if a function cannot be called with data of these columns."""
        check_rewards(list(self._functions.values()), columns)

    def __call__(self, samples: Sequence[Sample]) -> None:
        """Fill in `scores` and `score` of each sample."""
        if not samples:
            return
        by_name = {name: call_reward(function, name, samples) for name, function in self._functions.items()}
        for place, sample in enumerate(samples):
            sample.scores = {name: scores[place] for name, scores in by_name.items()}
            sample.score = weighted_total(sample.scores, self._weights)


def as_rows(prompts: Iterable[Any]) -> list[dict[str, Any]]:
    """
    Turn texts or lists of messages into rows with a `prompt`; rows with a `prompt` and other columns stay as they are.

    Raises:
        ValueError: there are no prompts, or `prompts` is one prompt instead of a list. [`DataError`]: a prompt is
            missing or cannot be used; names its row.
    """
    if isinstance(prompts, (str, Mapping)) or hasattr(prompts, "columns"):  # a DataFrame iterates over column names
        raise ValueError(
            f"prompts is a {type(prompts).__name__}; needed: a list of texts, of chats or of rows, or a Dataset (for "
            "a DataFrame Dataset.from_pandas(frame))."
        )
    rows = [dict(item) if isinstance(item, Mapping) else {"prompt": item} for item in prompts]
    if not rows:
        raise ValueError("There are no prompts; needed: at least one.")
    return [{**item, "prompt": prompt_of(item, row)} for row, item in enumerate(rows)]


def draw_candidates(
    generator: Generator, rewards: Rewards, rows: Sequence[dict[str, Any]], n: int, seed: int
) -> list[list[Sample]]:
    """`n` scored samples of each row's prompt, in the order of the rows."""
    prompts = [row["prompt"] for row in rows]
    columns = [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
    rewards.check({name for item in columns for name in item})
    generated = generator.generate(prompts, n, seed, columns)
    groups = [
        [Sample.of(prompt_id(prompt, item), index, prompt, item, one) for index, one in enumerate(completions)]
        for prompt, item, completions in zip(prompts, columns, generated, strict=True)
    ]
    rewards([sample for samples in groups for sample in samples])
    return groups
