"""The backend `vllm`: sends token ids to `/v1/completions` of `vllm serve`, and gets token ids back.

The chat template is applied here, so the model sees the same tokens as in TRL's trainers. Every sampling argument is
sent, even one that is off, because vLLM takes missing ones from the model's `generation_config.json`. vLLM itself is
not imported. This module knows nothing of shards or scores.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_ext.pipelines.generation.generator import (
    Columns,
    GenerationError,
    PromptEncoder,
    number_for_each,
    sample_seed,
    with_bounds,
)
from trl_ext.pipelines.generation.records import Completion, prompt_id
from trl_ext.pipelines.generation.sampling import Chat, Sampling
from trl_ext.pipelines.user_functions import did_you_mean
from trl_ext.serving.served_models import cards_of, find_card, longest_text, names_of
from trl_ext.serving.server_pool import ServerPool


logger = logging.getLogger(__name__)


# Keys of a request that the backends set, because they decide what the server returns.
SET_HERE = ("n", "best_of", "seed", "stream", "echo", "model", "prompt", "messages", "logprobs", "top_logprobs")
SET_HERE += ("return_token_ids", "use_beam_search")

TOP = 20  # log-probabilities of a token that are requested: the most that vLLM and OpenAI return by default
# A request for log-probabilities samples one token from the model's distribution as it is.
UNCHANGED = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
NO_LOGPROBS = (
    "Needed: a server with `top_logprobs`, such as vLLM. Or judge with the model in this process "
    "(backend='transformers'), or count the labels in sampled answers (read='share')."
)


class VLLMGenerator:
    """
    Completes prompts with vLLM; see [`~trl_ext.pipelines.generation.generator.Generator`].

    Each prompt is one request with a separate seed.

    Args:
        servers ([`~trl_ext.serving.server_pool.ServerPool`]): one or several `vllm serve MODEL`.
        model (`str` or `Path`): the folder or id that the servers serve.
        sampling ([`~trl_ext.pipelines.generation.sampling.Sampling`]): how to sample.
        tokenizer (`PreTrainedTokenizerBase`): the policy's tokenizer.

    Raises:
        [`GenerationError`]: no server answers, or a server has another model.
        ValueError: `generation_kwargs` has a key that vLLM does not know, or that this backend sets.
    """

    def __init__(self, servers: ServerPool, model: str | Path, sampling: Sampling, tokenizer: PreTrainedTokenizerBase):
        self._servers = servers
        self.together = servers.together
        self._sampling = sampling
        self._encoder = PromptEncoder(tokenizer, sampling)
        self._model: str | None = None
        self._limit: int | None = None
        answers = servers.describe("/v1/models")
        if Path(model, "adapter_config.json").is_file():
            answers = {url: _with_adapter(servers, url, answer, Path(model)) for url, answer in answers.items()}
        for url, answer in answers.items():
            name, limit = served_model(url, answer, str(model))
            if self._model not in (None, name):
                raise GenerationError(
                    f"{servers} serve models of different names ({self._model}, {name}). Needed: the same one."
                )
            self._model = name
            self._limit = min((one for one in (self._limit, limit) if one is not None), default=None)
        check_generation_kwargs(sampling.generation_kwargs, known_arguments(servers, ("CompletionRequest",)))

    def generate(
        self,
        prompts: Sequence[str | Chat],
        num_generations: int | Sequence[int],
        seed: int,
        columns: Sequence[Columns] | None = None,
    ) -> list[list[Completion]]:
        """See [`~trl_ext.pipelines.generation.generator.Generator`]."""
        prompts = list(prompts)
        encoded = self._encoder.ids(prompts, columns)
        longest = (self._sampling.generation_kwargs or {}).get("max_tokens", self._sampling.max_completion_length)
        self._encoder.check_lengths(encoded, longest, self._limit)
        jobs, before = [], Counter()  # completions of equal prompts earlier in this call
        for row, (ids, number) in enumerate(zip(encoded, number_for_each(prompts, num_generations), strict=True)):
            name = prompt_id(prompts[row], None if columns is None else columns[row])
            request_seed = sample_seed(seed, name, before[name])
            before[name] += number
            body = self._body(ids, number, request_seed)
            read = partial(self._read, prompts[row], ids, number, longest, request_seed)
            jobs.append(partial(self._servers.ask, "/v1/completions", body, read))
        return self._servers.map(jobs)

    @property
    def chats(self) -> bool:
        """Whether prompts can be chats: the tokenizer has a chat template."""
        given = self._sampling.chat_template or getattr(self._encoder.tokenizer, "chat_template", None)
        return bool(given)  # tokenizers from outside transformers may not have the attribute

    def prompt_lengths(self, prompts: Sequence[str | Chat], columns: Sequence[Columns] | None = None) -> list[int]:
        """How many tokens each prompt has."""
        return [len(ids) for ids in self._encoder.ids(prompts, columns)]

    @property
    def longest_prompt(self) -> int | None:
        """The most tokens that a prompt may have beside the longest completion; `None` without a limit."""
        longest = (self._sampling.generation_kwargs or {}).get("max_tokens", self._sampling.max_completion_length)
        return None if self._limit is None else self._limit - longest

    def label_logprobs(self, prompts: Sequence[str | Chat], labels: Sequence[str]) -> list[list[float | None]]:
        """See [`~trl_ext.pipelines.generation.generator.Generator`]."""
        prompts, jobs = list(prompts), []
        for prompt, ids in zip(prompts, self._encoder.ids(prompts, None), strict=True):
            body = self._body(ids, 1, 0) | UNCHANGED | {"logprobs": TOP, "return_tokens_as_token_ids": True}
            read = partial(self._read_labels, self._encoder.label_tokens(prompt, labels))
            jobs.append(partial(self._servers.ask, "/v1/completions", body, read))
        return self._servers.map(jobs)

    def _read_labels(self, labels: list[list[int]], answer: Any, latency: float) -> list[float | None]:
        given = (answer["choices"][0].get("logprobs") or {}).get("top_logprobs")
        if not given:
            raise GenerationError(f"{self._servers} returned no log-probabilities. {NO_LOGPROBS}")
        logprobs = {int(name.removeprefix("token_id:")): value for name, value in given[0].items()}
        return with_bounds(
            [[logprobs[token] for token in ids if token in logprobs] for ids in labels], logprobs.values()
        )

    def _body(self, ids: list[int], num_generations: int, seed: int) -> dict[str, Any]:
        sampling = self._sampling
        body = {
            "model": self._model,
            "prompt": ids,
            "n": num_generations,
            "seed": seed,
            "max_tokens": sampling.max_completion_length,
            **arguments_that_vllm_fills_in(sampling),
            "logprobs": 0,  # only the log-probability of the sampled token
            "return_token_ids": True,
        }
        if sampling.stop:
            body["stop"] = sampling.stop
        return body | (sampling.generation_kwargs or {})

    def _read(
        self,
        prompt: str | Chat,
        before: list[int],
        num_generations: int,
        longest: int,
        seed: int,
        answer: Any,
        latency: float,
    ) -> list[Completion]:
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
        if len(choices) != num_generations:
            raise GenerationError(
                f"{self._servers} returned {len(choices)} completions; requested: {num_generations}. Needed: a server "
                "that supports `n`, as vLLM does."
            )
        ends = {self._encoder.tokenizer.eos_token_id} - {None}
        found = []
        for choice in choices:
            ids = choice.get("token_ids")
            if ids is None:
                raise GenerationError(
                    f"{self._servers} returned no token ids. Needed: vLLM 0.10.2 or newer; for other servers use "
                    "backend='openai'."
                )
            text, kept, reason = self._encoder.finished(prompt, before, ids, ends, longest)
            whole = len(kept) == len(ids) and not (kept and kept[-1] in ends)
            if whole and choice.get("finish_reason") is not None:  # the server knows every end token
                reason = "length" if choice["finish_reason"] == "length" else "stop"
            values = choice["logprobs"]["token_logprobs"][: len(kept)]
            found.append(Completion(text, kept, reason, None if None in values else sum(values), seed, latency))
        return found


def arguments_that_vllm_fills_in(sampling: Sampling) -> dict[str, Any]:
    """The arguments, as vLLM writes them, that it takes from `generation_config.json` if a request lacks them."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,  # 0 is off there too
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def served_model(url: str, answer: Any, model: str) -> tuple[str, int | None]:
    """
    The model's name on a server, and the longest text in tokens that the server accepts, if it says so.

    Raises:
        [`GenerationError`]: the server does not serve the model.
    """
    cards = cards_of(answer)
    if not cards:
        raise GenerationError(
            f"The server at {url} does not say which models it serves (/v1/models). Needed: `vllm serve {model}`."
        )
    card = find_card(cards, model)
    if card is None and len(cards) == 1:
        card = cards[0]
        logger.warning(
            f"The server at {url} serves {card['id']}, and the model is given as {model}. Both must have the same "
            "weights and the same tokenizer."
        )
    if card is None:
        raise GenerationError(
            f"The server at {url} serves {names_of(cards)}, and not {model}. Start it with `vllm serve {model}`, or "
            "correct server_base_url."
        )
    return card["id"], longest_text(card, cards)


