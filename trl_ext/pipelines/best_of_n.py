"""The best of n completions at inference: draw, score, and pick by score or by a vote of answers.

Nothing is kept on disk; `rejection_sampling` is for runs that must survive a crash. Knows generators and reward
functions.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from trl_ext.data.validation import RowChecks
from trl_ext.metrics.voting import majority_vote, weighted_vote
from trl_ext.pipelines.answers import CANONICALISERS, Canonicaliser
from trl_ext.pipelines.generation.backends import make_generator
from trl_ext.pipelines.generation.records import Sample, prompt_id, text_of
from trl_ext.pipelines.generation.sampling import Backend, Generator, Sampling
from trl_ext.pipelines.reward_functions import RewardFunc, call_reward, load_reward, reward_names, weighted_total


logger = logging.getLogger(__name__)

Vote = Literal["majority", "weighted", "softmax"]
VOTES = ("majority", "weighted", "softmax")


@dataclass(slots=True)
class Best:
    """
    The pick for one prompt.

    Args:
        prompt (`str` or `list[dict]`): the prompt.
        completion (`str` or `list[dict]`): the picked completion; one assistant message after a chat prompt.
        score (`float`, *optional*): its score; `None` if no candidate could be scored, and the first is given.
        sample_index (`int`): which of the candidates it is.
        answer (*optional*): with a vote, the answer that won; `None` if no candidate had one.
        candidates (`list[Sample]`, *optional*): all of them, if asked for, with a score from each function.
    """

    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]
    score: float | None
    sample_index: int
    answer: Any = None
    candidates: list[Sample] | None = None


class Picker:
    """
    What [`best_of_n`] does, with models that stay loaded from call to call. The arguments are the same.

    Example:

    ```python
    picker = Picker("Qwen/Qwen3-0.6B", "outputs/reward", n=16)
    picker(["2 + 2?"], seed=0)[0].completion
    ```
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunc | list[RewardFunc],
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
        if n < 1:
            raise ValueError(f"n={n}; needed: 1 or more completions.")
        if vote is not None and vote not in VOTES:
            raise ValueError(f"vote={vote!r}; needed: None (the best score) or one of {', '.join(VOTES)}.")
        if isinstance(answers, str) and answers not in CANONICALISERS:
            raise ValueError(f"answers={answers!r}; needed: a function or one of {', '.join(CANONICALISERS)}.")
        specs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self._rewards = Rewards(specs, reward_weights)
        self._n = n
        self._vote = vote
        self._canonicalise = CANONICALISERS[answers] if isinstance(answers, str) else answers
        self._return_candidates = return_candidates
        settings = Sampling.of(**sampling)
        if settings.temperature == 0 and n > 1:
            raise ValueError(f"temperature=0 gives the same completion {n} times; needed: above 0, or n=1.")
        self._generator = make_generator(
            model, backend, settings, processing_class=processing_class, **(backend_kwargs or {})
        )

    def __call__(self, prompts: Sequence[Any], seed: int = 0) -> list[Best]:
        """The pick for each prompt (texts, messages, or rows with a `prompt`), in their order."""
        groups = draw_candidates(self._generator, self._rewards, as_rows(prompts), self._n, seed)
        best = [self._pick(samples) for samples in groups]
        missing = sum(pick.score is None for pick in best)
        if missing:
            logger.warning(f"{missing} of {len(best)} prompts have no candidate with a score: the first is given.")
        return best

    def _pick(self, samples: list[Sample]) -> Best:
        answer, eligible = None, samples
        if self._vote is not None:
            given = self._canonicalise([text_of(sample.completion) for sample in samples])
            answer = self._elect(given, [sample.score for sample in samples])
            if answer is not None:
                eligible = [sample for sample, its in zip(samples, given, strict=True) if its == answer]
        # of equals the first
        best = max(eligible, key=lambda sample: -math.inf if sample.score is None else sample.score)
        candidates = samples if self._return_candidates else None
        return Best(best.prompt, best.completion, best.score, best.sample_index, answer, candidates)

    def _elect(self, given: list[Any], scores: list[float | None]) -> Any:
        if self._vote == "majority":
            return majority_vote(given)
        if self._vote == "softmax":
            top = max((score for score in scores if score is not None), default=0.0)
            scores = [None if score is None else math.exp(score - top) for score in scores]
        return weighted_vote(given, scores)


