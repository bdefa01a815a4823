"""Dense reward functions: what a user may pass, called once a batch, and its rewards put on the policy's tokens.

[`DenseRewards`] is itself a TRL reward function, so that `GRPOTrainer` calls it with completions, token ids and
columns through its public interface. It knows reward functions and tokens, and nothing of advantages.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_ext.data.offsets import completion_text
from trl_ext.data.segmentation import sentences, steps
from trl_ext.trainers.policy.alignment import token_ends, token_of


# (start, end, reward) in characters of the completion, the end not included.
Span = tuple[int, int, float]
DenseFunction = Callable[..., Sequence[Sequence[Span] | None]]


class DenseRewardError(ValueError):
    """A dense reward function returned what cannot be used; names function and completion."""


def dense_function(source: Any) -> DenseFunction:
    """
    A function `(prompts, completions, **columns) -> [[(start, end, reward), ...] or None, ...]` of what a user passes.

    Args:
        source (`Any`):
            A `RewardScorer` of steps, segments or tokens (or anything with `score_spans`). An object with
            `score_steps` (cut at line breaks), `score_segments` (cut at sentences; categories are added up), or
            `score_tokens` and `token_texts` (each token's output is its reward). Or such a function.

    Raises:
        TypeError: it is none of these.
    """
    if getattr(source, "kind", None) == "scalar":
        raise TypeError(
            f"{_name(source)} is a scalar reward model: it gives one number a completion. Pass it in `reward_funcs`."
        )
    if hasattr(source, "score_spans"):
        return source.score_spans
    for method, view in (("score_steps", _steps), ("score_segments", _segments), ("score_tokens", _tokens)):
        if hasattr(source, method):
            return view(source)
    if not callable(source):
        raise TypeError(
            f"A dense reward function is a {type(source).__name__}; needed: a scorer of tokens, steps or segments, or "
            "a function (prompts, completions, **columns) -> lists of (start, end, reward)."
        )
    return source


def _steps(scorer: Any) -> DenseFunction:
    def spans_of(prompts, completions, **columns):
        texts = [completion_text(completion) for completion in completions]
        places = [steps(text) for text in texts]
        # `score_steps` puts the separator behind each step itself
        cut = [[text[a:b].removesuffix("\n") for a, b in own] for text, own in zip(texts, places, strict=True)]
        scores = scorer.score_steps(prompts, cut, **_template_columns(columns))
        return [_join(own, values) for own, values in zip(places, scores, strict=True)]

    return spans_of


def _segments(scorer: Any) -> DenseFunction:
    def spans_of(prompts, completions, **columns):
        places = [sentences(completion_text(completion)) for completion in completions]
        scores = scorer.score_segments(prompts, completions, places, **_template_columns(columns))
        summed = [[sum(v.values()) if isinstance(v, Mapping) else v for v in values] for values in scores]
        return [_join(own, values) for own, values in zip(places, summed, strict=True)]

    return spans_of


def _tokens(scorer: Any) -> DenseFunction:
    def spans_of(prompts, completions, **columns):
        given = _template_columns(columns)
        scores = scorer.score_tokens(prompts, completions, **given)
        pieces = scorer.token_texts(prompts, completions, **given)
        found = []
        for values, texts in zip(scores, pieces, strict=True):
            start, own = 0, []
            for value, text in zip(values, texts, strict=True):
                if text:
                    own.append((start, start + len(text), value))
                start += len(text)
            found.append(own)
        return found

    return spans_of


def _join(places: Sequence[tuple[int, int]], values: Sequence[float | None]) -> list[Span]:
    """What was cut off has no score and no reward."""
    return [(a, b, value) for (a, b), value in zip(places, values, strict=True) if value is not None]


def _template_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: columns[name] for name in ("tools", "chat_template_kwargs") if name in columns}


class DenseRewards:
    """
    Collects the dense rewards of a batch of completions while `GRPOTrainer` scores them.

    It returns the sum of a completion's rewards, which the trainer logs as `rewards/dense/mean` and weighs by 0.

    Args:
        sources (`Sequence`): what the user passed, see [`dense_function`].
        weights (`Sequence[float]`): one for each.
        tokenizer (`Callable[[], PreTrainedTokenizerBase]`): gives the policy's tokenizer, once there is one.
    """

    __name__ = "dense"

    def __init__(
        self, sources: Sequence[Any], weights: Sequence[float], tokenizer: Callable[[], PreTrainedTokenizerBase]
    ):
        self.names = [_name(source) for source in sources]
        self.functions = [dense_function(source) for source in sources]
        self.weights = list(weights)
        self._tokenizer = tokenizer
        self._rows: list[list[tuple[int, float]] | None] = []

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """Called by the trainer. A completion for which no function has rewards gives `None`."""
        rows: list[list[tuple[int, float]] | None] = [None] * len(completions)
        tokenizer = self._tokenizer()
        located = [_locate(tokenizer, c, ids) for c, ids in zip(completions, completion_ids, strict=True)]
        for name, function, weight in zip(self.names, self.functions, self.weights, strict=True):
            found = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            if found is None or len(found) != len(completions):
                count = "nothing" if found is None else f"{len(found)} lists"
                raise DenseRewardError(
                    f"{name} returned {count} for {len(completions)} completions; needed: one each."
                )
            for row, spans in enumerate(found):
                if spans is None:
                    continue
                text, before, ends = located[row]
                rows[row] = [] if rows[row] is None else rows[row]
                for start, end, reward in spans:
                    _check(name, row, start, end, reward, len(text))
                    token = token_of(ends, end - before) if end > before else None
                    if token is not None:
                        rows[row].append((token, weight * float(reward)))
        self._rows += rows
        return [None if own is None else math.fsum(reward for _, reward in own) for own in rows]

    def take(self, shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The rewards collected since the last call.

        Args:
            shape (`torch.Size`): `(N, T)` of the padded completions.
            device (`torch.device`): of the result.

        Returns:
            rewards `(N, T)` and where one is given `(N, T)`; several on one token are added.
        """
        rows, self._rows = self._rows, []
        if len(rows) != shape[0]:
            raise DenseRewardError(f"{len(rows)} completions were scored and {shape[0]} are trained on.")
        rewards, given = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for row, own in enumerate(rows):
            for token, reward in own or []:
                if token < shape[1]:
                    rewards[row, token] += reward
                    given[row, token] = True
        return rewards.to(device), given.to(device)


def _locate(tokenizer: PreTrainedTokenizerBase, completion: Any, ids: list[int]) -> tuple[str, int, list[int]]:
    """The text that spans count in, how much of it the policy did not write (a begun answer), and tokens' ends."""
    written, ends = token_ends(tokenizer, ids)
    text = completion_text(completion)
    if not text.endswith(written):
        raise DenseRewardError(
            f"The completion's text {text[-60:]!r} does not end with what its tokens say, {written[-60:]!r}. Dense "
            "rewards need completions without tools and without a response template that rewrites them."
        )
    return text, len(text) - len(written), ends


def _check(name: str, row: int, start: Any, end: Any, reward: Any, length: int) -> None:
    if not (0 <= start < end <= length):
        raise DenseRewardError(
            f"{name} gave the span {start} to {end} in completion {row}, which has {length} characters; needed: "
            "0 <= start < end <= length."
        )
    if not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise DenseRewardError(f"{name} gave the reward {reward!r} in completion {row}; needed: a finite number.")


def _name(source: Any) -> str:
    return getattr(source, "__name__", type(source).__name__)
