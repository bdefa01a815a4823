"""Dense reward functions: calls them once per batch and puts their rewards on the policy's tokens.

[`DenseRewards`] is a TRL reward function, so `GRPOTrainer` calls it through its public interface with completions,
token ids and columns. The module knows reward functions and tokens. It does not know advantages.
"""

import math
import numbers
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
    """A dense reward function returned unusable rewards. The message names the function and the completion."""


def dense_function(source: Any) -> DenseFunction:
    """
    Turn the user's source of rewards into a function `(prompts, completions, **columns)`.

    The function returns for each completion a list of `(start, end, reward)` in characters, or `None`.

    Args:
        source (`Any`): one of

            - a `RewardScorer` of steps, segments or tokens, or another object with `score_spans`;
            - an object with `score_steps`; completions are cut at line breaks;
            - an object with `score_segments`; completions are cut at sentences, and categories are added up;
            - an object with `score_tokens` and `token_texts`; each token's output is its reward;
            - such a function.

    Raises:
        TypeError: if it is none of these, or a scalar reward model.
    """
    if getattr(source, "kind", None) == "scalar":
        raise TypeError(
            f"{_name(source)} is a scalar reward model: one reward per completion. Pass it in `reward_funcs`."
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
        # `score_steps` adds the separator after each step itself
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
    """Join places and scores to spans. A part that was cut off has no score, so it gets no reward."""
    return [(a, b, value) for (a, b), value in zip(places, values, strict=True) if value is not None]


def _template_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: columns[name] for name in ("tools", "chat_template_kwargs") if name in columns}


class DenseRewards:
    """
    Collects the dense rewards of a batch of completions while `GRPOTrainer` scores them.

    It returns the sum of a completion's rewards. The trainer logs it as `rewards/dense/mean` with weight 0.

    A dense reward function gets what TRL gives a reward function (for chats, `completions` are lists of messages), and
    `completion_texts`: the string of each completion in whose characters spans are counted.

    Args:
        sources (`Sequence`): the user's dense reward functions, see [`dense_function`].
        weights (`Sequence[float]`): a weight for each of them.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): the policy's tokenizer; the trainer sets it once it is loaded.
    """

    __name__ = "dense"
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, sources: Sequence[Any], weights: Sequence[float]):
        self.names = [_name(source) for source in sources]
        self.functions = [dense_function(source) for source in sources]
        self.weights = list(weights)
        self._rows: list[list[tuple[int, float]] | None] = []

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """Return the sum of each completion's rewards, or `None` if no function gives it rewards."""
        rows: list[list[tuple[int, float]] | None] = [None] * len(completions)
        located = [_locate(self.tokenizer, c, ids) for c, ids in zip(completions, completion_ids, strict=True)]
        columns |= {"completion_ids": completion_ids, "completion_texts": [text for text, _, _ in located]}
        for name, function, weight in zip(self.names, self.functions, self.weights, strict=True):
            found = function(prompts=prompts, completions=completions, **columns)
            if found is None or len(found) != len(completions):
                count = "nothing" if found is None else f"{len(found)} lists"
                raise DenseRewardError(
                    f"{name} returned {count} for {len(completions)} completions; needed: one list for each."
                )
            for row, spans in enumerate(found):
                if spans is None:
                    continue
                text, before, ends = located[row]
                rows[row] = [] if rows[row] is None else rows[row]
                for start, end, reward in spans:
                    reward = reward.item() if isinstance(reward, torch.Tensor) and reward.numel() == 1 else reward
                    _check(name, row, start, end, reward, len(text))
                    token = token_of(ends, end - before) if end > before else None
                    if token is not None:
                        rows[row].append((token, weight * float(reward)))
        self._rows += rows
        return [None if own is None else math.fsum(reward for _, reward in own) for own in rows]

    def take(self, shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the rewards collected since the last call.

        Args:
            shape (`torch.Size`): `(N, T)` of the padded completions.
            device (`torch.device`): device of the result.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the rewards `(N, T)`, and a bool tensor `(N, T)` that is True where a
            token has a reward. Several rewards of one token are added.
        """
        rows, self._rows = self._rows, []
        if len(rows) != shape[0]:
            raise DenseRewardError(f"{len(rows)} completions were scored, but {shape[0]} are used for training.")
        rewards, given = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for row, own in enumerate(rows):
            for token, reward in own or []:
                if token < shape[1]:
                    rewards[row, token] += reward
                    given[row, token] = True
        return rewards.to(device), given.to(device)


def _locate(tokenizer: PreTrainedTokenizerBase, completion: Any, ids: list[int]) -> tuple[str, int, list[int]]:
    """The text that spans refer to, the length of its part that the prompt prefilled, and the end of each token."""
    written, ends = token_ends(tokenizer, ids)
    text = completion_text(completion)
    if not text.endswith(written):
        raise DenseRewardError(
            f"The completion's text {text[-60:]!r} does not end with the decoded tokens {written[-60:]!r}. Dense "
            "rewards need completions without tools and without a response template that rewrites them."
        )
    return text, len(text) - len(written), ends


def _check(name: str, row: int, start: Any, end: Any, reward: Any, length: int) -> None:
    if not (0 <= start < end <= length):
        raise DenseRewardError(
            f"{name} gave the span {start} to {end} in completion {row}, which has {length} characters; needed: "
            "0 <= start < end <= length."
        )
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise DenseRewardError(f"{name} gave the reward {reward!r} in completion {row}; needed: a finite number.")


def _name(source: Any) -> str:
    return getattr(source, "__name__", type(source).__name__)
