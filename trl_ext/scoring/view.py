"""A scored completion to look at: each token, step or segment on a colour from red to green, as HTML or as text.

Knows texts and numbers between them. Knows nothing of models; what is shown comes from `RewardScorer.score_steps`,
`.score_segments` or `.score_tokens`, and for the last from `.token_texts`. A PNG is made by `picture.to_png`.
"""

import html
import math
from collections.abc import Sequence
from numbers import Real


_STYLE = "font-family: sans-serif; line-height: 1.8; white-space: pre-wrap; max-width: 60em"
_RED, _MIDDLE, _GREEN = (244, 143, 137), (255, 244, 200), (142, 206, 141)


def to_html(
    pieces: Sequence[str],
    scores: Sequence[float | None],
    *,
    prompt: str = "",
    low: float = 0.0,
    high: float = 1.0,
    title: str = "Scored completion",
) -> str:
    """
    A page of its own, without scripts or anything from a network.

    Args:
        pieces (sequence of `str`): what the completion is made of, in order: tokens, steps or segments.
        scores (sequence of `float` or `None`): one for each piece; `None` leaves it without a colour.
        prompt (`str`, *optional*): shown in grey in front.
        low, high (`float`, *optional*, default to `0.0` and `1.0`): scores that are all red and all green.
        title (`str`, *optional*): title of the page.

    Returns:
        `str`: HTML; the score of a piece shows when the pointer rests on it.

    Raises:
        `ValueError`: not one score a piece, a score that is no number or NaN, or `low` not below `high`.

    Example:

    ```python
    (scores,) = scorer.score_steps([prompt], [steps])
    Path("steps.html").write_text(to_html([step + "\\n" for step in steps], scores, prompt=prompt), encoding="utf-8")
    ```
    """
    places = shares(pieces, scores, low, high)
    spans = []
    for piece, score, share in zip(pieces, scores, places, strict=True):
        text = html.escape(piece)
        if share is None:
            spans.append(text)
        else:
            spans.append(f'<span style="background: rgb{colour(share)}" title="{score:.4g}">{text}</span>')
    front = f'<span style="color: #666">{html.escape(prompt)}</span>' if prompt else ""
    return (
        f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n'
        f'<body><div style="{_STYLE}">{front}{"".join(spans)}</div></body></html>\n'
    )


def to_text(pieces: Sequence[str], scores: Sequence[float | None]) -> str:
    """
    The pieces with their scores in brackets, for a terminal or a log.

    ```python
    >>> to_text(["3 + 4 = 7\\\\n", "7 * 2 = 15\\\\n"], [0.98, 0.03])
    '3 + 4 = 7[0.98]\\\\n7 * 2 = 15[0.03]\\\\n'
    ```
    """
    shares(pieces, scores, 0.0, 1.0)
    parts = []
    for piece, score in zip(pieces, scores, strict=True):
        text = piece.rstrip()
        parts.append(piece if score is None else f"{text}[{score:.2f}]{piece[len(text) :]}")
    return "".join(parts)


def shares(pieces: Sequence[str], scores: Sequence[float | None], low: float, high: float) -> list[float | None]:
    """Where each score lies between `low` and `high`, 0 to 1. Raises `ValueError` as `to_html`."""
    if len(pieces) != len(scores):
        raise ValueError(f"Found {len(pieces)} pieces and {len(scores)} scores; needed: one score for each piece.")
    if not low < high:
        raise ValueError(f"low={low} is not below high={high}.")
    for number, score in enumerate(scores):
        if score is not None and not isinstance(score, Real):
            raise ValueError(
                f"The score of piece {number} is {score!r:.60}; needed: a number, or None for no score. Of a model "
                "with several outputs, take one for each token."
            )
        if score is not None and math.isnan(score):
            raise ValueError(f"The score of piece {number} is NaN; needed: a number, or None for no score.")
    return [None if score is None else (min(max(score, low), high) - low) / (high - low) for score in scores]


def colour(share: float) -> tuple[int, int, int]:
    """From red over a pale yellow to green; red, green and blue from 0 to 255."""
    start, end, part = (_RED, _MIDDLE, 2 * share) if share < 0.5 else (_MIDDLE, _GREEN, 2 * share - 1)
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(start, end, strict=True))
    return red, green, blue
