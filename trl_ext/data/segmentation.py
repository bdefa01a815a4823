"""Texts -> segments: spans of characters that follow each other and tile the text exactly.

A segmenter takes a text and gives a list of (start, end), in characters of the Python string, the end not included:
the first span starts at 0, each starts where the one before ends, the last ends at the end of the text, and none is
empty. An empty text has no segments. Knows texts (and for `fixed_length` a tokenizer); knows nothing of rewards,
except that `change_points` is told them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from trl_ext.data.tokenization import Tokenizer
from trl_ext.registry import Registry


CharSpan = tuple[int, int]

segmenters = Registry(kind="segmenter", group="trl_ext.segmenters")

# A line that begins with a number of its own: "1. ", "2) ", "(3) ", "Step 4: ", "**Step 5.** ", "Step 6".
_NUMBERED_LINE = re.compile(
    r"^[ \t]*(?:[#*]+[ \t]*)?(?:step[ \t]+\d+\b|\(\d+\)(?=\s|$)|\d+[.):](?=\s|\*|$))", re.MULTILINE | re.IGNORECASE
)
_WORD = re.compile(r"\S+")
_WIDE_BLANK = re.compile(r"[^\S\x00-\x7f](?=\.)")  # of several bytes: sentencex 1.0.32 panics at "A\u00a0."
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # a JSON escape can hold it, UTF-8 and the libraries cannot


@segmenters.register("fixed_length")
def fixed_length(text: str, *, tokenizer: Tokenizer, length: int) -> list[CharSpan]:
    """Segments of `length` tokens each; the last one may be shorter.

    The text is tokenized by itself, without special tokens. Where a token ends inside a character (byte-level
    tokenizers), the segment ends before it. White space that has no token goes to the segment before.

    Args:
        text (`str`): any text.
        tokenizer: a fast transformers tokenizer.
        length (`int`): tokens in a segment, at least 1.

    Raises:
        `ValueError`: a length below 1, or a tokenizer that gives no offsets.

    ```python
    >>> fixed_length("one two three", tokenizer=gpt2_tokenizer, length=2)
    [(0, 7), (7, 13)]
    ```
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, found {length}")
    if not tokenizer.is_fast:
        raise ValueError(f"fixed_length needs a fast tokenizer; {type(tokenizer).__name__} knows no offsets")
    encoding = tokenizer(text=[_encodable(text)], add_special_tokens=False, return_offsets_mapping=True)
    return _tiles(text, (start for start, _ in encoding["offset_mapping"][0][length::length]))


@segmenters.register("sentences")
def sentences(text: str, *, language: str = "en") -> list[CharSpan]:
    """Sentences, found by the library sentencex, with the white space that follows each.

    It knows the abbreviations of some 240 languages, decimals, quotation marks and the full stops of other scripts.
    What is only white space goes to the sentence before it.

    Args:
        text (`str`): any text.
        language (`str`, *optional*, defaults to `"en"`): language code; an unknown one falls back to a related one.

    Raises:
        `ImportError`: sentencex is not installed.

    ```python
    >>> sentences("Dr. Smith paid $3.50. Was it much?")
    [(0, 22), (22, 34)]
    ```
    """
    try:
        from sentencex import segment
    except ImportError as error:
        raise ImportError("the segmenter 'sentences' needs sentencex: pip install 'trl-ext[segment]'") from error
    encodable = _WIDE_BLANK.sub(" ", _encodable(text))
    pieces = segment(language, encodable)
    if "".join(pieces) != encodable:
        raise RuntimeError(
            f"sentencex gave sentences that do not add up to the text {text[:60]!r}; use another segmenter for it, "
            "and report it to github.com/wikimedia/sentencex"
        )
    return _tiles_of_pieces(text, pieces, blank_ahead=True)


