"""The backend `openai`: any server with OpenAI's protocol. It gets chats as messages and texts as texts.

The server applies the chat template and the tokenizer. This module knows requests and answers, and nothing of shards
or scores.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from trl_ext.data.chat_templates import template_options, without_nulls
from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.generator import (
    Columns,
    GenerationError,
    LabelError,
    cut_at_stop,
    number_for_each,
    sample_seed,
    template_kwargs,
    with_bounds,
)
from trl_ext.pipelines.generation.records import Completion, ends_with_begun_answer, prompt_id
from trl_ext.pipelines.generation.sampling import Chat, Sampling
from trl_ext.pipelines.generation.vllm_backend import (
    NO_LOGPROBS,
    TOP,
    UNCHANGED,
    arguments_that_vllm_fills_in,
    check_generation_kwargs,
    known_arguments,
    served_model,
)
from trl_ext.serving.served_models import cards_of
from trl_ext.serving.server_pool import ServerPool


_LIKELY = math.log(0.05)  # a less likely beginning of a label hardly changes its probability
_TOP_OF_CHATS = {"logprobs": True, "top_logprobs": TOP}


class OpenAIGenerator:
    """
    Completes prompts with an OpenAI-compatible server; see [`~trl_ext.pipelines.generation.generator.Generator`].

    Chats go to `/v1/chat/completions`, texts to `/v1/completions`. Each completion is a request with its own seed,
    because not every server supports `n`. The request depends on the server:

    - vLLM gets every sampling argument, even one that is off, because it takes missing ones from the model's
      `generation_config.json`. The request asks for token ids and log-probabilities.
    - `transformers serve` gets sampling arguments other than `temperature` and `top_p` inside `generation_config`; it
      ignores them elsewhere.
    - Other servers do not get arguments that are off, because not every server knows them.

    A chat that ends with a begun answer is sent with the arguments that make vLLM and SGLang continue it. Other
    servers may refuse these.

    Args:
        servers ([`~trl_ext.serving.server_pool.ServerPool`]): one server, or several with one model.
        model (`str`): the model's name on the servers.
        sampling ([`~trl_ext.pipelines.generation.sampling.Sampling`]): how to sample.

    Raises:
        [`GenerationError`]: no server answers.
        ValueError: `generation_kwargs` has a key that this backend sets, or that a vLLM server does not know.
    """

    def __init__(self, servers: ServerPool, model: str, sampling: Sampling):
        self._servers = servers
        self.together = servers.together
        self._model = model
        self._sampling = sampling
        routes = next(iter(servers.describe("/openapi.json").values())) or {}
        self._is_transformers = "/load_model" in routes.get("paths", {})  # a route that only it has
        self._is_vllm, known = False, None
        if not self._is_transformers:
            for url, answer in servers.describe("/v1/models").items():
                if any(card.get("owned_by") == "vllm" for card in cards_of(answer)):
                    self._is_vllm, (self._model, _) = True, served_model(url, answer, model)
        if self._is_vllm:
            known = known_arguments(servers, ("CompletionRequest", "ChatCompletionRequest"))
        check_generation_kwargs(sampling.generation_kwargs, known)

    def generate(
        self,
        prompts: Sequence[str | Chat],
        num_generations: int | Sequence[int],
        seed: int,
        columns: Sequence[Columns] | None = None,
    ) -> list[list[Completion]]:
        """See [`~trl_ext.pipelines.generation.generator.Generator`]."""
        jobs, before = [], Counter()  # completions of equal prompts earlier in this call
        prompts = list(prompts)
        numbers = number_for_each(prompts, num_generations)
        for row, prompt in enumerate(prompts):
            given = columns[row] if columns is not None else {}
            path, body = self._request(row, prompt, given)
            name = prompt_id(prompt, given)
            for index in range(numbers[row]):
                request_seed = sample_seed(seed, name, before[name] + index)
                full = body | {"seed": request_seed} | (self._sampling.generation_kwargs or {})
                jobs.append(partial(self._servers.ask, path, full, partial(self._read, request_seed)))
            before[name] += numbers[row]
        found = iter(self._servers.map(jobs))
        return [list(islice(found, number)) for number in numbers]

    chats = True  # the server applies the chat template

    def label_logprobs(self, prompts: Sequence[str | Chat], labels: Sequence[str]) -> list[list[float | None]]:
        """
        See [`~trl_ext.pipelines.generation.generator.Generator`].

        The server's tokenizer is not known here. If a label is not among the likeliest tokens, and a likely token is
        its beginning, the label is several tokens there, and a [`LabelError`] is raised.
        """
        jobs = []
        for row, prompt in enumerate(prompts):
            path, body = self._request(row, prompt, {})
            body |= UNCHANGED | ({"logprobs": TOP} if "prompt" in body else _TOP_OF_CHATS)
            body |= self._sampling.generation_kwargs or {}
            jobs.append(partial(self._servers.ask, path, body, self._read_likeliest))
        return [self._label_logprobs(labels, likeliest) for likeliest in self._servers.map(jobs)]

    def _read_likeliest(self, answer: Any, latency: float) -> list[tuple[str, float]]:
        """The likeliest first tokens of an answer, without the spaces around them, and their log-probabilities."""
        given = answer["choices"][0].get("logprobs") or {}
        if "content" in given:
            places = [
                [(one["token"], one["logprob"]) for one in item["top_logprobs"]] for item in given["content"] or ()
            ]
        else:
            places = [list(item.items()) for item in given.get("top_logprobs") or ()]
        if not places or not places[0]:
            raise GenerationError(f"{self._servers} returned no log-probabilities. {NO_LOGPROBS}")
        return [(token.strip(), value) for token, value in places[0]]

    def _label_logprobs(self, labels: Sequence[str], likeliest: list[tuple[str, float]]) -> list[float | None]:
        found = [[value for token, value in likeliest if token == label] for label in labels]
        for label, values in zip(labels, found, strict=True):
            parts = [token for token, value in likeliest if token and label.startswith(token) and value > _LIKELY]
            if not values and parts:
                raise LabelError(
                    f"The label {label!r} is not a single token of the server's model: it begins "
                    f"with the token {parts[0]!r}. Give other labels, with the template that asks for them."
                )
        return with_bounds(found, [value for _, value in likeliest])

    def _request(self, row: int, prompt: str | Chat, columns: Columns) -> tuple[str, dict[str, Any]]:
        sampling = self._sampling
        prompt = sampling.context(prompt)
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.stop:
            body["stop"] = sampling.stop
        extra: dict[str, Any] = {"top_k": (sampling.top_k, 0), "min_p": (sampling.min_p, None)}
        extra |= {"repetition_penalty": (sampling.repetition_penalty, 1.0)}
        extra = {name: value for name, (value, off) in extra.items() if value != off}
        if self._is_transformers:
            config = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_completion_length}
            config |= {"top_k": sampling.top_k} | extra  # its default for top_k is 50
            body["generation_config"] = json.dumps(config)
        elif self._is_vllm:
            body |= arguments_that_vllm_fills_in(sampling) | {"return_token_ids": True}
        else:
            body |= extra
        if isinstance(prompt, str):
            return "/v1/completions", body | {"prompt": prompt} | ({"logprobs": 0} if self._is_vllm else {})
        if self._is_vllm:
            body |= {"logprobs": True, "top_logprobs": 0}
        if ends_with_begun_answer(prompt):  # the model continues it, as in TRL
            if self._is_transformers:
                raise DataError(
                    "a chat that ends with a begun answer; `transformers serve` would begin a new answer",
                    "a server that continues it",
                    "Use the backend 'transformers' or 'vllm', another server, or end the chat with a question.",
                    row=row,
                    column="prompt",
                )
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        given = {
            "chat_template": sampling.chat_template,
            "chat_template_kwargs": template_kwargs(sampling, columns),
            "tools": template_options(columns.get("tools"), None)["tools"],
        }
        return "/v1/chat/completions", body | {"messages": without_nulls(prompt)} | {
            key: value for key, value in given.items() if value
        }

    def _read(self, seed: int, answer: Any, latency: float) -> Completion:
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError(f"its text is a {type(text).__name__}")
        reason = "length" if choice.get("finish_reason") == "length" else "stop"
        cut = cut_at_stop(text, self._sampling.stop)
        ids, (pieces, logprobs) = choice.get("token_ids"), _tokens(choice)
        if cut != text or isinstance(
            choice.get("stop_reason"), str
        ):  # the tokens include the stop text, and the text does not
            reason, kept = "stop", _tokens_of(cut, pieces)
            ids = ids[:kept] if ids is not None and kept is not None else None
            logprobs = logprobs[:kept] if kept is not None else []
        return Completion(cut, ids, reason, sum(logprobs) if logprobs else None, seed, latency)


def _tokens(choice: dict[str, Any]) -> tuple[list[str], list[float]]:
    """The tokens' texts and log-probabilities; empty if the server does not return them."""
    given = choice.get("logprobs") or {}
    content = given.get("content") or ()
    pieces = given.get("tokens") or [entry["token"] for entry in content]
    return pieces, given.get("token_logprobs") or [entry["logprob"] for entry in content]


def _tokens_of(text: str, pieces: Sequence[str]) -> int | None:
    """How many tokens make up a text that was cut at a stop text; `None` if no number of them gives that text."""
    if not "".join(pieces).startswith(text):
        return None
    count = len(pieces)
    while count and len("".join(pieces[: count - 1])) >= len(text):
        count -= 1
    return count
