"""Finds the characters of a completion that each token holds, for the ids that `tokenization.encode` makes of a row.

Characters are the code points of a Python string (neither bytes nor UTF-16 units), counted from the start of the
completion. Knows tokenizers and chat templates. Does not know labels or data sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trl_ext.data.chat_templates import (
    Completion,
    Message,
    Prompt,
    Tokenizer,
    as_messages,
    begun_answer,
    content_text,
    conversation,
    encode_chats,
    render,
    unseen_prompt,
    unseen_text,
)
from trl_ext.data.tokenization import (
    TextRow,
    TokenizationSettings,
    by_options,
    plain_text,
    positions_that_fit,
    unknown_text,
    unknown_token_id,
)


# Takes the place of the completion when a chat template is rendered a second time. These are private characters and
# no white space, which a template could cut.
_MARK = "\ue0f1\ue0f2\ue0f1\ue0f3"


@dataclass(frozen=True)
class Located:
    """The tokens of a prompt with a completion, and the characters of the completion that each of them holds.

    Several tokens may share one character (byte-level tokenizers). A token may hold several characters, even some of
    the prompt. The tokens of the prompt, and those that the tokenizer adds before it, lie before 0. The tokens that
    follow the completion (EOS, the end of a turn) lie behind its last character.

    Args:
        ids (`list[int]`): the T token ids, equal to those of `tokenization.encode`.
        starts (`np.ndarray` of shape `(T,)`): first character of each token.
        ends (`np.ndarray` of shape `(T,)`): index after the last character of each token.
        completion_start (`int`): position of the first token that holds a part of the completion or follows it; T if
            there is none.
        truncated (`bool`): whether tokens were cut to fit `max_length`.
        stripped (`bool`): whether the chat template removed white space at an end of the completion.
        unseen (`str`, *optional*): text of an earlier message of the completion, or a thinking part or a call of a
            tool in the last one, that the chat template left out. If it leaves out the content of the last message,
            there are no offsets, and `encode_batch_with_offsets` fails.
        unknown (`str`, *optional*): text of the completion whose tokens are all the unknown token.
        unseen_prompt (`str`, *optional*): text of the prompt, or name of a tool, that the chat template left out.
    """

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray
    completion_start: int
    truncated: bool
    stripped: bool
    unseen: str | None = None
    unknown: str | None = None
    unseen_prompt: str | None = None

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Positions of the tokens that hold any of the characters from `start` up to, not including, `end`.

        The last position holds the last character of the span that has a token (in BERT, white space has none). The
        result is empty if the span is empty or has no token.
        """
        return np.flatnonzero((self.starts < end) & (self.ends > start) & (start < end))

    def texts(self, text: str) -> list[str]:
        """Splits the completion `text` into one piece per token from `completion_start` on; joined, they give `text`.

        A character that several tokens share goes to the first of them. A character without a token (white space in
        BERT) goes to the next token. The tokens that close a completion have empty pieces. If the row was cut to
        `max_length`, the text that was cut off is missing.
        """
        pieces, done = [], 0
        for end in self.ends[self.completion_start :].tolist():
            upto = max(done, min(end, len(text)))
            pieces.append(text[done:upto])
            done = upto
        if pieces and not self.truncated:
            pieces[-1] += text[done:]
        return pieces


def completion_text(completion: Completion) -> str:
    """The text whose characters spans count: a string completion itself, or the content of the last message.

    Raises:
        `TypeError`: the content of the last message is not text.
    """
    if isinstance(completion, str):
        return completion
    content = as_messages(completion)[-1].get("content")
    text = content_text(content)
    if text is None:
        raise TypeError(f"labelled spans need text as the content of the last message, found {type(content).__name__}")
    return text


def encode_with_offsets(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completion: Completion,
    tokenization: TokenizationSettings,
    *,
    tools: list[Any] | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
) -> Located:
    """Token ids of `prompt` + `completion`, as `tokenization.encode` makes them, with the characters of each token.

    `max_length` cuts as in `encode`; offsets still count in the whole completion. See `encode_batch_with_offsets`.

    Example:

    ```python
    >>> located = encode_with_offsets(gpt2_tokenizer, "2 + 2 =", " 4\\n", TokenizationSettings(append_eos=True))
    >>> located.ids, located.starts.tolist(), located.ends.tolist(), located.completion_start
    ([17, 1343, 362, 796, 604, 198, 50256], [-7, -6, -4, -2, 0, 2, 3], [-6, -4, -2, 0, 2, 3, 16], 4)
    >>> located.tokens(0, 3)
    array([4, 5])
    ```
    """
    row = TextRow(prompt, completion, tools, chat_template_kwargs)
    located = encode_batch_with_offsets(tokenizer, [row], tokenization)[0]
    if max_length is None or len(located.ids) <= max_length:
        return located
    kept = positions_that_fit(tokenizer, row, located.ids, tokenization, max_length)
    return replace(
        located,
        ids=[located.ids[position] for position in kept],
        starts=located.starts[kept],
        ends=located.ends[kept],
        completion_start=sum(position < located.completion_start for position in kept),
        truncated=True,
    )


