"""Reads the outputs of a token-level reward model: per token, step or segment, and as one number per completion.

It knows a model's sidecar, the characters of tokens, and aggregators. It knows nothing of models, batches or
tokenizers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from trl_ext.data import segmentation
from trl_ext.data.chat_templates import Completion, as_messages, content_text, with_text
from trl_ext.data.offsets import Located, completion_text
from trl_ext.data.segmentation import CharSpan, segmenters
from trl_ext.losses.properties import OUTPUT_MEANINGS
from trl_ext.models.sidecar import Sidecar
from trl_ext.scoring.aggregation import aggregators, weighted_categories


Aggregation = str | Callable[[Any], float | None] | Mapping[str, float]
Segmenter = str | Callable[[str], Sequence[CharSpan]]
Neutral = Literal["negative", "positive"]
Value = float | dict[str, float]

# The methods of a scorer, and the kinds of reward model that have them.
METHODS = {
    "score_tokens": ("outcome", "process", "segment"),
    "score_steps": ("process",),
    "score_segments": ("segment",),
    "score_spans": ("outcome", "process", "segment"),
    "combine": ("process", "segment"),
}


class Cut(NamedTuple):
    """A completion, and the character span of each of its steps or segments."""

    completion: Completion
    spans: list[CharSpan]


class TokenViews:
    """
    Reads the outputs of one token-level model.

    Args:
        sidecar ([`Sidecar`]): describes the model's outputs.
        aggregation (`str`, `Callable` or `Mapping`, *optional*): see [`~trl_ext.RewardScorer`].
        segmenter (`str` or `Callable`, *optional*): see [`~trl_ext.RewardScorer`].

    Raises:
        `ValueError`: the aggregator or segmenter is unknown, or the weights do not name exactly the categories.
    """

    def __init__(self, sidecar: Sidecar, aggregation: Aggregation | None, segmenter: Segmenter | None):
        self.kind = sidecar.kind
        self.is_scalar = sidecar.kind == "outcome" and aggregation is None  # then the score is the last token's output
        meaning = sidecar.label_meaning  # the loss declares it, so this works for plugin losses too
        self._is_log_odds = sidecar.loss_type == "bce" or meaning == OUTPUT_MEANINGS["log_odds"]
        self._is_label = sidecar.loss_type == "mse" or meaning == OUTPUT_MEANINGS["label"]
        self._outputs = sidecar.outputs_per_category
        # a margin, as of `hinge`, is above 0 where the model calls a step right
        self.gives_probabilities = self._outputs > 1 or self._is_log_odds or self._is_label
        self._categories = sidecar.categories or []
        self._placement = sidecar.label_placement or "last"
        self._separator = sidecar.step_separator
        self._aggregate = self._make_aggregate(aggregation)
        self._segment = None if segmenter is None else segmenters.get(segmenter)

    # --------------------------------------------------------------------------------------------- what is asked for
    def join_steps(self, steps: Sequence[str]) -> Cut:
        """Join the steps to one completion, as training does."""
        if isinstance(steps, str) or not all(isinstance(step, str) for step in steps):
            raise ValueError(f"Found {steps!r} for the steps of a completion; needed: a list of strings.")
        spans, start = [], 0
        for step in steps:
            end = start + len(step) + len(self._separator)
            spans.append((start, end))
            start = end
        return Cut("".join(step + self._separator for step in steps), spans)

    def check_spans(self, cuts: Sequence[Cut]) -> None:
        """Raise `ValueError` unless all spans are inside their completions."""
        for row, (completion, spans) in enumerate(cuts):
            length = len(completion_text(completion))
            for start, end in spans:
                if not 0 <= start < end <= length:
                    raise ValueError(
                        f"Row {row} has the span {start} to {end} in a completion of {length} characters; needed: "
                        "0 <= start < end <= length, in characters (not bytes) of the completion without the prompt."
                    )

    def cut(self, completion: Completion) -> Cut:
        """
        Divide a generated completion into steps or segments. If the last step has no separator, it gets the one of
        training.
        """
        if self.kind == "outcome":
            return Cut(completion, [])
        messages = None if isinstance(completion, str) else as_messages(completion)
        content = completion if messages is None else messages[-1].get("content") if messages else ""
        text = content_text(content)
        if not text:
            return Cut(completion if content else "", [])
        spans = list(self._segment(text) if self._segment else self._default_segments(text))
        if self.kind == "process" and spans and not text.endswith(self._separator):
            text += self._separator
            spans[-1] = (spans[-1][0], len(text))
            completion = text if messages is None else [*messages[:-1], with_text(messages[-1], text)]
        return Cut(completion, spans)

    # ------------------------------------------------------------------------------------------------ how it is read
    def tokens(self, located: Located, outputs: torch.Tensor) -> list[float] | list[list[float]]:
        """The outputs (T, C) from the completion's first token on; one number per token if C is 1."""
        own = outputs[located.completion_start :]
        return own[:, 0].tolist() if own.shape[1] == 1 else own.tolist()

    def steps(
        self, located: Located, outputs: torch.Tensor, spans: Sequence[CharSpan], neutral: Neutral = "negative"
    ) -> list[float | None]:
        """P(correct) of each step, or its margin (see [`_right`]); `None` for a step that was cut off."""
        places = self._places(located, spans)
        known = iter(self._right(outputs[[place for place in places if place is not None]], neutral).tolist())
        return [None if place is None else next(known) for place in places]

    def segments(self, located: Located, outputs: torch.Tensor, spans: Sequence[CharSpan]) -> list[Value | None]:
        """The estimated label of each segment, by category if they have names; `None` for one that was cut off."""
        places = self._places(located, spans)
        chosen = outputs[[place for place in places if place is not None]]  # (S, G * C)
        table = self._label(chosen.view(len(chosen), max(1, len(self._categories)), self._outputs)).tolist()  # (S, G)
        known = (dict(zip(self._categories, row, strict=True)) if self._categories else row[0] for row in table)
        return [None if place is None else next(known) for place in places]

    def changes(self, located: Located, outputs: torch.Tensor, spans: Sequence[CharSpan]) -> list[float]:
        """By how much each token of a completion changes P(right); the first one starts from 0."""
        right = self._right(outputs[located.completion_start :], "negative").tolist()
        return [after - before for before, after in zip([0.0, *right], right, strict=False)]

    def scalar(self, located: Located, outputs: torch.Tensor, spans: Sequence[CharSpan]) -> float | None:
        """One number for a completion; steps and segments that were cut off do not count."""
        if self.kind == "outcome":
            values = self._right(outputs[located.completion_start :], "negative").tolist()
        elif self.kind == "process":
            values = self.steps(located, outputs, spans)
        else:
            values = self.segments(located, outputs, spans)
        return self.combine(values)

    def combine(self, values: Sequence[Value | None]) -> float | None:
        """Aggregate the values of a completion to one number; `None` does not count."""
        return self._aggregate([value for value in values if value is not None])

    def check_neutral(self, neutral: str) -> None:
        """Raise `ValueError` unless `neutral` has a meaning for this model."""
        if neutral not in ("negative", "positive"):
            raise ValueError(f"neutral={neutral!r}; needed: 'negative' or 'positive'.")
        if neutral == "positive" and self._outputs != 3:
            raise ValueError(f"The model has {self._outputs} classes and no neutral one. Leave `neutral` out.")

    # ------------------------------------------------------------------------------------------------------- private
    def _make_aggregate(self, aggregation: Aggregation | None) -> Callable[[Any], float | None]:
        if isinstance(aggregation, Mapping):
            if sorted(aggregation) != sorted(self._categories):
                raise ValueError(
                    f"aggregation has weights for {sorted(aggregation)}; needed: one for each category of the model, "
                    f"which are {self._categories or 'none: name an aggregator'} (0 ignores one)."
                )
            return partial(weighted_categories, weights=dict(aggregation))
        if aggregation is None or isinstance(aggregation, str):
            name = aggregation or {"process": "min", "segment": "sum", "outcome": "last"}[self.kind]
            aggregate = aggregators.get(name)  # raises for one that is unknown
            if name == "count_correct" and not self.gives_probabilities:
                aggregate = partial(aggregate, threshold=0.0)
            return partial(weighted_categories, within=aggregate) if self._categories else aggregate
        return aggregators.get(aggregation)

    def _default_segments(self, text: str) -> list[CharSpan]:
        if self.kind == "segment":
            return segmentation.sentences(text)
        if not self._separator:
            raise ValueError(
                "The model was trained with an empty step separator, so the scorer cannot find where a step ends. "
                "Pass `segmenter` to RewardScorer, or call `score_steps`."
            )
        return segmentation.steps(text, separator=self._separator)

    def _places(self, located: Located, spans: Sequence[CharSpan]) -> list[int | None]:
        """
        The position whose output is the score of each span: where training put the label (with placement `"all"` the
        last token of the span). `None` for a span that was cut off, and if there is no token at all.
        """
        real = located.ends > located.starts
        reach = int(located.ends[real].max(initial=0)) if located.truncated else None
        places: list[int | None] = []
        for start, end in spans:
            own = located.tokens(start, end)
            if not len(real) or (reach is not None and end > reach):
                places.append(None)
            elif not len(own):  # none of its characters has a token: use the last token before its end
                before = np.flatnonzero(real & (located.starts < end))
                places.append(int(before[-1]) if len(before) else 0)
            else:
                places.append(int(max(own[0] - 1, 0) if self._placement == "before" else own[-1]))
        return places

    def _right(self, outputs: torch.Tensor, neutral: Neutral) -> torch.Tensor:
        """
        P(correct), (S,), from the outputs (S, C) of a model without categories. It may be exactly 0 or 1. A loss whose
        outputs are no probabilities (`hinge`) gives the output itself.
        """
        outputs = outputs.double()
        if outputs.shape[1] > 1:
            return outputs.softmax(1)[:, 1 if neutral == "positive" else -1 :].sum(1)
        if self._is_log_odds:
            return outputs[:, 0].sigmoid()
        return outputs[:, 0].clamp(0, 1) if self._is_label else outputs[:, 0]

    def _label(self, outputs: torch.Tensor) -> torch.Tensor:
        """The estimated label, (S, G), from the outputs (S, G, C)."""
        outputs = outputs.double()
        if self._outputs > 1:
            classes = torch.arange(self._outputs, dtype=torch.float64) - (1 if self._outputs == 3 else 0)
            return outputs.softmax(-1) @ classes
        return outputs[..., 0].sigmoid() if self._is_log_odds else outputs[..., 0]


def refuse(method: str, kind: str, name: str) -> None:
    """Raise `ValueError` unless models of this kind have the method."""
    if kind not in METHODS[method]:
        wanted = " or ".join(repr(known) for known in METHODS[method])
        other = ", ".join(f"`{known}`" for known, kinds in METHODS.items() if kind in kinds)
        raise ValueError(
            f"{name} is a reward model of kind {kind!r}, and `{method}` needs one of kind {wanted}. Call "
            f"{other + ' or ' if other else ''}the scorer directly."
        )


def total(value: Value) -> float:
    """The estimated label of a segment as one number: categories are added up."""
    return sum(value.values()) if isinstance(value, Mapping) else value