@segmenters.register("steps")
def steps(text: str, *, separator: str = "\n", by: Literal["separator", "number"] = "separator") -> list[CharSpan]:
    """Steps of a solution, each with the separator behind it.

    Args:
        text (`str`): any text.
        separator (`str`, *optional*, defaults to `"\\n"`): what stands between steps (TRL's default for steps). What
            is only white space goes to the step before it.
        by (`str`, *optional*, defaults to `"separator"`): `"number"` starts a step at each line that begins with a
            number ("2. ", "2) ", "(2) ", "Step 2") in place of looking for the separator.

    Raises:
        `ValueError`: an empty separator or an unknown `by`.

    ```python
    >>> steps("3 + 4 = 7\\n\\n7 * 2 = 14")
    [(0, 11), (11, 21)]
    >>> steps("Let me see.\\n1. Add:\\n3 + 4 = 7\\n2. Double it.", by="number")
    [(0, 12), (12, 30), (30, 43)]
    ```
    """
    if by == "number":
        return _tiles(text, (match.start() for match in _NUMBERED_LINE.finditer(text)), _lead(text))
    if by != "separator":
        raise ValueError(f"steps are told apart by 'separator' or by 'number', found {by!r}")
    if not separator:
        raise ValueError("the separator is empty; give the text that stands between steps")
    pieces = text.split(separator)
    return _tiles_of_pieces(text, [*(piece + separator for piece in pieces[:-1]), pieces[-1]])


@segmenters.register("change_points")
def change_points(
    text: str,
    *,
    reward: Callable[[list[str]], Sequence[float]],
    penalty: float,
    units: Callable[[str], list[CharSpan]] | None = None,
) -> list[CharSpan]:
    """Segments between the places where the reward of the growing prefix shifts.

    The prefixes that end with each unit are scored, and the library ruptures (PELT, squared error around the mean)
    finds the shifts, exactly. A unit after which the reward is different opens a segment.

    Args:
        text (`str`): any text.
        reward (`Callable`): list of prefixes -> one number for each; is called once for a text.
        penalty (`float`): what a shift costs, above 0, in squared units of the reward: the larger, the fewer segments.
        units (`Callable`, *optional*): the segmenter whose segments are joined; words by default.

    Raises:
        `ImportError`: ruptures is not installed.
        `ValueError`: a penalty that is not above 0, or rewards that are not one finite number a prefix.

    ```python
    >>> change_points("good good bad bad", reward=lambda prefixes: [-p.count("bad") for p in prefixes], penalty=0.1)
    [(0, 10), (10, 14), (14, 17)]
    ```
    """
    try:
        from ruptures import Pelt
    except ImportError as error:
        raise ImportError("the segmenter 'change_points' needs ruptures: pip install 'trl-ext[segment]'") from error
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, found {penalty}")
    words = (match.start() for match in _WORD.finditer(text))
    spans = _tiles(text, words, _lead(text)) if units is None else units(text)
    if len(spans) < 2:
        return spans
    rewards = np.array(reward([text[:end] for _, end in spans]), dtype=np.float64)
    if rewards.shape != (len(spans),) or not np.isfinite(rewards).all():
        raise ValueError(
            f"reward must give one finite number for each of {len(spans)} prefixes, found an array of shape "
            f"{rewards.shape} with {int((~np.isfinite(rewards)).sum())} values that are not finite"
        )
    ends = Pelt(model="l2", min_size=1, jump=1).fit(rewards).predict(pen=penalty)
    return _tiles(text, (spans[end][0] for end in ends[:-1]))


def _encodable(text: str) -> str:
    """The text, as long as it is, with the replacement character for each half of a surrogate pair."""
    return _HALF_A_PAIR.sub("\ufffd", text)


def _tiles(text: str, starts: Iterable[int], after: int = 0) -> list[CharSpan]:
    """The spans between those of `starts` that lie behind `after`."""
    cuts = sorted({start for start in starts if start > after})
    return [(start, end) for start, end in pairwise([0, *cuts, len(text)]) if start < end]


def _lead(text: str) -> int:
    """How many white space characters a text begins with."""
    return len(text) - len(text.lstrip())


def _tiles_of_pieces(text: str, pieces: Iterable[str], blank_ahead: bool = False) -> list[CharSpan]:
    """The spans of `pieces` of the text; those that are only white space are joined to the one before.

    With `blank_ahead` the white space that a piece begins with goes there too.
    """
    starts, position = [], 0
    for piece in pieces:
        if piece.strip():
            starts.append(position + (_lead(piece) if blank_ahead else 0))
        position += len(piece)
    return _tiles(text, starts, _lead(text))
