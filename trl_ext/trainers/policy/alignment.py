"""Maps characters of a completion to the policy's tokens, so that the reward of a span lands on a token.

Policy and reward model may have different tokenizers, so spans are given in characters. The module knows a tokenizer
and token ids. It knows neither where rewards come from nor how training uses them.
"""

import itertools
import os
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """
    Decode generated tokens, and find how many characters of the text are complete after each token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's tokenizer.
        ids (`Sequence[int]`): the completion's tokens, without padding.

    Returns:
        `tuple[str, list[int]]`: the text as `decode(ids, skip_special_tokens=True)` gives it, and for each token the
        number of characters that are complete after it. The last token of a character completes it.

    Example:

    ```python
    >>> token_ends(gpt2_tokenizer, [17, 1343, 362])
    ('2 + 2', [1, 3, 5])
    ```
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.is_fast:
        pieces = _streamed(tokenizer, ids)
        if "".join(pieces) == text:
            return text, list(itertools.accumulate(map(len, pieces)))
    # Some decoders look at neighbouring tokens (they drop a space at the start or clean up white space), so decode
    # every prefix. An incomplete character decodes to a placeholder that a later token replaces: only the part of a
    # prefix that agrees with the final text counts.
    prefixes = [tokenizer.decode(ids[: place + 1], skip_special_tokens=True) for place in range(len(ids))]
    ends = [len(os.path.commonprefix([prefix, text])) for prefix in prefixes]
    for place in range(len(ends) - 2, -1, -1):
        ends[place] = min(ends[place], ends[place + 1])
    return text, ends


def _streamed(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; fewer than `ids` if the stream stops at bytes that form no character."""
    stream, pieces = DecodeStream(skip_special_tokens=True), []
    try:
        for token in ids:
            pieces.append(stream.step(tokenizer.backend_tokenizer, int(token)) or "")
    except Exception:  # tokenizers raises nothing more specific ("Invalid prefix encountered")
        return pieces[:-1]
    return pieces


def token_of(ends: Sequence[int], end: int) -> int | None:
    """
    The index of the token that completes the character before `end`, or `None` if no token does.

    Where the text ends, it is the last token of all. The end-of-sequence token adds no character, but it decides that
    nothing follows. Without this rule, ending would be the only choice that no reward counts for.
    """
    if ends and end == ends[-1]:
        return len(ends) - 1
    for place, there in enumerate(ends):
        if there >= end:
            return place
    return None
