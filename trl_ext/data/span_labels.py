"""Labelled spans of characters -> labelled tokens, and the functions that change labels before that.

Knows spans, values and the characters of tokens. Knows nothing of rows, tokenizers or data sets.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trl_ext.data.offsets import Located


LabelPlacement = Literal["last", "all", "before"]


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (not included) of a completion, and their label.

    Args:
        start, end (`int`): characters of the completion.
        value (`float`): the label or score.
        category (`int`, *optional*, defaults to `0`): index of the label's category (relevance, factuality ...).
        step (`int`, *optional*, defaults to `0`): number of the step or segment in the row.
    """

    start: int
    end: int
    value: float
    category: int = 0
    step: int = 0


@dataclass(frozen=True)
class TokenLabels:
    """Labels of single tokens, sorted by position and category: four lists of equal length, and counts."""

    positions: list[int]
    values: list[float]
    categories: list[int]
    steps: list[int]
    counts: dict[str, int]


def place_labels(located: Located, spans: Sequence[Span], placement: LabelPlacement) -> TokenLabels:
    """Put the value of each span on its tokens.

    `"last"`: the token that holds the last character of the span. `"all"`: every token that holds any of its
    characters. `"before"`: the token before its first one. A model that reads from left to right has not seen the
    span at that token.

    Spans of one category may share a token: if a step is empty, if `\\n\\n` is one token, or if an annotation ends
    inside a word. Equal labels are kept once, with the number of the earliest step. Labels that differ are masked,
    because none of them is right for that token.

    Returns:
        The labels, with the counts `no_token`, `shared`, `conflicting` and `straddling`. `straddling` counts the spans
        with a labelled token that also holds text outside of the span (behind it, or for `"all"` on either side).
    """
    counts: Counter[str] = Counter(no_token=0, shared=0, conflicting=0, straddling=0)
    claims: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in spans:
        tokens = located.tokens(span.start, span.end)
        if placement == "before" and len(tokens):
            tokens = tokens[:1] - 1
            tokens = tokens[tokens >= 0]
        if not len(tokens):
            counts["no_token"] += 1
            continue
        if placement == "last":
            tokens = tokens[-1:]
        if placement != "before":
            outside = located.ends[tokens[-1]] > span.end
            outside |= placement == "all" and located.starts[tokens[0]] < span.start
            counts["straddling"] += int(outside)
        for token in tokens.tolist():
            claims[token, span.category].append(span)

    labels = []
    for (token, category), claimants in sorted(claims.items(), key=lambda claim: claim[0]):
        if len({span.value for span in claimants}) > 1:
            counts["conflicting"] += len(claimants)
            continue
        counts["shared"] += len(claimants) - 1
        labels.append((token, claimants[0].value, category, min(span.step for span in claimants)))
    positions, values, categories, steps = ([label[i] for label in labels] for i in range(4))
    return TokenLabels(positions, values, categories, steps, dict(counts))


def mask_after_first_error(labels: Sequence[float | None], wrong_below: float = 0.5) -> list[float | None]:
    """The labels up to and including the first wrong one; `None` (not annotated) for those that follow it.

    Annotators who stop at the first mistake did not judge the steps after it.

    Args:
        labels (sequence of `float`, `bool` or `None`): one per step.
        wrong_below (`float`, *optional*, defaults to `0.5`): a label below this is wrong. Use 0 for labels -1, 0, 1.

    ```python
    >>> mask_after_first_error([True, None, False, False, True])
    [True, None, False, None, None]
    ```
    """
    wrong = [index for index, label in enumerate(labels) if label is not None and label < wrong_below]
    last = wrong[0] if wrong else len(labels)
    return [label if index <= last else None for index, label in enumerate(labels)]


def prefix_score_differences(scores: Sequence[float | None], initial: float = 0.0) -> list[float | None]:
    r"""Scores of growing prefixes -> a score of each segment: the difference that the segment makes.

    $$
    r_k = R(x, y_{\le k}) - R(x, y_{<k})
    $$

    See *Natural Language Processing: Neural Networks and Large Language Models* by T. Xiao and J. Zhu
    (https://github.com/NiuTrans/NLPBook), equation 10.69. The differences add up to the last score minus `initial`.

    Args:
        scores (sequence of `float` or `None`): score of the text up to the end of each segment, or `None` if it was
            not rated. Then its segment and the next one have no score.
        initial (`float`, *optional*, defaults to `0.0`): score of the empty completion.

    ```python
    >>> prefix_score_differences([0.5, 0.75, 0.25])
    [0.5, 0.25, -0.5]
    ```
    """
    return [
        None if score is None or before is None else score - before
        for before, score in zip([initial, *scores], scores, strict=False)
    ]
