"""Which characters of a completion each token holds, for the ids that `tokenization.encode` makes of the row.

Characters are those of Python strings (code points; neither bytes nor UTF-16 units), counted from the start of the
completion. Knows tokenizers and chat templates. Knows nothing of labels or data sets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ext.data.tokenization import (
    Completion,
    Message,
    Prompt,
    TokenizationSettings,
    Tokenizer,
    as_messages,
    is_chat,
    plain_text,
    positions_that_fit,
)


# Stands for the completion while a chat template is rendered: private characters, no white space that could be cut.
_MARK = "\ue0f1\ue0f2\ue0f1\ue0f3"


@dataclass(frozen=True)
class Located:
    """The tokens of a prompt with a completion, and the characters of the completion that each of them holds.

    A character may be spread over several tokens (byte-level tokenizers), and a token may hold several characters,
    even some of the prompt. What the tokenizer adds or takes from the prompt lies before 0; what follows the
    completion (EOS, the end of a turn) lies behind its last character.

    Args:
        ids (`list[int]`): the T token ids, equal to those of `tokenization.encode`.
        starts (`np.ndarray` of shape `(T,)`): first character of each token.
        ends (`np.ndarray` of shape `(T,)`): one past its last character.
        completion_start (`int`): position of the first token that holds anything of the completion or of what follows
            it; T if there is none.
        truncated (`bool`): whether anything was cut to fit `max_length`.
        stripped (`bool`): whether the chat template took white space from an end of the completion.
    """

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray
    completion_start: int
    truncated: bool
    stripped: bool

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Positions of the tokens that hold any of the characters from `start` up to, not including, `end`.

        The last of them holds the last character of the span that has a token at all (white space has none in BERT).
        Empty where the span is, or has no token.
        """
        return np.flatnonzero((self.starts < end) & (self.ends > start) & (start < end))

    def texts(self, text: str) -> list[str]:
        """`text`, the completion, in a piece for each token from `completion_start` on; joined they are the text.

        A character that is spread over several tokens is with the first of them, and one without a token (white space
        in BERT) with the next token; what closes a completion has an empty piece. Of a row that was cut to
        `max_length` what was cut off is missing.
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
    """The text that character spans count in: a string itself, of messages the content of the last one.

    Raises:
        `TypeError`: the last message has no text as its content.
    """
    if isinstance(completion, str):
        return completion
    content = as_messages(completion)[-1].get("content")
    if not isinstance(content, str):
        raise TypeError(
            f"labels at characters need a text as the content of the last message, found {type(content).__name__}"
        )
    return content


def encode_with_offsets(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completion: Completion,
    tokenization: TokenizationSettings,
    *,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
) -> Located:
    """Token ids of `prompt` + `completion`, as `tokenization.encode` makes them, with the characters of each token.

    The whole text is tokenized once. In a chat the completion is found in the rendered text by rendering it a second
    time with a mark in its place, never by searching for its words; white space that the template takes from its ends
    is allowed for. `max_length` cuts as in `encode`, and offsets are those of the whole completion all the same.

    Raises:
        `TypeError`: a text prompt with a chat completion, or a last message without text.
        `ValueError`: the chat template changes the completion beyond its ends, or the tokenizer gives no offsets.

    Example:

    ```python
    >>> located = encode_with_offsets(gpt2_tokenizer, "2 + 2 =", " 4\\n", TokenizationSettings(append_eos=True))
    >>> located.ids, located.starts.tolist(), located.ends.tolist(), located.completion_start
    ([17, 1343, 362, 796, 604, 198, 50256], [-7, -6, -4, -2, 0, 2, 3], [-6, -4, -2, 0, 2, 3, 16], 4)
    >>> located.tokens(0, 3)
    array([4, 5])
    ```
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"labels at characters need a fast tokenizer, which knows the characters of a token; "
            f"{type(tokenizer).__name__} is none. Load the tokenizer of the model with AutoTokenizer"
        )
    text = completion_text(completion)
    arguments = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
    if is_chat(prompt) or not isinstance(completion, str):
        if isinstance(prompt, str) and prompt:
            raise TypeError("the prompt is text and the completion is chat messages; give both as one kind")
        messages = [*(prompt or []), *as_messages(completion)]
        options = {"tools": tools, **(chat_template_kwargs or {})}
        start, first, last = _find(tokenizer, messages, text, options)
        encoding = tokenizer.apply_chat_template(
            [messages],
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **options,
        )
    else:
        start, first, last = len(prompt or ""), 0, len(text)
        encoding = tokenizer(
            text=[plain_text(tokenizer, prompt, completion, tokenization)],
            add_special_tokens=tokenization.adds_special_tokens,
            return_offsets_mapping=True,
        )
    ids = encoding["input_ids"][0]
    offsets = np.array(encoding["offset_mapping"][0], dtype=np.int64).reshape(-1, 2) - start
    # From the rendered text to the completion: only text[first:last] was rendered, at 0 to last - first.
    length, lost = last - first, len(text) - last
    starts = offsets[:, 0] + np.where(offsets[:, 0] >= 0, first, 0) + np.where(offsets[:, 0] >= length, lost, 0)
    ends = offsets[:, 1] + np.where(offsets[:, 1] > 0, first, 0) + np.where(offsets[:, 1] > length, lost, 0)
    # Special tokens that the tokenizer adds by itself have empty offsets at 0: those behind the completion end it.
    inside = np.flatnonzero((offsets[:, 1] > 0) & (offsets[:, 1] > offsets[:, 0]))
    completion_start = int(inside[0]) if len(inside) else len(ids)

    truncated = max_length is not None and len(ids) > max_length
    if truncated:
        kept = positions_that_fit(tokenizer, prompt, completion, ids, tokenization, max_length, **arguments)
        completion_start = sum(position < completion_start for position in kept)
        ids, starts, ends = [ids[position] for position in kept], starts[kept], ends[kept]
    stripped = (first, last) != (0, len(text))
    return Located(ids, starts, ends, completion_start, truncated, stripped)


def _find(tokenizer: Tokenizer, messages: list[Message], text: str, options: dict[str, Any]) -> tuple[int, int, int]:
    """Where the last message's `text` is in the rendered chat: (start, first, last), text[first:last] being there."""

    def render(content: str) -> str:
        chat = [*messages[:-1], {**messages[-1], "content": content}]
        return tokenizer.apply_chat_template([chat], tokenize=False, **options)[0]

    rendered = render(text)
    before, mark, behind = render(_MARK).partition(_MARK)
    if mark and rendered.startswith(before) and rendered.endswith(behind):
        body = rendered[len(before) : len(rendered) - len(behind)]
        lead = len(text) - len(text.lstrip())
        for first in range(lead + 1):
            if text.startswith(body, first) and not text[first + len(body) :].strip():
                return len(before), first, first + len(body)
    # The template looks into the text (a thinking part, say) but may leave it as it is: mark its end alone.
    before, mark, behind = render(text + _MARK).partition(_MARK)
    if mark and before.endswith(text) and rendered.endswith(behind):
        body = rendered[: len(rendered) - len(behind)]
        start = len(before) - len(text)
        if start <= len(body) and before.startswith(body) and not before[len(body) :].strip():
            return start, 0, len(body) - start
    raise ValueError(
        "the chat template rewrites the completion beyond white space at its ends, so that characters of the "
        "completion cannot be found in what the model reads"
    )
