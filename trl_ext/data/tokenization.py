"""Text or chat messages -> token ids: the functions that training, scoring and GRPO share, so that they agree.

The ids are those of TRL's own `RewardTrainer`. `chat_templates` renders messages. This module knows tokenizers. It
does not know data sets, ratings, padding or models.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from trl_ext.data.chat_templates import (
    Completion,
    Prompt,
    Tokenizer,
    as_messages,
    chat_ids,
    content_text,
    conversation,
    is_chat,
    template_options,
    unseen_prompt,
    unseen_text,
)
from trl_ext.data.token_ids import token_ids


@dataclass(frozen=True)
class TokenizationSettings:
    """How *plain text* becomes token ids. Chats do not need it: the chat template makes them, and nothing is added.

    Args:
        append_eos (`bool`):
            Append the tokenizer's EOS token, as a string, to each text that does not end with it (as TRL's
            `RewardTrainer` does).
        adds_special_tokens (`bool`, *optional*, defaults to `True`):
            Let the tokenizer add its own special tokens (BOS, or [CLS] and [SEP]).

    Example:

    ```python
    >>> TokenizationSettings.for_training(llama_tokenizer)
    TokenizationSettings(append_eos=True, adds_special_tokens=True)
    >>> TokenizationSettings.for_training(bert_tokenizer)
    TokenizationSettings(append_eos=False, adds_special_tokens=True)
    ```
    """

    append_eos: bool
    adds_special_tokens: bool = True

    @classmethod
    def for_training(cls, tokenizer: Tokenizer) -> "TokenizationSettings":
        """TRL's settings, which append EOS, unless that cannot work or would double a separator.

        No EOS is appended if the tokenizer has none, or if the tokenizer itself closes every text with EOS or SEP
        (BERT, RoBERTa, DeBERTa, T5).
        """
        if tokenizer.eos_token is None:
            return cls(append_eos=False)
        with_special = tokenizer(text=["a"])["input_ids"][0]
        bare = tokenizer(text=["a"], add_special_tokens=False)["input_ids"][0]
        closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        closes_itself = with_special != bare and with_special[-1] in closing
        return cls(append_eos=not closes_itself)

    @classmethod
    def without_sidecar(cls) -> "TokenizationSettings":
        """For a model that says nothing about its tokenization: the tokenizer's own special tokens, no EOS."""
        return cls(append_eos=False)

    def to_dict(self) -> dict[str, bool]:
        """The settings as plain values, for the sidecar."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, bool]) -> "TokenizationSettings":
        """The inverse of `to_dict`. Raises `TypeError` for a missing `append_eos` or an unknown key."""
        return cls(**values)


class TextRow(NamedTuple):
    """One prompt with one completion, and the other values that the chat template reads.

    Args:
        prompt (`str`, list of messages or `None`): `None` when the completion already contains it.
        completion (`str`, list of messages, or a single message): after a chat prompt a string is one assistant
            message.
        tools (`list` or `str`, *optional*): for the chat template; a string is JSON of the list.
        chat_template_kwargs (`dict`, *optional*): for the chat template; `tools` in it wins, as in TRL.
    """

    prompt: Prompt
    completion: Completion
    tools: list[Any] | str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def chat(self) -> bool:
        """Whether the row goes through the chat template."""
        return is_chat(self.prompt) or not isinstance(self.completion, str)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one prompt with one completion.

    Args:
        ids (`list[int]`): the token ids.
        truncated (`bool`): whether anything was cut away to fit a limit.
        unseen (`str`, *optional*): text of the completion that the chat template left out, wholly or in part.
        unknown (`str`, *optional*): text of the completion of which all tokens are the unknown token.
        unseen_prompt (`str`, *optional*): text of the prompt, or name of a tool, that the chat template left out.
    """

    ids: list[int]
    truncated: bool
    unseen: str | None = None
    unknown: str | None = None
    unseen_prompt: str | None = None


