"""What a sampled completion is: `Sample`, its form in a file, and the identity of a prompt.

Knows nothing of models, of scorers or of where records are kept.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trl_ext.data.tokenization import Prompt


FinishReason = Literal["stop", "length"]

# Columns that change what the model sees of a prompt, through its chat template.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(slots=True)
class Sample:
    """
    One completion of one prompt, and what is known about it.

    Args:
        prompt_id (`str`): identity of the prompt, see [`prompt_id`].
        sample_index (`int`): which of the prompt's completions this is, from 0.
        prompt (`str` or `list[dict]`): text or messages, as in the data set.
        completion (`str` or `list[dict]`): text, or one assistant message after a chat prompt.
        token_ids (`list[int]`, *optional*): tokens of the completion, with its end token; not every server tells.
        finish_reason (`str`): `"stop"`, or `"length"` for a completion that was cut at `max_completion_length`.
        logprob (`float`, *optional*): sum of the tokens' log-probabilities under the model, if the backend tells.
        seed (`int`): seed that it was generated with (that of its shard, or of its request).
        scores (`dict[str, float | None]`): reward function to score; `None` is unscorable. Empty before scoring.
        score (`float`, *optional*): the weighted total; `None` before scoring and where no function gave a score.
        columns (`dict`): the other columns of the prompt's row.
        latency (`float`, *optional*): seconds that the request, or the in-process batch, took.
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

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Sample":
        """The inverse of [`~Sample.to_json`]."""
        return cls(**record)


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion: itself, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, for hashing."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def prompt_id(prompt: Prompt, columns: dict[str, Any] | None = None) -> str:
    """
    The identity of a prompt: a hash of its content, the same in every run and on every machine.

    Args:
        prompt (`str` or `list[dict]`): text or messages.
        columns (`dict`, *optional*): the row's other columns, of which `tools` and `chat_template_kwargs` count.

    Example:

    ```python
    >>> prompt_id("2 + 2 =")
    'cd8bac32bb69bf62'
    ```
    """
    seen = {name: value for name in TEMPLATE_COLUMNS if (value := (columns or {}).get(name)) is not None}
    return hashlib.sha256(canonical([prompt, seen] if seen else [prompt])).hexdigest()[:16]
