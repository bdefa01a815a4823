"""Messages -> what a tokenizer's chat template makes of them, the same in training and in scoring.

It knows messages, tools and chat templates. It does not know rows, labels or data sets, and it decides nothing about
plain text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from trl_ext.data.token_ids import token_ids


Message = dict[str, Any]
Prompt = str | Sequence[Message] | None
Completion = str | Message | Sequence[Message]

# Arguments of `apply_chat_template` that change the token ids but not the text. If one of them is given, the text
# alone does not determine the ids.
_ENCODING_OPTIONS = {
    "max_length",
    "padding",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}
# Private characters that stand for a text part while a template is tried.
_PARTS = ("\ue0f4\ue0f5", "\ue0f5\ue0f4")
# Keys under which a message may hold its thinking part.
_THINKING = ("reasoning_content", "reasoning", "thinking")
# Text that no notation for arguments (JSON, Python, XML) escapes.
_PLAIN = re.compile(r"[A-Za-z0-9_. -]+")
# Chat template -> whether it reads content that is a list of parts.
_reads_parts: dict[str, bool] = {}


class Tokenizer(Protocol):
    """The parts of a transformers tokenizer that this package uses."""

    eos_token: str | None
    eos_token_id: int | None
    sep_token_id: int | None
    bos_token_id: int | None
    cls_token_id: int | None
    unk_token_id: int | None
    is_fast: bool

    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: list[list[Message]], **kwargs: Any) -> Any: ...


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


def content_text(content: Any) -> str | None:
    """The text of a message's content: a string unchanged, or the texts of a list of parts, joined by nothing.

    The result is `None` if the content is missing, or if one of its parts is not text.

    ```python
    >>> content_text([{"type": "text", "text": "2 + 2 "}, {"type": "text", "text": "= 4"}])
    '2 + 2 = 4'
    ```
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        return None
    texts = [_part_text(part) for part in content]
    return None if None in texts else "".join(texts)


def _part_text(part: Any) -> str | None:
    if isinstance(part, dict):
        part = part.get("text") if part.get("type", "text") == "text" else None
    return part if isinstance(part, str) else None


def with_text(message: Message, text: str) -> Message:
    """The message with another text, as a string or as a list of one part, whichever its content is."""
    parts = isinstance(message.get("content"), (list, tuple))
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}


def without_nulls(value: Any) -> Any:
    """The same messages or tools without the keys whose value is null, at any depth.

    In a column of structs every row has the keys of all rows, and null for the keys that it lacks. Training would read
    keys that the user never wrote, and scoring would not. transformers drops null keys of a message, but not those of
    the objects inside it.

    ```python
    >>> without_nulls({"name": "weather", "arguments": {"city": "Rome", "day": None}})
    {'name': 'weather', 'arguments': {'city': 'Rome'}}
    ```
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def template_options(tools: list[Any] | str | None, chat_template_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments for the chat template. If `chat_template_kwargs` has `tools` too, these win, as in TRL.

    Tools may be JSON in a string. Their nulls stay, because there the user wrote them.
    """
    options = {"tools": tools, **without_nulls(chat_template_kwargs or {})}
    tools = options["tools"]
    options["tools"] = json.loads(tools) if isinstance(tools, str) else without_nulls(tools)
    return options


def begun_answer(prompt: Prompt, completion: Completion) -> str:
    """
    The text of the answer that a chat prompt begins and a completion continues; empty if it begins none.

    Such a prompt ends with a message of the assistant, and the completion starts with one. Together they are one turn.
    """
    messages = as_messages(completion)
    if not is_chat(prompt) or not messages or prompt[-1].get("role") != "assistant" or prompt[-1].get("tool_calls"):
        return ""
    first = messages[0]
    begun = content_text(prompt[-1].get("content")) if first.get("role") == "assistant" else None
    return begun or ""


def conversation(
    tokenizer: Tokenizer, prompt: Prompt, completion: Completion, options: dict[str, Any]
) -> list[Message]:
    """The messages of prompt and completion, as the chat template can read them.

    If the prompt begins an answer and the completion continues it, both become one message. Keys whose value is null
    are dropped. A list of text parts becomes one string, unless the template reads such lists.

    Raises:
        `TypeError`: a text prompt with a chat completion.
        `ValueError`: a part of the content is no text.
    """
    if isinstance(prompt, str) and prompt:
        raise TypeError(
            "the prompt is text and the completion is chat messages; give both as one kind: as text, or the prompt as "
            "[{'role': 'user', 'content': ...}]"
        )
    begun, answer = begun_answer(prompt, completion), as_messages(completion)
    if begun and (rest := content_text(answer[0].get("content"))) is not None:
        answer = [{**prompt[-1], **answer[0], "content": begun + rest}, *answer[1:]]
        prompt = prompt[:-1]
    messages = [without_nulls(message) for message in [*(prompt or []), *answer]]
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            text = content_text(content)
            if text is None:
                raise ValueError("content with a part that is no text; a reward model here reads text only")
            if not _template_reads_parts(tokenizer, options):
                message["content"] = text
    return messages