def encode(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completion: Completion,
    tokenization: TokenizationSettings,
    *,
    tools: list[Any] | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
) -> Encoded:
    """Token ids of `prompt` + `completion`; `encode_batch` says how they are made.

    A sequence longer than `max_length` is cut, and only this function decides how. The opening token (BOS or [CLS])
    stays. The *prompt* is cut from the left, so that the completion stays whole. If the completion alone is too long,
    the whole prompt is removed and the completion is cut at the right. Then an appended EOS is cut too, because the
    text does not end there; special tokens that the tokenizer itself puts at the end ([SEP]) stay. Training never
    cuts. It drops over-long rows, as TRL does.

    Raises:
        `TypeError`: a text prompt with a chat completion, which have no common reading.
        `ValueError`: `max_length` leaves no room for a single token of the completion, or a message has content that
            is no text.
    """
    row = TextRow(prompt, completion, tools, chat_template_kwargs)
    encoded = encode_batch(tokenizer, [row], tokenization)[0]
    if max_length is None or len(encoded.ids) <= max_length:
        return encoded
    kept = positions_that_fit(tokenizer, row, encoded.ids, tokenization, max_length)
    return replace(encoded, ids=[encoded.ids[position] for position in kept], truncated=True)


def positions_that_fit(
    tokenizer: Tokenizer, row: TextRow, ids: list[int], tokenization: TokenizationSettings, max_length: int
) -> list[int]:
    """The positions of `ids` to keep if there are more than `max_length`, by the rules of `encode`."""
    opening = int(ids[0] in {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None})
    closing = 0 if row.chat else closing_tokens(tokenizer, tokenization)
    room = max_length - opening - closing
    if room < 1:
        raise ValueError(
            f"max_length={max_length} leaves no room for the completion beside {opening + closing} special tokens; "
            "give a larger max_length"
        )
    start = max(opening, *prompt_length(tokenizer, row, [ids], tokenization))
    stop = len(ids) - closing
    kept = range(stop - room, stop) if stop - start <= room else range(start, start + room)
    return [*range(opening), *kept, *range(stop, len(ids))]


