"""From characters of a completion to the tokens that the policy wrote: where a reward of a span is put.

Policy and reward model may have different tokenizers; rewards travel through characters. It knows a tokenizer and
token ids, and nothing of rewards' origin or of training.
"""

import itertools
import os
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """
    The text of generated tokens, and how much of it is there after each token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        ids (`Sequence[int]`): the completion's tokens, without padding.

    Returns:
        `tuple[str, list[int]]`: the text as `decode(ids, skip_special_tokens=True)` gives it, and for each token the
        number of characters that are complete with it. A character of several tokens is complete with the last one.

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
    # Some decoders look at neighbours (a space at the start, white space that is cleaned up): decode every prefix. An
    # incomplete character decodes to a mark that a later token replaces, so what counts is what stays.
    prefixes = [tokenizer.decode(ids[: place + 1], skip_special_tokens=True) for place in range(len(ids))]
    ends = [len(os.path.commonprefix([prefix, text])) for prefix in prefixes]
    for place in range(len(ends) - 2, -1, -1):
        ends[place] = min(ends[place], ends[place + 1])
    return text, ends


def _streamed(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; shorter where the stream gives up on bytes that are no characters."""
    stream, pieces = DecodeStream(skip_special_tokens=True), []
    try:
        for token in ids:
            pieces.append(stream.step(tokenizer.backend_tokenizer, int(token)) or "")
    except Exception:  # tokenizers raises nothing more specific ("Invalid prefix encountered")
        return pieces[:-1]
    return pieces


def token_of(ends: Sequence[int], end: int) -> int | None:
    """The token that completes the character before `end`; `None` if no token does."""
    for place, there in enumerate(ends):
        if there >= end:
            return place
    return None