def _with_adapter(servers: ServerPool, url: str, answer: Any, folder: Path) -> Any:
    """
    What a server says about an adapter and its base, after it has loaded an adapter that it did not have.

    The adapter's name there is its whole path, because the policies of several rounds have the same last name, and a
    hash of its content, because another run may have written other weights to that path. A server that was started
    with the adapter knows it by the name given there, on another machine by the last part of its path.

    Raises:
        [`GenerationError`]: it does not have the adapter, and does not load it.
    """
    path, config = str(folder.resolve()), json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = f"{path}@{_content_key(folder)}"
    cards = cards_of(answer)
    here = [card for card in cards if path in (card["id"], str(card.get("root") or "").rstrip("/"))]
    others = [card for card in cards if card not in here]
    for card in here:
        if card["id"] == name or not card["id"].startswith(f"{path}@"):
            return {"data": [card, *others]}
    base = Path(config.get("base_model_name_or_path") or "")
    if base.name and base.name not in {Path(str(card.get("root") or card["id"])).name for card in others}:
        logger.warning(
            f"The server at {url} serves {names_of(others)}, and the adapter {folder} was trained on {base}. Both "
            "bases must have the same weights."
        )
    objection = servers.tell(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
    if objection is None:
        return {"data": [{"id": name, "root": path}, *others]}
    elsewhere = [card for card in cards if card["id"] == folder.name and not Path(str(card.get("root"))).is_dir()]
    if elsewhere:
        return {"data": elsewhere}
    raise GenerationError(
        f"The server at {url} serves {names_of(cards)}, and not the adapter {folder}, and does not load it "
        f"({objection}). Start it with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora "
        f"--max-lora-rank {config.get('r')}`, or with `--lora-modules {folder.name}={path}`."
    )


def _content_key(adapter: Path) -> str:
    """A hash of an adapter's weights and configuration."""
    digest = hashlib.sha256()
    for file in sorted(adapter.glob("adapter_*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def known_arguments(servers: ServerPool, schemas: Iterable[str]) -> set[str] | None:
    """The keys that a request may have according to the server's description; `None` if there is none."""
    for answer in servers.describe("/openapi.json").values():
        described = ((answer or {}).get("components") or {}).get("schemas") or {}
        keys = {key for name in schemas for key in described.get(name, {}).get("properties", ())}
        if keys:
            return keys
    return None


def check_generation_kwargs(kwargs: dict[str, Any] | None, known: set[str] | None) -> None:
    """Raise `ValueError` for a key of `generation_kwargs` that a server would ignore, or that the backend sets."""
    for name in kwargs or {}:
        if name in SET_HERE:
            raise ValueError(
                f"generation_kwargs has {name!r}, which the backend sets. Remove it; use num_generations (n) and seed "
                "for the number and the seed of the completions."
            )
        if known is not None and name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"generation_kwargs has {name!r}, which the server does not know and ignores.{hint}")
