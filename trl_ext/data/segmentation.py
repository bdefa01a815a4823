"""Texts -> segments: consecutive spans of characters that cover the text exactly.

A segmenter takes a text and returns a list of (start, end). Both count characters of the Python string, and the end is
not included. The first span starts at 0, each span starts where the one before ends, the last one ends at the end of
the text, and none is empty. An empty text has no segments. Knows texts, and for `fixed_length` a tokenizer. Knows
nothing of reward models: `change_points` takes a reward function.
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

# A line that begins with a step number: "1. ", "2) ", "(3) ", "Step 4: ", "**Step 5.** ", "Step 6".
_NUMBERED_LINE = re.compile(
    r"^[ \t]*(?:[#*]+[ \t]*)?(?:step[ \t]+\d+\b|\(\d+\)(?=\s|$)|\d+[.):](?=\s|\*|$))", re.MULTILINE | re.IGNORECASE
)
_WORD = re.compile(r"\S+")
_WIDE_BLANK = re.compile(
    r"[^\S\x00-\x7f](?=\.)"
)  # white space of several bytes: sentencex 1.0.32 panics at "A\u00a0."
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold half a surrogate pair; UTF-8 and the libraries cannot


@segmenters.register("fixed_length")
def fixed_length(text: str, *, tokenizer: Tokenizer, length: int) -> list[CharSpan]:
    """Segments of `length` tokens each; the last one may be shorter.

    The text is tokenized by itself, without special tokens. If a token ends inside a character (byte-level
    tokenizers), the segment ends before that character. White space without a token belongs to the segment before it.

    Args:
        text (`str`): any text.
        tokenizer: a fast transformers tokenizer.
        length (`int`): tokens in a segment, at least 1.

    Raises:
        `ValueError`: the length is below 1, or the tokenizer gives no offsets.

    ```python
    >>> fixed_length("one two three", tokenizer=gpt2_tokenizer, length=2)
    [(0, 7), (7, 13)]
    ```
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, found {length}")
    if not tokenizer.is_fast:
        raise ValueError(f"fixed_length needs a fast tokenizer; {type(tokenizer).__name__} gives no offsets")
    encoding = tokenizer(text=[_encodable(text)], add_special_tokens=False, return_offsets_mapping=True)
    return _tiles(text, (start for start, _ in encoding["offset_mapping"][0][length::length]))


@segmenters.register("sentences")
def sentences(text: str, *, language: str = "en") -> list[CharSpan]:
    """Sentences, as the library sentencex finds them. Each includes the white space that follows it.

    sentencex knows the abbreviations of some 240 languages, decimals, quotation marks and the full stops of other
    scripts. A piece of white space alone belongs to the sentence before it.

    Args:
        text (`str`): any text.
        language (`str`, *optional*, defaults to `"en"`): language code. An unknown one falls back to a related one.

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
            f"joined, the sentences of sentencex differ from the text {text[:60]!r}; use another segmenter for it, "
            "and report the text to github.com/wikimedia/sentencex"
        )
    return _tiles_of_pieces(text, pieces, blank_ahead=True)


@segmenters.register("steps")
def steps(text: str, *, separator: str = "\n", by: Literal["separator", "number"] = "separator") -> list[CharSpan]:
    """Steps of a solution. Each includes the separator that follows it.

    Args:
        text (`str`): any text.
        separator (`str`, *optional*, defaults to `"\\n"`): the text between steps (TRL's default for steps). A piece
            of white space alone belongs to the step before it.
        by (`str`, *optional*, defaults to `"separator"`): `"number"` ignores the separator. It starts a step at each
            line that begins with a number ("2. ", "2) ", "(2) ", "Step 2").

    Raises:
        `ValueError`: the separator is empty, or `by` is unknown.

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
        raise ValueError(f"by must be 'separator' or 'number', found {by!r}")
    if not separator:
        raise ValueError("the separator is empty; give the text between steps")
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
    """Segments whose borders are the places where the reward of the growing prefix shifts.

    A unit is a word, or a segment that `units` finds. The reward function scores the prefix that ends with each unit,
    and the library ruptures (PELT, squared error around the mean) finds the exact optimum. A unit after which the
    reward is different starts a new segment.

    Args:
        text (`str`): any text.
        reward (`Callable`): takes a list of prefixes and returns one number for each. Called once per text.
        penalty (`float`): cost of a shift in squared units of the reward, above 0. A larger penalty gives fewer
            segments.
        units (`Callable`, *optional*): the segmenter that finds the units. By default, units are words.

    Raises:
        `ImportError`: ruptures is not installed.
        `ValueError`: the penalty is not above 0, or `reward` does not return one finite number for each prefix.

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
    """The text with the replacement character in place of each half of a surrogate pair. Its length stays the same."""
    return _HALF_A_PAIR.sub("\ufffd", text)


def _tiles(text: str, starts: Iterable[int], after: int = 0) -> list[CharSpan]:
    """The spans that start at 0 and at each of `starts` that lies behind `after`."""
    cuts = sorted({start for start in starts if start > after})
    return [(start, end) for start, end in pairwise([0, *cuts, len(text)]) if start < end]


def _lead(text: str) -> int:
    """The number of white space characters at the start of a text."""
    return len(text) - len(text.lstrip())


def _tiles_of_pieces(text: str, pieces: Iterable[str], blank_ahead: bool = False) -> list[CharSpan]:
    """The spans of `pieces` of the text. A piece of white space alone is joined to the one before.

    With `blank_ahead`, white space at the start of a piece also belongs to the piece before.
    """
    starts, position = [], 0
    for piece in pieces:
        if piece.strip():
            starts.append(position + (_lead(piece) if blank_ahead else 0))
        position += len(piece)
    return _tiles(text, starts, _lead(text))