def best_of_n(
    model: Any,
    reward_funcs: RewardFunc | list[RewardFunc],
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
    Draw `n` completions of each prompt and give the one with the highest score.

    Among equal scores the one that was drawn first is given. With `vote`, the answers are counted and the best-scored
    completion with the winning answer is given.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`):
            What completes: folder or Hub id, full or adapter, or a model in memory.
        reward_funcs (reward function or `list` of them):
            As TRL's trainers take them: functions, models, or folders or ids of reward models. Scores are added up.
        prompts (`Sequence`):
            Texts, lists of messages, or rows `{"prompt": ..., ...}` (a `Dataset`) whose other columns the reward
            functions get.
        n (`int`, *optional*, defaults to `16`):
            Completions of each prompt.
        reward_weights (`list[float]`, *optional*):
            A weight for each reward function. All 1 by default.
        vote (`str`, *optional*):
            `"majority"`: the answer given most often. `"weighted"`: the largest sum of scores, which must not be
            negative (a verifier's probabilities). `"softmax"`: the same with the softmax of the scores. By default
            there is no vote.
        answers (`str` or `Callable`, *optional*, defaults to `"math"`):
            How a vote reads answers: `"math"` (needs math-verify), `"number"` (the last one), `"line"` (the last
            one), or a function from the completions of a prompt to their answers, `None` for none.
        return_candidates (`bool`, *optional*, defaults to `False`):
            Give all completions too.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        backend, processing_class, backend_kwargs:
            See [`~trl_ext.pipelines.generation.backends.make_generator`], which gets them all.
        sampling:
            GRPO's names: `max_completion_length`, `temperature`, `top_p`, `top_k`, `min_p`, ...; see
            [`~trl_ext.pipelines.generation.sampling.Sampling`].

    Returns:
        `list[Best]`: one for each prompt, in their order.

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
    """Reward functions with their names and weights, ready to be called on samples."""

    def __init__(self, specs: Sequence[RewardFunc], weights: Sequence[float] | None = None):
        if not specs:
            raise ValueError("There is no reward function; needed: at least one.")
        if weights is not None and len(weights) != len(specs):
            raise ValueError(
                f"Found {len(weights)} reward_weights for {len(specs)} reward functions; needed: as many."
            )
        self._functions: dict[str, Callable] = dict(zip(reward_names(specs), map(load_reward, specs), strict=True))
        self._weights = dict(zip(self._functions, weights or [1.0] * len(specs), strict=True))

    def __call__(self, samples: Sequence[Sample]) -> None:
        """Fill in `scores` and `score` of each sample."""
        if not samples:
            return
        by_name = {name: call_reward(function, name, samples) for name, function in self._functions.items()}
        for place, sample in enumerate(samples):
            sample.scores = {name: scores[place] for name, scores in by_name.items()}
            sample.score = weighted_total(sample.scores, self._weights)


def as_rows(prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """
    Rows with a `prompt` of what may be texts, lists of messages or such rows.

    Raises:
        [`DataError`]: there is none, or a prompt is missing or empty; names its row.
    """
    rows = [dict(item) if isinstance(item, Mapping) else {"prompt": item} for item in prompts]
    if not rows:
        raise ValueError("There are no prompts; needed: at least one.")
    for row, item in enumerate(rows):
        checks = RowChecks(row, "prompt")
        if "prompt" not in item:
            raise checks.error("prompt", f"the columns {sorted(item)}", "a column 'prompt'", "Rename or add it.")
        if checks.prompt(item["prompt"]) is None:
            raise checks.error("prompt", "an empty prompt", "a text or messages", "Remove it.")
    return rows


def draw_candidates(
    generator: Generator, rewards: Rewards, rows: Sequence[dict[str, Any]], n: int, seed: int
) -> list[list[Sample]]:
    """`n` scored samples of each row's prompt, in the order of the rows."""
    prompts = [row["prompt"] for row in rows]
    columns = [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
    drawn = generator.generate(prompts, n, seed, columns)
    groups = []
    for prompt, own, completions in zip(prompts, columns, drawn, strict=True):
        name = prompt_id(prompt, own)
        groups.append(
            [
                Sample(
                    prompt_id=name,
                    sample_index=index,
                    prompt=prompt,
                    completion=item.text if isinstance(prompt, str) else [{"role": "assistant", "content": item.text}],
                    token_ids=item.token_ids,
                    finish_reason=item.finish_reason,
                    logprob=item.logprob,
                    seed=item.seed,
                    columns=own,
                    latency=item.latency,
                )
                for index, item in enumerate(completions)
            ]
        )
    rewards([sample for samples in groups for sample in samples])
    return groups
