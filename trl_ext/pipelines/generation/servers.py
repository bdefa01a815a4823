"""Backends that ask a server: vLLM through TRL's own client, and anything that speaks OpenAI's protocol.

A request that fails for a reason that may pass is repeated, with growing pauses; one that fails for good stops the
rest. Knows requests and answers. Knows nothing of shards or scores.
"""

import http.client
import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from trl_ext.data.validation import DataError
from trl_ext.pipelines.generation.generator import (
    Columns,
    GenerationError,
    PromptEncoder,
    cut_at_stop,
    sample_seed,
)
from trl_ext.pipelines.generation.records import Completion, prompt_id
from trl_ext.pipelines.generation.sampling import Chat, Sampling


logger = logging.getLogger(__name__)

T = TypeVar("T")

REPEATED = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # HTTP answers that may be others when asked again
LONGEST_PAUSE = 60.0


def in_parallel(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of jobs in their order. The first failure cancels what has not begun, and is raised."""
    futures: list[Future[T]] = [pool.submit(job) for job in jobs]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _own(columns: Sequence[Columns] | None, row: int) -> Columns:
    return columns[row] if columns is not None else {}


class VLLMGenerator:
    """
    Completes prompts with TRL's `VLLMClient`; see [`~trl_ext.pipelines.generation.generator.Generator`].

    Prompts travel as token ids, so that the model sees what TRL's trainers show it, and come back as token ids with
    their log-probabilities. One request a prompt, with a seed of its own.
    """

    def __init__(
        self,
        base_url: str,
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        timeout: float = 240.0,
        max_concurrency: int = 64,
    ):
        from trl.generation.vllm_client import VLLMClient

        self._url = base_url.rstrip("/").removesuffix("/v1")
        try:
            self._client = VLLMClient(base_url=self._url, connection_timeout=timeout)
        except OSError as error:  # a ConnectionError of `requests`
            raise GenerationError(
                f"{error} Start it with: trl vllm-serve --model MODEL, or give server_base_url."
            ) from error
        self._sampling = sampling
        self._encoder = PromptEncoder(tokenizer, sampling)
        self._pool = ThreadPoolExecutor(max_concurrency)

    def generate(
        self,
        prompts: Sequence[str | Chat],
        num_generations: int,
        seed: int,
        columns: Sequence[Columns] | None = None,
    ) -> list[list[Completion]]:
        """See [`~trl_ext.pipelines.generation.generator.Generator`]."""
        jobs = []
        for row, ids in enumerate(self._encoder.ids(prompts, columns)):
            own_seed = sample_seed(seed, prompt_id(prompts[row], _own(columns, row)), 0)
            prompt = prompts[row]
            jobs.append(
                lambda prompt=prompt, ids=ids, own_seed=own_seed: self._ask(prompt, ids, num_generations, own_seed)
            )
        return in_parallel(self._pool, jobs)

    def _ask(self, prompt: str | Chat, ids: list[int], num_generations: int, seed: int) -> list[Completion]:
        sampling = self._sampling
        extra: dict[str, Any] = {"seed": seed}
        if sampling.stop:
            extra["stop"] = sampling.stop
        extra |= sampling.generation_kwargs or {}
        started = time.perf_counter()
        try:
            answer = self._client.generate(
                [ids],
                n=num_generations,
                repetition_penalty=sampling.repetition_penalty,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p or 0.0,
                max_tokens=sampling.max_completion_length,
                logprobs=0,
                generation_kwargs=extra,
            )
        except Exception as error:  # the client raises bare exceptions, after retries of its own
            raise GenerationError(
                f"The vLLM server at {self._url} failed: {error}. Look at its log, and run the same again: finished "
                "shards are kept."
            ) from error
        latency = time.perf_counter() - started
        if len(answer["completion_ids"]) != num_generations:
            raise GenerationError(
                f"The vLLM server at {self._url} gave {len(answer['completion_ids'])} completions; asked for: "
                f"{num_generations}."
            )
        ends = {self._encoder.tokenizer.eos_token_id} - {None}
        found = []
        for number, out in enumerate(answer["completion_ids"]):
            text, kept, reason = self._encoder.finished(prompt, ids, out, ends, sampling.max_completion_length)
            positions = answer["logprobs"][number][: len(kept)]  # of the sampled token only
            values = [position[0] for position in positions]
            logprob = None if None in values else sum(values)
            found.append(Completion(text, kept, reason, logprob, seed, latency))
        return found


class OpenAIGenerator:
    """
    Completes prompts with an OpenAI-compatible server; see [`~trl_ext.pipelines.generation.generator.Generator`].

    Chats go to `/v1/chat/completions`, texts to `/v1/completions`; one request a completion, with a seed of its own,
    because not every server knows `n`. Arguments that are off are not sent, as not every server knows them. To
    `transformers serve`, which takes sampling arguments beside `temperature` and `top_p` only inside
    `generation_config` and else decodes greedily, they are sent there. A chat that ends with a begun answer is sent
    with what vLLM and SGLang take for continuing it; a server that does not may refuse it.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        sampling: Sampling,
        timeout: float = 240.0,
        max_concurrency: int = 64,
        max_retries: int = 6,
        api_key_variable: str | None = None,
    ):
        self._url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = model
        self._sampling = sampling
        self._timeout = timeout
        self._max_retries = max_retries
        self._pool = ThreadPoolExecutor(max_concurrency)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._failure: GenerationError | None = None  # the one that stopped it
        self._headers = {"Content-Type": "application/json"}
        if api_key_variable is not None:
            if api_key_variable not in os.environ:
                raise GenerationError(f"The environment variable {api_key_variable} (api_key_variable) is not set.")
            self._headers["Authorization"] = f"Bearer {os.environ[api_key_variable]}"
        self._is_transformers = self._detect()

    def _detect(self) -> bool:
        """Whether the server is `transformers serve`, by a route that only it has; waits for a server to come up."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                with urllib.request.urlopen(self._url.removesuffix("/v1") + "/openapi.json", timeout=10) as answer:
                    return "/load_model" in json.load(answer).get("paths", {})
            except urllib.error.HTTPError:
                return False  # it is there, and does not describe itself
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > deadline:
                    raise GenerationError(
                        f"No server answers at {self._url} ({error}), for {self._timeout:g} s (server_timeout). Start "
                        "it, or correct server_base_url."
                    ) from error
                time.sleep(min(1.0, self._timeout / 4))
            except ValueError:
                return False

    def generate(
        self,
        prompts: Sequence[str | Chat],
        num_generations: int,
        seed: int,
        columns: Sequence[Columns] | None = None,
    ) -> list[list[Completion]]:
        """See [`Generator`]. After a failure for good every further call fails."""
        jobs = []
        for row, prompt in enumerate(prompts):
            own = _own(columns, row)
            path, body = self._request(row, prompt, own)
            name = prompt_id(prompt, own)
            for index in range(num_generations):
                own_seed = sample_seed(seed, name, index)
                full = body | {"seed": own_seed} | (self._sampling.generation_kwargs or {})
                jobs.append(lambda path=path, full=full, own_seed=own_seed: self._ask(path, full, own_seed))
        found = in_parallel(self._pool, jobs)
        return [found[first : first + num_generations] for first in range(0, len(found), num_generations)]

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
        extra = {"top_k": (sampling.top_k, 0), "min_p": (sampling.min_p, None)}
        extra |= {"repetition_penalty": (sampling.repetition_penalty, 1.0)}
        extra = {name: value for name, (value, off) in extra.items() if value != off}
        if self._is_transformers:
            config = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_completion_length}
            config |= {"top_k": sampling.top_k} | extra  # a missing top_k would be 50
            body["generation_config"] = json.dumps(config)
        else:
            body |= extra
        if isinstance(prompt, str):
            return "/completions", body | {"prompt": prompt}
        if prompt[-1]["role"] == "assistant":  # a begun answer is continued, as in TRL
            if self._is_transformers:
                raise DataError(
                    "a chat that ends with a begun answer, to which `transformers serve` would give a new one",
                    "a server that continues it",
                    "Use the backend 'transformers' or 'vllm', another server, or end the chat with a question.",
                    row=row,
                    column="prompt",
                )
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        kwargs = {**(sampling.chat_template_kwargs or {}), **(columns.get("chat_template_kwargs") or {})}
        given = {
            "chat_template": sampling.chat_template,
            "chat_template_kwargs": kwargs,
            "tools": columns.get("tools"),
        }
        return "/chat/completions", body | {"messages": prompt} | {key: value for key, value in given.items() if value}

    def _ask(self, path: str, body: dict[str, Any], seed: int) -> Completion:
        """One completion, however many attempts it takes."""
        pause = 0.5
        for attempt in range(self._max_retries + 1):
            if self._stopped.is_set():
                raise self._failure
            started = time.perf_counter()
            wait = None
            try:
                answer = self._post(path, body)
                return self._read(answer, seed, time.perf_counter() - started)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {_detail(error)}"
                if error.code not in REPEATED:
                    raise self._stop(
                        f"The server at {self._url} refused a request to {path} with {problem}. Correct the argument "
                        "or the prompt that it names; arguments that it does not know must be left at their defaults."
                    ) from error
                wait = error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out
                problem = f"{type(error).__name__}: {error}"
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"an answer that is no completion ({type(error).__name__}: {error})"
            if attempt < self._max_retries:
                logger.info(f"{self._url}{path}: {problem}; attempt {attempt + 2} follows.")
                asked = float(wait) if wait is not None and wait.replace(".", "", 1).isdigit() else 0.0
                self._stopped.wait(min(LONGEST_PAUSE, max(asked, pause * (0.5 + random.random()))))
                pause *= 2
        raise self._stop(
            f"The server at {self._url} failed {self._max_retries + 1} times, last with {problem}. Look at its log, "
            "and run the same again: finished shards are kept. Of a slow server raise server_timeout or lower "
            "max_concurrency."
        )

    def _stop(self, message: str) -> GenerationError:
        """End all requests with this error, unless another one did so before."""
        with self._lock:
            self._failure = self._failure or GenerationError(message)
        self._stopped.set()
        return self._failure

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as answer:
            return json.load(answer)

    def _read(self, answer: Any, seed: int, latency: float) -> Completion:
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError(f"its text is a {type(text).__name__}")
        reason = "length" if choice.get("finish_reason") == "length" else "stop"
        cut = cut_at_stop(text, self._sampling.stop)
        return Completion(
            cut, choice.get("token_ids"), reason if cut == text else "stop", _logprob(choice), seed, latency
        )


def _logprob(choice: dict[str, Any]) -> float | None:
    """The sum of the tokens' log-probabilities, where `logprobs` was asked for and is given."""
    given = choice.get("logprobs") or {}
    values = given.get("token_logprobs") or [entry["logprob"] for entry in given.get("content") or ()]
    return sum(values) if values else None


def _detail(error: urllib.error.HTTPError) -> str:
    """What the server said, cut to a readable length."""
    try:
        return error.read().decode("utf-8", "replace")[:300]
    except (OSError, http.client.HTTPException):
        return error.reason
