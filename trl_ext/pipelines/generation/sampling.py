"""Generating completions: what is asked (`Sampling`), what comes back (`Completion`), who does it (`Generator`).

Knows prompts and texts. The backends are in `in_process` (transformers) and `servers` (vLLM through TRL's client, and
any OpenAI-compatible server); `backends` makes them by name. Knows nothing of scores or of where completions are kept.
"""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.records import FinishReason, canonical


Backend = Literal["transformers", "vllm", "openai"]
BACKENDS = ("transformers", "vllm", "openai")

Chat = list[dict[str, Any]]
Columns = dict[str, Any]


class GenerationError(RuntimeError):
    """A backend cannot go on; the message says what was found and what to do."""


@dataclass(frozen=True)
class Sampling:
    """
    How completions are drawn. The names are those of `GRPOConfig`, and so are the defaults.

    Args:
        max_completion_length (`int`, *optional*, defaults to `512`): longest completion in tokens.
        temperature (`float`, *optional*, defaults to `1.0`): 0 decodes greedily, which gives one completion a prompt.
        top_p (`float`, *optional*, defaults to `1.0`): nucleus; 1 switches it off.
        top_k (`int`, *optional*, defaults to `0`): highest-probability tokens to keep; 0 switches it off.
        min_p (`float`, *optional*): least probability, scaled by that of the likeliest token.
        repetition_penalty (`float`, *optional*, defaults to `1.0`): 1 switches it off.
        stop (`list[str]`, *optional*): texts that end a completion; they are not part of it.
        generation_kwargs (`dict`, *optional*): further arguments, as the backend knows them: those of
            `GenerationConfig`, or keys of the request to a server. They win over the above.
        chat_template (`str`, *optional*): a Jinja template, or the path of one, in place of the model's own.
        chat_template_kwargs (`dict`, *optional*): arguments of the template; a row's own column of this name wins.
        system_prompt (`str`, *optional*): put before chat prompts that have no system message. The model sees it; the
            record's prompt stays that of the data set.
        few_shot (`list[dict]`, *optional*): examples `{"prompt", "completion"}` that the model sees before the prompt:
            as earlier turns of a chat, or as text with a blank line after each.
    """

    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: list[str] | None = None
    generation_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    system_prompt: str | None = None
    few_shot: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_completion_length": (self.max_completion_length >= 1, "a number of tokens >= 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and up to 1 (off)"),
            "top_k": (self.top_k >= 0, "0 (off) or a number of tokens"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "None (off) or a number from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "a positive number (1 is off)"),
            "stop": (self.stop is None or all(self.stop) and not isinstance(self.stop, str), "a list of texts"),
        }
        for name, (fine, needed) in checks.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r}; needed: {needed}.")
        for number, example in enumerate(self.few_shot or []):
            if not {"prompt", "completion"} <= set(example):
                raise ValueError(f"few_shot[{number}] has the keys {sorted(example)}; needed: 'prompt', 'completion'.")
        template = self.chat_template
        if template is not None and "{" not in template:  # a path, as in TRL's chat_template_path
            object.__setattr__(self, "chat_template", Path(template).read_text(encoding="utf-8"))

    @classmethod
    def of(cls, **arguments: Any) -> "Sampling":
        """From keyword arguments; an unknown one is an error that names the nearest."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise TypeError(f"Unknown sampling argument '{name}'.{hint} Known: {', '.join(known)}.")
        return cls(**arguments)

    def context(self, prompt: str | Chat) -> str | Chat:
        """The prompt as the model sees it: behind the system prompt and the examples."""
        examples = self.few_shot or []
        if isinstance(prompt, str):
            return "".join(f"{example['prompt']}{example['completion']}\n\n" for example in examples) + prompt
        system = prompt[:1] if prompt[0]["role"] == "system" else []
        if not system and self.system_prompt is not None:
            system = [{"role": "system", "content": self.system_prompt}]
        turns = []
        for example in examples:
            turns += _turn(example["prompt"], "user") + _turn(example["completion"], "assistant")
        return [*system, *turns, *(prompt[1:] if prompt[0]["role"] == "system" else prompt)]


def _turn(value: str | Chat, role: str) -> Chat:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


@dataclass(slots=True)
class Completion:
    """What a backend gives for one completion; the fields are those of [`Sample`]."""

    text: str
    token_ids: list[int] | None
    finish_reason: FinishReason
    logprob: float | None
    seed: int
    latency: float


class Generator(Protocol):
    """Something that completes prompts."""

    def generate(
        self,
        prompts: Sequence[str | Chat],
        num_generations: int,
        seed: int,
        columns: Sequence[Columns] | None = None,
    ) -> list[list[Completion]]:
        """
        Complete each prompt `num_generations` times.

        Args:
            prompts (sequence of `str` or lists of messages): none of them empty.
            num_generations (`int`): completions of each.
            seed (`int`): the same call with the same seed gives the same completions, as far as the backend can.
            columns (sequence of `dict`, *optional*): a prompt's own `tools` and `chat_template_kwargs`.

        Returns:
            `list[list[Completion]]`: `num_generations` for each prompt, in the order of the prompts.

        Raises:
            [`GenerationError`]: the backend fails. [`DataError`]: a prompt cannot be used; names its index.
        """


_CONTEXT = 8  # tokens of a prompt that decide how its completion's first ones read


class PromptEncoder:
    """Token ids of prompts, with the chat template and what `Sampling` puts before them; finished completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling):
        self.tokenizer = tokenizer
        self._sampling = sampling

    def ids(self, prompts: Sequence[str | Chat], columns: Sequence[Columns] | None) -> list[list[int]]:
        """Token ids of each prompt. Raises [`DataError`] with the index of one that cannot be tokenized."""
        encoded = []
        for row, prompt in enumerate(prompts):
            own = columns[row] if columns is not None else {}
            try:
                ids = self._encode(self._sampling.context(prompt), own)
            except Exception as error:  # templates raise whatever they like
                raise DataError(
                    f"a prompt on which the tokenizer fails with {type(error).__name__}: {error}",
                    "a prompt that the tokenizer and its chat template accept",
                    "Correct or remove the row, or give another `chat_template`.",
                    row=row,
                    column="prompt",
                ) from error
            if not ids:
                raise DataError(
                    "a prompt without a token", "at least one token", "Remove the row.", row=row, column="prompt"
                )
            encoded.append(ids)
        return encoded

    def _encode(self, prompt: str | Chat, columns: Columns) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        goes_on = prompt[-1]["role"] == "assistant"  # a begun answer is continued, as in TRL
        kwargs = {**(self._sampling.chat_template_kwargs or {}), **(columns.get("chat_template_kwargs") or {})}
        return self.tokenizer.apply_chat_template(
            prompt,
            tools=columns.get("tools"),
            chat_template=self._sampling.chat_template,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            return_dict=False,
            **kwargs,
        )

    def finished(
        self, prompt: str | Chat, before: list[int], ids: list[int], ends: set[int], max_length: int
    ) -> tuple[str, list[int], FinishReason]:
        """
        Text, token ids and finish reason of the ids generated after a prompt of the ids `before`: up to the first end
        token, or a text of `stop`.
        """
        before = before[-_CONTEXT:] if isinstance(prompt, str) else []
        for place, token in enumerate(ids):
            if token in ends:
                ids, reason = ids[: place + 1], "stop"
                break
        else:
            reason = "length" if len(ids) >= max_length else "stop"
        text = self._text(before, ids)
        cut = cut_at_stop(text, self._sampling.stop)
        if cut != text:
            reason = "stop"
            while ids and cut_at_stop(self._text(before, ids[:-1]), self._sampling.stop) == cut:
                ids = ids[:-1]  # what came after the text, and its end
        return cut, ids, reason

    def _text(self, before: list[int], ids: list[int]) -> str:
        """The text that ids add to what is before: SentencePiece drops a space where a text begins, and only there."""
        whole = self.tokenizer.decode([*before, *ids], skip_special_tokens=True)
        start = self.tokenizer.decode(before, skip_special_tokens=True) if before else ""
        return whole[len(start) :] if whole.startswith(start) else self.tokenizer.decode(ids, skip_special_tokens=True)


def cut_at_stop(text: str, stop: Sequence[str] | None) -> str:
    """The text before the first of the stop texts."""
    places = [place for item in stop or () if (place := text.find(item)) >= 0]
    return text[: min(places)] if places else text


def sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """The seed of one request, from the run's seed and what the request is for; below 2³¹, which any server takes."""
    return int.from_bytes(hashlib.sha256(canonical([seed, prompt_id, sample_index])).digest()[:4], "little") >> 1