def _template_reads_parts(tokenizer: Tokenizer, options: dict[str, Any]) -> bool:
    """Whether the template takes the texts out of a list of parts. Each template is tried once."""
    template = str(options.get("chat_template") or getattr(tokenizer, "chat_template", None))
    if template not in _reads_parts:
        content = [{"type": "text", "text": part} for part in _PARTS]
        try:
            rendered = render(tokenizer, [[{"role": "user", "content": content}]], options)[0]
        except Exception:  # a template that cannot read parts may fail in any way
            rendered = ""
        found = all(part in rendered for part in _PARTS)
        # a template that prints any value shows the parts as Python or JSON objects
        _reads_parts[template] = found and not re.search(rf"""text['"]\s*:\s*['"]{_PARTS[0]}""", rendered)
    return _reads_parts[template]


def render(tokenizer: Tokenizer, chats: list[list[Message]], options: dict[str, Any]) -> list[str]:
    """The text of each chat."""
    options = {name: value for name, value in options.items() if name not in _ENCODING_OPTIONS}
    return tokenizer.apply_chat_template(chats, tokenize=False, **options)


def chat_ids(
    tokenizer: Tokenizer, chats: list[list[Message]], options: dict[str, Any]
) -> tuple[list[list[int]], list[str]]:
    """The token ids of chats, and their texts. `options` are those of the chat template."""
    if _is_text_template(tokenizer, options):
        texts = render(tokenizer, chats, options)
        return token_ids(tokenizer, texts, add_special_tokens=False), texts
    encoded, texts = encode_chats(tokenizer, chats, options)
    return encoded["input_ids"], texts


def _is_text_template(tokenizer: Tokenizer, options: dict[str, Any]) -> bool:
    """Whether the ids of a chat are those of its rendered text."""
    return _ENCODING_OPTIONS.isdisjoint(options) and bool(getattr(tokenizer, "chat_template", None))


def encode_chats(
    tokenizer: Tokenizer, chats: list[list[Message]], options: dict[str, Any], **kwargs: Any
) -> tuple[Any, list[str]]:
    """What the tokenizer returns for chats (`input_ids` ...), and their texts.

    Args:
        options (`dict`): for the chat template.
        kwargs: for the tokenizer.
    """
    texts = render(tokenizer, chats, options)
    if _is_text_template(tokenizer, options):
        return tokenizer(text=texts, add_special_tokens=False, **kwargs), texts
    # A tokenizer without a Jinja template (mistral-common) does not encode control tokens that stand in a text.
    arguments = {"tokenizer_kwargs": kwargs} if kwargs else {}
    encoded = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **arguments, **options)
    return encoded, texts


def unseen_text(rendered: str, completion: Completion) -> str | None:
    """The first text of a completion that the rendered chat does not hold; `None` where it holds all.

    The texts are the content of each message, its thinking part, and the names and arguments of the tools that it
    calls. White space does not count: templates trim it, and some move a thinking part to a line of its own.
    """
    messages = as_messages(completion)
    texts = (text for message in messages for text in (*_contents(message, _THINKING), *_calls(message)))
    return _first_missing(rendered, texts)


def unseen_prompt(rendered: str, prompt: Prompt, options: dict[str, Any]) -> str | None:
    """The first text of a chat prompt, or name of a tool, that the rendered chat does not hold; `None` without one.

    Earlier thinking does not count, because templates leave it out on purpose.
    """
    messages = prompt if is_chat(prompt) else []
    texts = [text.split("</think>")[-1] for message in messages for text in _contents(message)]
    texts += [text for message in messages for text in _calls(message)]
    texts += [name for tool in _items(options["tools"]) if (name := _function_name(tool))]
    return _first_missing(rendered, texts)


def _first_missing(rendered: str, texts: Iterable[str]) -> str | None:
    for text in texts:
        if text.strip() not in rendered and "".join(text.split()) not in "".join(rendered.split()):
            return text
    return None


def _contents(message: Message, more: Sequence[str] = ()) -> list[str]:
    texts = [content_text(message.get(key)) for key in ("content", *more)]
    return [text for text in texts if text]


def _calls(message: Message) -> Iterator[str]:
    """The names of the tools that a message calls, and those arguments that stand in any notation as they are."""
    for call in _items(message.get("tool_calls")):
        if name := _function_name(call):
            yield name
        arguments = _function(call).get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                continue
        if isinstance(arguments, dict):
            yield from (value for value in arguments.values() if isinstance(value, str) and _PLAIN.fullmatch(value))


def _function_name(tool: Any) -> str | None:
    """The name of the function of a tool, which is a JSON schema, a call or a Python function."""
    name = _function(tool).get("name", getattr(tool, "__name__", None))
    return name if isinstance(name, str) else None


def _function(tool: Any) -> dict[str, Any]:
    """The function in a schema or a call; empty for anything else, which is for the chat template to judge."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()
