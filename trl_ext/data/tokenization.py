"""Text or chat messages -> token ids: the one function that training, scoring and GRPO share, so that they agree.

Knows tokenizers and chat templates, and reproduces the ids of TRL's own `RewardTrainer`. Knows nothing of data sets,
ratings, padding or models.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


Message = dict[str, Any]
Prompt = str | Sequence[Message] | None
Completion = str | Message | Sequence[Message]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token: str | None
    eos_token_id: int | None
    sep_token_id: int | None
    bos_token_id: int | None
    cls_token_id: int | None
    is_fast: bool

    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: list[list[Message]], **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class TokenizationSettings:
    """How *plain text* becomes token ids; a chat is always what the chat template makes of it, with nothing added.

    Args:
        append_eos (`bool`):
            Append the tokenizer's EOS token, as a string, to a text that does not end with it yet (as TRL's
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
        """TRL's settings (EOS appended), except where that cannot work or would double a separator.

        No EOS is appended when the tokenizer has none, or closes every text by itself with EOS or SEP (BERT, RoBERTa,
        DeBERTa, T5).
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


@dataclass(frozen=True)
class Encoded:
    """Token ids of one prompt with one completion, and whether anything of it was cut away."""

    ids: list[int]
    truncated: bool


def encode(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completion: Completion,
    tokenization: TokenizationSettings,
    *,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
) -> Encoded:
    """Token ids of `prompt` + `completion`; see `encode_candidates`, of which this is the case of one candidate.

    With `max_length` a longer sequence is cut, and this is the one place that decides how. The opening token (BOS or
    [CLS]) stays. The *prompt* is cut from the left, so that the completion stays whole. If the completion alone is too
    long, the prompt goes altogether and the completion is cut at the right: then an EOS that closed it is gone too,
    since the text did not end there; special tokens that the tokenizer itself puts at the end ([SEP]) stay. Training
    never cuts: it drops over-long rows, as TRL does.

    Raises:
        `TypeError`: a text prompt with a chat completion, which have no common reading.
        `ValueError`: `max_length` leaves no room for a single token of the completion.
    """
    arguments = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
    ids = encode_candidates(tokenizer, prompt, [completion], tokenization, **arguments)[0]
    if max_length is None or len(ids) <= max_length:
        return Encoded(ids, truncated=False)

    kept = positions_that_fit(tokenizer, prompt, completion, ids, tokenization, max_length, **arguments)
    return Encoded([ids[position] for position in kept], truncated=True)


def positions_that_fit(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completion: Completion,
    ids: list[int],
    tokenization: TokenizationSettings,
    max_length: int,
    *,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Which positions of `ids`, which are too many, are kept: the rules of `encode`."""
    chat = is_chat(prompt) or not isinstance(completion, str)
    opening = int(ids[0] in {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None})
    closing = 0 if chat else closing_tokens(tokenizer, tokenization)
    room = max_length - opening - closing
    if room < 1:
        raise ValueError(
            f"max_length={max_length} leaves no room for the completion beside {opening + closing} special tokens; "
            "give a larger max_length"
        )
    arguments = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
    start = max(opening, _prompt_length(tokenizer, prompt, ids, tokenization, chat, arguments))
    stop = len(ids) - closing
    kept = range(stop - room, stop) if stop - start <= room else range(start, start + room)
    return [*range(opening), *kept, *range(stop, len(ids))]


def encode_candidates(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completions: Sequence[Completion],
    tokenization: TokenizationSettings,
    *,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of `prompt` + each of `completions`, all of one kind: the same ids as TRL's `RewardTrainer` makes.

    Text: prompt and completion are joined as strings and tokenized in one piece (a token may span the boundary), after
    the EOS string has been appended where the settings say so. Chat: the messages of both are joined and go through
    the tokenizer's chat template, and nothing is appended. After a chat prompt a completion may also be a string or a
    single message: a string becomes one assistant message.

    Args:
        prompt (`str`, list of messages or `None`): `None` when the completions already contain it.
        completions (sequence of `str`, lists of messages, or single messages): the K candidates.
        tools (`list`, *optional*): for the chat template.
        chat_template_kwargs (`dict`, *optional*): for the chat template; `tools` in it wins, as in TRL.

    Returns:
        K lists of token ids. An empty list of completions gives an empty list.

    Raises:
        `TypeError`: a text prompt with a chat completion.

    Example:

    ```python
    >>> encode_candidates(gpt2_tokenizer, "2 + 2 =", [" 4", " 5"], TokenizationSettings(append_eos=True))
    [[17, 1343, 362, 796, 604, 50256], [17, 1343, 362, 796, 642, 50256]]
    ```
    """
    if not completions:
        return []
    if is_chat(prompt) or not isinstance(completions[0], str):
        if isinstance(prompt, str) and prompt:
            raise TypeError(
                "the prompt is text and the completion is chat messages; give both as text, or the prompt as "
                "[{'role': 'user', 'content': ...}]"
            )
        opening = list(prompt or [])
        chats = [opening + as_messages(completion) for completion in completions]
        options = {"tools": tools, **(chat_template_kwargs or {})}
        return tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **options)["input_ids"]

    texts = [plain_text(tokenizer, prompt, completion, tokenization) for completion in completions]
    return tokenizer(text=texts, add_special_tokens=tokenization.adds_special_tokens)["input_ids"]


def plain_text(tokenizer: Tokenizer, prompt: str | None, completion: str, tokenization: TokenizationSettings) -> str:
    """The text that is tokenized for a row without messages, with the EOS that the settings ask for."""
    if tokenization.append_eos and not completion.endswith(tokenizer.eos_token):
        completion = completion + tokenizer.eos_token
    return (prompt or "") + completion


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a (non-empty) list of messages."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0


def as_messages(completion: Completion) -> list[Message]:
    """A completion as a list of messages: a string is one assistant message.

    ```python
    >>> as_messages("Blue.")
    [{'role': 'assistant', 'content': 'Blue.'}]
    ```
    """
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    if isinstance(completion, dict):
        return [completion]
    return list(completion)


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all `sequences` share, such that each keeps at least one token of its own.

    It is a property of the ids alone, so it does not depend on where the prompt ends as text. 0 when there is no
    sequence or one of them is empty.

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


def _prompt_length(
    tokenizer: Tokenizer,
    prompt: Prompt,
    ids: list[int],
    tokenization: TokenizationSettings,
    chat: bool,
    arguments: dict[str, Any],
) -> int:
    """Number of leading tokens of `ids` that the prompt alone gives too (not one that crosses the boundary)."""
    if not prompt:
        return 0
    if chat:
        options = {"tools": arguments["tools"], **(arguments["chat_template_kwargs"] or {})}
        options["add_generation_prompt"] = True
        alone = tokenizer.apply_chat_template([list(prompt)], tokenize=True, return_dict=True, **options)["input_ids"]
    else:
        alone = tokenizer(text=[prompt], add_special_tokens=tokenization.adds_special_tokens)["input_ids"]
    length = 0
    for token, other in zip(alone[0], ids, strict=False):
        if token != other:
            break
        length += 1
    return length