def encode_batch_with_offsets(
    tokenizer: Tokenizer, rows: Sequence[TextRow], tokenization: TokenizationSettings
) -> list[Located]:
    """Token ids of any number of rows, as `tokenization.encode_batch` makes them, with the characters of each token.

    The whole text is tokenized once. To find the completion in a rendered chat, the chat is rendered a second time
    with a mark in its place. The words of the completion are never searched for. The template may remove white space
    at either end of the completion.

    Raises:
        `TypeError`: a text prompt has a chat completion, or the last message has no text.
        `ValueError`: the chat template changes more of the completion than white space at its ends, or the tokenizer
            gives no offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"labelled spans need a fast tokenizer, which knows the characters of each token; "
            f"{type(tokenizer).__name__} is slow. Load the tokenizer of the model with AutoTokenizer"
        )
    found: list[Located | None] = [None] * len(rows)
    unknown = unknown_token_id(tokenizer)
    for numbers, options in by_options(rows):
        texts = [completion_text(rows[n].completion) for n in numbers]
        if options is None:
            places = [(len(rows[n].prompt or ""), 0, len(text)) for n, text in zip(numbers, texts, strict=True)]
            unseen = [(None, None)] * len(numbers)
            encoding = tokenizer(
                text=[plain_text(tokenizer, rows[n].prompt, rows[n].completion, tokenization) for n in numbers],
                add_special_tokens=tokenization.adds_special_tokens,
                return_offsets_mapping=True,
            )
        else:
            chats = [conversation(tokenizer, rows[n].prompt, rows[n].completion, options) for n in numbers]
            encoding, rendered = encode_chats(tokenizer, chats, options, return_offsets_mapping=True)
            # what stands before the completion in the message that it continues
            begun = [_begun(rows[n]) for n in numbers]
            marks = [_with_last(chat, start + _MARK) for chat, start in zip(chats, begun, strict=True)]
            marked = render(tokenizer, marks, options)
            parts = (chats, rendered, marked, texts, begun)
            places = [_find(tokenizer, options, *one) for one in zip(*parts, strict=True)]
            # the content of the last message has been found
            others = [_with_last(as_messages(rows[n].completion), "") for n in numbers]
            unseen = [
                (unseen_text(text, messages), unseen_prompt(text, rows[n].prompt, options))
                for text, messages, n in zip(rendered, others, numbers, strict=True)
            ]
        parts = (encoding["input_ids"], encoding["offset_mapping"], texts, places, unseen)
        for number, *one in zip(numbers, *parts, strict=True):
            found[number] = located = _located(*one)
            if unknown is not None and unknown in located.ids:
                found[number] = replace(located, unknown=unknown_text(tokenizer, rows[number].completion))
    return found


def _located(
    ids: list[int],
    mapping: list[tuple[int, int]],
    text: str,
    place: tuple[int, int, int],
    unseen: tuple[str | None, str | None],
) -> Located:
    """Makes the `Located` of a row from its offsets in the rendered text and the completion's place there."""
    start, first, last = place
    offsets = np.array(mapping, dtype=np.int64).reshape(-1, 2) - start
    # Offsets now count from the rendered completion, which is text[first:last]. Shift them to count in all of `text`.
    length, lost = last - first, len(text) - last
    starts = offsets[:, 0] + np.where(offsets[:, 0] >= 0, first, 0) + np.where(offsets[:, 0] >= length, lost, 0)
    ends = offsets[:, 1] + np.where(offsets[:, 1] > 0, first, 0) + np.where(offsets[:, 1] > length, lost, 0)
    # Special tokens that the tokenizer adds have empty offsets, so they cannot be the start of the completion.
    inside = np.flatnonzero((offsets[:, 1] > 0) & (offsets[:, 1] > offsets[:, 0]))
    completion_start = int(inside[0]) if len(inside) else len(ids)
    stripped = (first, last) != (0, len(text))
    return Located(ids, starts, ends, completion_start, False, stripped, unseen[0], unseen_prompt=unseen[1])


def _begun(row: TextRow) -> str:
    """The begun answer in the last message of a chat: the prompt's, if the completion is one message."""
    return begun_answer(row.prompt, row.completion) if len(as_messages(row.completion)) == 1 else ""


def _with_last(chat: list[Message], content: str) -> list[Message]:
    """The chat with `content` as the content of its last message."""
    return [*chat[:-1], {**chat[-1], "content": content}]


def _find(
    tokenizer: Tokenizer,
    options: dict[str, Any],
    chat: list[Message],
    rendered: str,
    marked: str,
    text: str,
    begun: str,
) -> tuple[int, int, int]:
    """Finds the last message's `text` in the rendered chat: (start, first, last); text[first:last] begins at `start`.

    Args:
        rendered (`str`): the rendered chat.
        marked (`str`): the rendered chat with a mark in place of the text.
        begun (`str`): what stands before the text in the last message.
    """
    before, mark, behind = marked.partition(_MARK)
    if mark and rendered.startswith(before) and rendered.endswith(behind):
        body = rendered[len(before) : len(rendered) - len(behind)]
        lead = len(text) - len(text.lstrip())
        for first in range(lead + 1):
            if text.startswith(body, first) and not text[first + len(body) :].strip():
                return len(before), first, first + len(body)
    # Some templates inspect the text (for a thinking part, say) and may still keep it unchanged. Mark only its end.
    at_its_end = render(tokenizer, [_with_last(chat, begun + text + _MARK)], options)[0]
    before, mark, behind = at_its_end.partition(_MARK)
    if mark and before.endswith(text) and rendered.endswith(behind):
        body = rendered[: len(rendered) - len(behind)]
        start = len(before) - len(text)
        if start <= len(body) and before.startswith(body) and not before[len(body) :].strip():
            return start, 0, len(body) - start
    raise ValueError(
        "the chat template rewrites the completion beyond white space at its ends, so its characters cannot be "
        "found in what the model reads"
    )