def encode_candidates(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completions: Sequence[Completion],
    tokenization: TokenizationSettings,
    *,
    tools: list[Any] | str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of `prompt` + each of `completions`; `encode_batch` says how they are made.

    Example:

    ```python
    >>> encode_candidates(gpt2_tokenizer, "2 + 2 =", [" 4", " 5"], TokenizationSettings(append_eos=True))
    [[17, 1343, 362, 796, 604, 50256], [17, 1343, 362, 796, 642, 50256]]
    ```
    """
    rows = [TextRow(prompt, completion, tools, chat_template_kwargs) for completion in completions]
    return [encoded.ids for encoded in encode_batch(tokenizer, rows, tokenization)]


def encode_batch(tokenizer: Tokenizer, rows: Sequence[TextRow], tokenization: TokenizationSettings) -> list[Encoded]:
    """Token ids of any number of rows, text and chats: the same ids as TRL's `RewardTrainer` makes.

    Text: the EOS string is appended if the settings say so, prompt and completion are joined as strings, and the whole
    is tokenized in one piece, so that a token may span the boundary. Chat: the messages of both are joined and go
    through the tokenizer's chat template, and nothing is appended. The ids of a row do not depend on the other rows.

    Raises:
        `TypeError`: a text prompt with a chat completion.
        `ValueError`: a message has content that is no text.
    """
    encoded: list[Encoded] = [Encoded([], truncated=False)] * len(rows)
    unknown = unknown_token_id(tokenizer)
    for numbers, options in by_options(rows):
        if options is None:
            texts = [plain_text(tokenizer, rows[n].prompt, rows[n].completion, tokenization) for n in numbers]
            ids = token_ids(tokenizer, texts, tokenization.adds_special_tokens)
            unseen = [(None, None)] * len(numbers)
        else:
            chats = [conversation(tokenizer, rows[n].prompt, rows[n].completion, options) for n in numbers]
            ids, texts = chat_ids(tokenizer, chats, options)
            unseen = [
                (unseen_text(text, rows[n].completion), unseen_prompt(text, rows[n].prompt, options))
                for text, n in zip(texts, numbers, strict=True)
            ]
        for number, row_ids, (text, of_prompt) in zip(numbers, ids, unseen, strict=True):
            encoded[number] = Encoded(row_ids, truncated=False, unseen=text, unseen_prompt=of_prompt)
            if unknown is not None and unknown in row_ids:
                encoded[number] = replace(encoded[number], unknown=unknown_text(tokenizer, rows[number].completion))
    return encoded


def unknown_token_id(tokenizer: Tokenizer) -> int | None:
    """The token that stands for text without a token (BERT's [UNK]); `None` if a text never becomes it.

    GPT-2, for example, names its EOS as the unknown token, but has a token for every byte.
    """
    unknown = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def unknown_text(tokenizer: Tokenizer, completion: Completion) -> str | None:
    """The first text of a completion whose tokens are all unknown tokens; `None` if there is none."""
    texts = [content_text(message.get("content")) for message in as_messages(completion)]
    texts = [text for text in texts if text and text.strip()]
    alone = tokenizer(text=texts, add_special_tokens=False)["input_ids"] if texts else []
    unknown = {tokenizer.unk_token_id}
    return next((text for text, ids in zip(texts, alone, strict=True) if unknown.issuperset(ids)), None)


def by_options(rows: Sequence[TextRow]) -> list[tuple[list[int], dict[str, Any] | None]]:
    """The row numbers of each call of the tokenizer, and its arguments for the chat template (`None` for text)."""
    groups: dict[str | None, tuple[list[int], dict[str, Any] | None]] = {}
    for number, row in enumerate(rows):
        options = key = None
        if row.chat and row.tools is None and not row.chat_template_kwargs:
            options, key = {"tools": None}, ""
        elif row.chat:
            options = template_options(row.tools, row.chat_template_kwargs)
            key = json.dumps(options, default=repr)  # tools may be functions
        groups.setdefault(key, ([], options))[0].append(number)
    return list(groups.values())


def plain_text(tokenizer: Tokenizer, prompt: str | None, completion: str, tokenization: TokenizationSettings) -> str:
    """The text that is tokenized for a row without messages, with the EOS that the settings ask for."""
    if tokenization.append_eos and not completion.endswith(tokenizer.eos_token):
        completion = completion + tokenizer.eos_token
    return (prompt or "") + completion


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all `sequences` share, such that each keeps at least one token of its own.

    It follows from the ids alone, so it does not depend on where the prompt ends as text. It is 0 if there is no
    sequence or if one of them is empty.

    ```python
    >>> common_prefix_length([[1, 2, 3, 4], [1, 2, 9]])
    2
    >>> common_prefix_length([[1, 2], [1, 2]])
    1
    ```
    """
    if not sequences:
        return 0
    limit = max(min(len(sequence) for sequence in sequences) - 1, 0)
    # The lexicographically smallest and largest sequence differ no later than any other two.
    low, high = min(sequences), max(sequences)
    for position in range(limit):
        if low[position] != high[position]:
            return position
    return limit


def closing_tokens(tokenizer: Tokenizer, tokenization: TokenizationSettings) -> int:
    """How many special tokens the tokenizer itself puts behind a text ([SEP], T5's EOS)."""
    if not tokenization.adds_special_tokens:
        return 0
    with_special = tokenizer(text=["a"])["input_ids"][0]
    bare = tokenizer(text=["a"], add_special_tokens=False)["input_ids"][0]
    count = 0
    while count < len(with_special) - len(bare) and with_special[: len(with_special) - count][-len(bare) :] != bare:
        count += 1
    return count


def prompt_length(
    tokenizer: Tokenizer, row: TextRow, sequences: Sequence[Sequence[int]], tokenization: TokenizationSettings
) -> list[int]:
    """For each of `sequences`, how many leading tokens it has in common with the prompt alone.

    A token that spans the boundary of prompt and completion does not count.

    Args:
        row (`TextRow`): the prompt, and one of the completions, which says whether the row is a chat.
        sequences (sequence of sequences of `int`): token ids of the prompt with each of its completions.
    """
    if not row.prompt:
        return [0] * len(sequences)
    if row.chat:
        options = {**template_options(row.tools, row.chat_template_kwargs), "add_generation_prompt": True}
        prompt = conversation(tokenizer, row.prompt, [], options)
        alone, _ = chat_ids(tokenizer, [prompt], options)
    else:
        alone = tokenizer(text=[row.prompt], add_special_tokens=tokenization.adds_special_tokens)["input_ids"]
    return [
        next((place for place, (one, other) in enumerate(zip(alone[0], ids, strict=False)) if one != other), shorter)
        for ids in sequences
        for shorter in [min(len(alone[0]), len(ids))]
    ]
