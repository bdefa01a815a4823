"""Shows a scored completion as a page, with each token, step or segment coloured from red to green, or as text.

It knows texts and numbers. It knows nothing of models: scores come from `RewardScorer.score_steps`, `.score_segments`
or `.score_tokens`, and the pieces of tokens from `.token_texts`.
"""

import html
import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal, NamedTuple

from trl_ext.style import PAGE_STYLE, colour, colour_bar


Kind = Literal["probability", "log_odds", "score"]

# By default the scores are written after the pieces if there are at most so many pieces: our choice.
_MOST_NUMBERS = 60
_NAMES = {"probability": "probability", "log_odds": "log-odds", "score": "score"}


class Scale(NamedTuple):
    """The meaning of a page's colours: the scores that are fully red and fully green, and what a score is."""

    low: float
    high: float
    kind: Kind


def choose_scale(
    scores: Sequence[float | None], kind: Kind | None = None, low: float | None = None, high: float | None = None
) -> Scale:
    """
    Choose a scale for scores: 0 to 1 for probabilities, else symmetric around 0 up to the largest score.

    Args:
        scores (sequence of `float` or `None`): the scores.
        kind (`str`, *optional*): `"probability"`, `"log_odds"` or `"score"`. By default scores that are all from 0
            to 1 are probabilities, and others are scores.
        low, high (`float`, *optional*): ends of the scale, to override the defaults.

    Example:

    ```python
    >>> choose_scale([0.2, 0.9])
    Scale(low=0.0, high=1.0, kind='probability')
    >>> choose_scale([-2.4, 0.9], "log_odds")
    Scale(low=-3.0, high=3.0, kind='log_odds')
    ```
    """
    found = [score for score in scores if score is not None and math.isfinite(score)]
    if kind is None:
        kind = "probability" if all(0 <= score <= 1 for score in found) else "score"
    if kind not in _NAMES:
        raise ValueError(f"kind={kind!r} is not known. Needed: {', '.join(map(repr, _NAMES))}.")
    largest = max((abs(score) for score in found), default=1.0)
    end = float(math.ceil(largest)) if largest > 1 else 1.0
    start = 0.0 if kind == "probability" else -end
    return Scale(
        start if low is None else low, (1.0 if kind == "probability" else end) if high is None else high, kind
    )


def to_html(
    pieces: Sequence[str],
    scores: Sequence[float | None],
    *,
    prompt: str = "",
    kind: Kind | None = None,
    low: float | None = None,
    high: float | None = None,
    numbers: bool | None = None,
    title: str = "Scored completion",
) -> str:
    """
    A complete HTML page for light and dark mode, without scripts and without anything from a network.

    It shows a title, a colour bar with the ends of the scale, and the text. The score of a piece is written after it
    and shows when the pointer rests on it. Scores are not part of the text, so copying gives the completion alone.

    Args:
        pieces (sequence of `str`): the tokens, steps or segments of the completion, in order.
        scores (sequence of `float` or `None`): one for each piece; a piece with `None` has no colour.
        prompt (`str`, *optional*): shown in grey before the completion.
        kind (`str`, *optional*): what a score is: `"probability"` (scale 0 to 1), `"log_odds"` or `"score"` (scale
            symmetric around 0). By default scores that are all from 0 to 1 are probabilities, and others are scores.
        low, high (`float`, *optional*): scores that are fully red and fully green, to override the scale's ends.
        numbers (`bool`, *optional*): whether scores are written after the pieces. Defaults to `True` for up to 60
            pieces.
        title (`str`, *optional*): title of the page.

    Returns:
        `str`: HTML.

    Raises:
        `ValueError`: the numbers of pieces and scores differ, a score is not a number or is NaN, the kind is unknown,
            or `low` is not below `high`.

    Example:

    ```python
    (scores,) = scorer.score_steps([prompt], [steps])
    Path("steps.html").write_text(to_html([step + "\\n" for step in steps], scores, prompt=prompt), encoding="utf-8")
    ```
    """
    check_scores(pieces, scores)
    scale = choose_scale(scores, kind, low, high)
    places = shares(pieces, scores, scale.low, scale.high)
    spans = []
    for piece, score, share in zip(pieces, scores, places, strict=True):
        text = html.escape(piece)
        if share is None:
            spans.append(text)
            continue
        # line breaks stay after the number
        body = text.rstrip("\n")
        spans.append(
            f'<span class="piece" style="background: rgb{colour(share)}" title="{score:.4g}" '
            f'data-score="{score:.2f}">{body}</span>{text[len(body) :]}'
        )
    shown = len(pieces) <= _MOST_NUMBERS if numbers is None else numbers
    front = f'<span class="prompt">{html.escape(prompt)}</span>' if prompt else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{PAGE_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{_legend(scale, bool(prompt), None in scores)}\n"
        f'<div class="text{" numbers" if shown else ""}">{front}{"".join(spans)}</div></body></html>\n'
    )


def to_text(pieces: Sequence[str], scores: Sequence[float | None]) -> str:
    """
    The pieces with their scores in brackets, for a terminal or a log.

    ```python
    >>> to_text(["3 + 4 = 7\\\\n", "7 * 2 = 15\\\\n"], [0.98, 0.03])
    '3 + 4 = 7[0.98]\\\\n7 * 2 = 15[0.03]\\\\n'
    ```
    """
    check_scores(pieces, scores)
    parts = []
    for piece, score in zip(pieces, scores, strict=True):
        text = piece.rstrip()
        parts.append(piece if score is None else f"{text}[{score:.2f}]{piece[len(text) :]}")
    return "".join(parts)


def check_scores(pieces: Sequence[str], scores: Sequence[float | None]) -> None:
    """Raise `ValueError` unless there is one number or `None` for each piece."""
    if len(pieces) != len(scores):
        raise ValueError(f"Found {len(pieces)} pieces and {len(scores)} scores; needed: one score for each piece.")
    for number, score in enumerate(scores):
        if score is not None and not isinstance(score, Real):
            raise ValueError(
                f"The score of piece {number} is {score!r:.60}; needed: a number, or None for no score. If the model "
                "has several outputs, choose one for each token."
            )
        if score is not None and math.isnan(score):
            raise ValueError(f"The score of piece {number} is NaN; needed: a number, or None for no score.")


def shares(pieces: Sequence[str], scores: Sequence[float | None], low: float, high: float) -> list[float | None]:
    """The position of each score between `low` and `high`, from 0 to 1. Raises `ValueError` as `to_html` does."""
    check_scores(pieces, scores)
    if not low < high:
        raise ValueError(f"low={low} is not below high={high}.")
    return [None if score is None else (min(max(score, low), high) - low) / (high - low) for score in scores]


def _legend(scale: Scale, has_prompt: bool, has_gaps: bool) -> str:
    """The colour bar with the ends of the scale, and the meaning of grey and uncoloured text."""
    parts = [
        f"<span>{_NAMES[scale.kind]}</span><span>{scale.low:g}</span>",
        colour_bar(),
        f"<span>{scale.high:g}</span>",
    ]
    parts += ["<span>no colour: no score</span>"] if has_gaps else []
    parts += ['<span class="prompt">grey: the prompt</span>'] if has_prompt else []
    return f'<div class="legend">{"".join(parts)}</div>'
