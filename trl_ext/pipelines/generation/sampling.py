"""The sampling arguments, declared and checked in one place (`Sampling`).

The command line and `RejectionSamplingConfig` inherit the fields from here. This module knows no models and no
servers, and imports neither torch nor transformers, so that `--help` is fast.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl_ext.pipelines.user_functions import did_you_mean


Backend = Literal["transformers", "vllm", "openai"]
BACKENDS = ("transformers", "vllm", "openai")

Chat = list[dict[str, Any]]


def described(default: Any, text: str) -> Any:
    """A dataclass field with a default and a help text."""
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class GRPOSamplingFields:
    """The sampling arguments that `trl.GRPOConfig` has too, with its names and defaults; see [`Sampling`]."""

    max_completion_length: int = described(512, "Longest completion in tokens.")
    temperature: float = described(1.0, "Temperature of sampling; 0 decodes greedily.")
    top_p: float = described(1.0, "Nucleus sampling: share of the probability to keep; 1 switches it off.")
    top_k: int = described(0, "Number of likeliest tokens to keep; 0 switches it off.")
    min_p: float | None = described(None, "Smallest probability to keep, relative to that of the likeliest token.")
    repetition_penalty: float = described(1.0, "Penalty for repeated tokens; 1 switches it off.")
    generation_kwargs: dict[str, Any] | str | None = described(
        None, "Further arguments of GenerationConfig, or of requests to the server, as JSON."
    )
    chat_template_kwargs: dict[str, Any] | str | None = described(
        None, "Arguments of the chat template in generation, as JSON."
    )


@dataclass(kw_only=True)
class SamplingFields(GRPOSamplingFields):
    """All sampling arguments; [`Sampling`] explains and checks them."""

    stop: list[str] | None = described(None, "Texts that end a completion; they are not part of it.")
    chat_template: str | None = described(None, "Jinja template, or its path, in place of the model's template.")
    system_prompt: str | None = described(
        None, "System message for chats that have none; the model sees it, the rows do not keep it."
    )
    few_shot: list[dict[str, Any]] | None = described(
        None, "Examples (prompt, completion) that the model sees before each prompt."
    )


@dataclass(kw_only=True)
class Sampling(SamplingFields):
    """
    How completions are sampled. Names and defaults are those of `GRPOConfig`.

    The model's `generation_config.json` is not used, neither in this process nor on a vLLM server. An argument that is
    off here is off.

    Args:
        max_completion_length (`int`, *optional*, defaults to `512`): longest completion in tokens.
        temperature (`float`, *optional*, defaults to `1.0`): 0 decodes greedily, so a prompt has only one completion.
        top_p (`float`, *optional*, defaults to `1.0`): nucleus; 1 switches it off.
        top_k (`int`, *optional*, defaults to `0`): number of likeliest tokens to keep; 0 switches it off.
        min_p (`float`, *optional*): smallest probability to keep, relative to that of the likeliest token.
        repetition_penalty (`float`, *optional*, defaults to `1.0`): 1 switches it off.
        stop (`list[str]`, *optional*): texts that end a completion; they are not part of it.
        generation_kwargs (`dict`, *optional*): further arguments by the backend's names: those of `GenerationConfig`,
            or keys of the request to a server. They take precedence over the arguments above.
        chat_template (`str`, *optional*): a Jinja template, or the path of one, in place of the model's template.
        chat_template_kwargs (`dict`, *optional*): arguments of the template; a row's column of this name takes
            precedence.
        system_prompt (`str`, *optional*): system message for chat prompts that have none. The model sees it; the
            record keeps the prompt of the data set.
        few_shot (`list[dict]`, *optional*): examples `{"prompt", "completion"}` that the model sees before the prompt:
            as earlier turns of a chat, or as text with a blank line after each.

    Raises:
        ValueError: a value is out of its range.
    """

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
        for name in ("stop", "few_shot"):
            if getattr(self, name) is not None:
                setattr(self, name, list(getattr(self, name)))
        for number, example in enumerate(self.few_shot or []):
            if not {"prompt", "completion"} <= set(example):
                raise ValueError(f"few_shot[{number}] has the keys {sorted(example)}; needed: 'prompt', 'completion'.")
        template = self.chat_template
        if template is not None and "{" not in template:  # a path, as in TRL's chat_template_path
            self.chat_template = Path(template).read_text(encoding="utf-8")

    @classmethod
    def of(cls, **arguments: Any) -> "Sampling":
        """Build from keyword arguments. An unknown one raises `TypeError`, which names the nearest."""
        known = [item.name for item in dataclasses.fields(cls)]
        for name in arguments:
            if name not in known:
                hint = did_you_mean(name, known)
                raise TypeError(f"Unknown sampling argument '{name}'.{hint} Known: {', '.join(known)}.")
        return cls(**arguments)

    def context(self, prompt: str | Chat) -> str | Chat:
        """The prompt as the model sees it, with the system prompt and the examples before it."""
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
