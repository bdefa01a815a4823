"""The records of sampling: prompts, the completions that a backend returns, and the samples that a run keeps.

This module checks prompts, gives them ids, and joins a prompt with the text generated after it. It knows nothing of
models, reward functions or where records are kept.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trl_ext.data.tokenization import Prompt
from trl_ext.data.validation import RowChecks
from trl_ext.pipelines.stages.cache_key import canonical


FinishReason = Literal["stop", "length"]

# Columns that the chat template reads, so that they change the token ids of a prompt.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(slots=True)
class Completion:
    """One completion as a backend returns it; [`Sample`] explains the fields of the same names.

    Args:
        text (`str`): the generated text, without its end token. After a begun answer it is the continuation alone.
    """

    text: str
    token_ids: list[int] | None
    finish_reason: FinishReason
    logprob: float | None
    seed: int
    latency: float


@dataclass(slots=True)
class Sample:
    """
    One completion of one prompt, with its scores and its origin.

    Args:
        prompt_id (`str`): id of the prompt, see [`prompt_id`].
        sample_index (`int`): index of this completion among those of the prompt, from 0.
        prompt (`str` or `list[dict]`): text or messages as in the data set, without a begun answer (see
            [`with_completion`]).
        completion (`str` or `list[dict]`): text, or one assistant message after a chat prompt.
        token_ids (`list[int]`, *optional*): the generated tokens with the end token; `None` if a server does not
            return them.
        finish_reason (`str`): `"stop"`, or `"length"` for a completion that was cut at `max_completion_length`.
        logprob (`float`, *optional*): sum of the tokens' log-probabilities under the model, if the backend returns
            them.
        seed (`int`): seed of the shard or of the request.
        scores (`dict[str, float | None]`): score of each reward function; `None` if it cannot score this completion.
            Empty before scoring.
        score (`float`, *optional*): the weighted total; `None` before scoring and if no function gave a score.
        columns (`dict`): the other columns of the prompt's row.
        latency (`float`, *optional*): seconds that the request, or the batch in this process, took.
    """

    prompt_id: str
    sample_index: int
    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]
    token_ids: list[int] | None
    finish_reason: FinishReason
    logprob: float | None
    seed: int
    scores: dict[str, float | None] = field(default_factory=dict)
    score: float | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    latency: float | None = None

    @classmethod
    def of(
        cls, prompt_id: str, index: int, prompt: Prompt, columns: dict[str, Any], generated: Completion
    ) -> "Sample":
        """The sample of a completion that a backend returned for a prompt."""
        prompt, completion = with_completion(prompt, generated.text)
        return cls(
            prompt_id=prompt_id,
            sample_index=index,
            prompt=prompt,
            completion=completion,
            token_ids=generated.token_ids,
            finish_reason=generated.finish_reason,
            logprob=generated.logprob,
            seed=generated.seed,
            columns=columns,
            latency=generated.latency,
        )


def with_completion(prompt: Prompt, text: str) -> tuple[Prompt, str | list[dict[str, Any]]]:
    """
    Join a prompt with the text that was generated after it.

    A chat may end with a begun answer, which the model continues. The begun answer and its continuation together
    become the completion, and the prompt ends before them. Reward functions, `SFTTrainer` and the chat template
    therefore see one assistant turn.

    Args:
        prompt (`str` or `list[dict]`): text or messages.
        text (`str`): what the model generated after it.

    Returns:
        `tuple`: the prompt, and the completion: a text, or one assistant message.

    Example:

    ```python
    >>> with_completion([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good"}], " day")
    ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Good day'}])
    ```
    """
    if isinstance(prompt, str):
        return prompt, text
    if not ends_with_begun_answer(prompt):
        return prompt, [{"role": "assistant", "content": text}]
    begun = prompt[-1]
    return prompt[:-1], [{**begun, "content": _content(begun) + text}]


def ends_with_begun_answer(prompt: Prompt) -> bool:
    """Whether a prompt is a chat that ends with an assistant message, which the model then continues."""
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, which may be a text or messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message) for message in completion)


def _content(message: dict[str, Any]) -> str:
    """The text of a message. Its content is a text, or a list of parts; parts of `{"type": "text"}` hold text."""
    content = message.get("content") or ""
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in content)
    return str(content)


def prompt_of(item: Mapping[str, Any], row: int) -> Prompt:
    """
    Return the prompt of a row of a data set, after checking it.

    Raises:
        [`DataError`]: the prompt is missing or empty, is neither a text nor messages, or is a begun answer without a
            question. It names the row.
    """
    checks = RowChecks(row, "prompt")
    if "prompt" not in item:
        raise checks.error("prompt", f"the columns {sorted(item)}", "a column 'prompt'", "Rename or add it.")
    prompt = checks.prompt(item["prompt"])
    fix = "Remove such rows with dataset.filter."
    if prompt is None:
        raise checks.error("prompt", "an empty prompt", "a text or messages", fix)
    if ends_with_begun_answer(prompt) and len(prompt) == 1:
        raise checks.error("prompt", "an assistant message alone", "a message before the answer that it begins", fix)
    return prompt


def prompt_id(prompt: Prompt, columns: dict[str, Any] | None = None) -> str:
    """
    The id of a prompt: a hash of its content, the same in every run and on every machine.

    Args:
        prompt (`str` or `list[dict]`): text or messages.
        columns (`dict`, *optional*): the row's other columns; only `tools` and `chat_template_kwargs` count.

    Example:

    ```python
    >>> prompt_id("2 + 2 =")
    'cd8bac32bb69bf62'
    ```
    """
    seen = {name: value for name in TEMPLATE_COLUMNS if (value := (columns or {}).get(name)) is not None}
    return hashlib.sha256(canonical([prompt, seen] if seen else [prompt])).hexdigest()[:16]
