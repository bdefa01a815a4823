"""Requests to one or several servers that hold the same model: retries, concurrency, and what a failure says.

Requests go to the servers in turn. A server that fails is left alone for a while, and its requests go to the others. A
failure that may pass is repeated with growing pauses; one that will not pass stops all requests. This module knows
HTTP and JSON, and not what is asked.
"""

import http.client
import json
import logging
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar


logger = logging.getLogger(__name__)

T = TypeVar("T")

REPEATED = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # HTTP statuses that may pass
LONGEST_PAUSE = 60.0


class ServerError(RuntimeError):
    """A server cannot be used; the message says what was found and what to do."""


@dataclass(frozen=True)
class Advice:
    """
    What a user can do about a failure, in the words of the caller's arguments.

    Args:
        address (`str`): when no server answers.
        key (`str`): when a server refuses the key.
        slow (`str`): when answers come too late.
        refused (`str`): when a server refuses a request.
        again (`str`): after a failure: what is kept.
    """

    address: str = "Start it, or correct the URL."
    key: str = "Set the environment variable that holds its key."
    slow: str = "Give a slow server fewer requests at a time."
    refused: str = "Its log has the reason."
    again: str = "Call again when it is back."


@dataclass
class _Server:
    url: str  # without /v1
    failures: int = 0  # since its last answer
    rests_until: float = 0.0


@dataclass
class _Run:
    """Requests that one failure ends. A late failure of an earlier run does not end those of the next one."""

    stopped: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None  # the one that stopped them


class ServerPool:
    """
    Asks one or several servers.

    Args:
        base_url (`str` or sequence of `str`): where they are, with or without `/v1`; a string may hold several URLs,
            separated by commas.
        timeout (`float`, *optional*, defaults to `240.0`): seconds to wait for a server to start, and for an answer.
        max_concurrency (`int`, *optional*, defaults to `64`): requests at a time, over all servers.
        max_retries (`int`, *optional*, defaults to `6`): how often a request is repeated.
        api_key_variable (`str`, *optional*): name of the environment variable that holds the servers' key.
        error (`type`, *optional*, defaults to [`ServerError`]): class of the errors that are raised.
        advice ([`Advice`], *optional*): what their messages tell the user to do.

    Raises:
        `error`: the variable is not set.
        ValueError: no URL.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        timeout: float = 240.0,
        max_concurrency: int = 64,
        max_retries: int = 6,
        api_key_variable: str | None = None,
        error: type[Exception] = ServerError,
        advice: Advice | None = None,
    ):
        urls = re.split(r"[,\s]+", base_url.strip()) if isinstance(base_url, str) else list(base_url)
        self._servers = [_Server(url.rstrip("/").removesuffix("/v1")) for url in urls if url]
        if not self._servers:
            raise ValueError(f"server_base_url={base_url!r}; needed: at least one URL, e.g. http://localhost:8000.")
        self._error, self._advice = error, advice or Advice()
        self._timeout = timeout
        self._max_retries = max_retries
        self._threads = ThreadPoolExecutor(max_concurrency)
        self._lock = threading.Lock()
        self._turn = 0
        self._run = _Run()
        self._blocks = 0  # of `together`
        self._headers = {"Content-Type": "application/json"}
        if api_key_variable is not None:
            if api_key_variable not in os.environ:
                raise error(f"The environment variable {api_key_variable} (api_key_variable) is not set.")
            self._headers["Authorization"] = f"Bearer {os.environ[api_key_variable]}"

    def __str__(self) -> str:
        """`The server at ...`, for messages."""
        urls = ", ".join(server.url for server in self._servers)
        return f"The server at {urls}" if len(self._servers) == 1 else f"The servers at {urls}"

    def describe(self, path: str) -> dict[str, Any]:
        """
        What each server returns for a GET request: its URL to the JSON, `None` where there is none at this path.

        Waits until at least one server answers. The others may start later, or not at all. A proxy that answers for a
        server that is not there (HTTP 502, 503 ...) is waited for too.

        Raises:
            `error`: no server answers within the time, or one refuses the key.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            found, problems = {}, {}
            for server in self._servers:
                try:
                    found[server.url] = self._get(server.url + path)
                except (OSError, http.client.HTTPException) as error:
                    problems[server.url] = error
            if found:
                for url, error in problems.items():
                    logger.warning(f"No server answers at {url} ({error}); requests go to {', '.join(found)}.")
                return found
            if time.monotonic() > deadline:
                urls, error = ", ".join(problems), next(iter(problems.values()))
                raise self._error(
                    f"No server answers at {urls} ({error}), for {self._timeout:g} s. {self._advice.address}"
                ) from error
            time.sleep(min(1.0, self._timeout / 4))

    def tell(self, url: str, path: str, body: dict[str, Any]) -> str | None:
        """Post something to one server, once. Returns what it says against it, or `None` if it agrees."""
        request = urllib.request.Request(url + path, json.dumps(body).encode(), self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout):
                return None
        except urllib.error.HTTPError as error:
            return f"HTTP {error.code}: {_detail(error)}"
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        A block of requests that end together: the first failure, or an interruption, stops all of them.

        Blocks in other threads, and blocks in this one, belong to it. When all have ended, requests begin anew.
        """
        with self._lock:
            if not self._blocks and self._run.stopped.is_set():
                self._run = _Run()
            run = self._run
            self._blocks += 1
        try:
            yield
        except BaseException as error:
            stopped = error if isinstance(error, Exception) else self._error(f"{type(error).__name__} stopped it.")
            self._stop(run, stopped)
            raise
        finally:
            with self._lock:
                self._blocks -= 1

    def map(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run jobs, which call [`ask`], in parallel, as one block. The first failure cancels those not yet begun."""
        with self.together():
            futures: list[Future[T]] = [self._threads.submit(job) for job in jobs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def ask(self, path: str, body: dict[str, Any], read: Callable[[Any, float], T]) -> T:
        """
        Post one request and read its answer, however many attempts it takes.

        Args:
            path (`str`): e.g. `"/v1/completions"`.
            body (`dict`): what is sent, as JSON.
            read (`Callable`): makes the result from the answer and the seconds that it took. If it raises
                `ValueError`, `KeyError`, `IndexError` or `TypeError`, the request is repeated.

        Raises:
            `error`: a server refuses the request, or all attempts fail. Further calls then fail too, until the
                block of [`together`] has ended.
        """
        pause, run = 0.5, self._run
        for attempt in range(self._max_retries + 1):
            if run.stopped.is_set():
                raise run.failure
            server, wait, gone = self._next(), None, False
            started = time.perf_counter()
            try:
                answer = read(self._post(server.url + path, body), time.perf_counter() - started)
                server.failures = 0
                return answer
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {_detail(error)}"
                if error.code not in REPEATED:
                    refused = self._refused(server.url, path, problem, body)
                    raise self._stop(run, self._error(refused)) from error
                wait = error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out
                problem, gone = f"{type(error).__name__}: {error}", not isinstance(error, TimeoutError)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"an unreadable answer ({type(error).__name__}: {error})"
            others = self._rest(server, problem)
            if attempt < self._max_retries and not others:
                logger.info(f"{server.url}{path}: {problem}; attempt {attempt + 2} follows.")
                asked = float(wait) if wait is not None and wait.replace(".", "", 1).isdigit() else 0.0
                run.stopped.wait(min(LONGEST_PAUSE, max(asked, pause * (0.5 + random.random()))))
                pause *= 2
        hint = self._advice.slow
        if gone:
            hint = "It no longer answers: it was ended, or its engine died. Start it again with the same model."
        message = f"{self} failed {self._max_retries + 1} times, last with {problem}. {hint} Its log has the reason. "
        raise self._stop(run, self._error(message + self._advice.again))

    def _next(self) -> _Server:
        """The server whose turn it is; one that failed is passed over while it rests, if another does not."""
        with self._lock:
            now = time.monotonic()
            ready = [server for server in self._servers if server.rests_until <= now]
            if not ready:
                return min(self._servers, key=lambda server: server.rests_until)
            self._turn += 1
            return ready[self._turn % len(ready)]

    def _rest(self, server: _Server, problem: str) -> bool:
        """Leave a server that failed alone for a while. Returns whether another one is ready."""
        with self._lock:
            server.failures += 1
            now = time.monotonic()
            server.rests_until = now + min(LONGEST_PAUSE, 0.5 * 2**server.failures)
            others = any(other.rests_until <= now for other in self._servers)
        if server.failures == 1 and len(self._servers) > 1:
            logger.warning(f"The server at {server.url} failed with {problem}; its requests go to the others.")
        return others

    def _stop(self, run: _Run, failure: Exception) -> Exception:
        """End all requests of a run with this error, unless another one did so before."""
        with self._lock:
            run.failure = run.failure or failure
        run.stopped.set()
        return run.failure

    def _refused(self, url: str, path: str, problem: str, body: dict[str, Any]) -> str:
        fix = self._advice.refused
        if "chat_template" in body and re.search("chat.?template", problem, re.IGNORECASE):
            fix = (
                "It accepts no chat_template in requests: start vLLM with --trust-request-chat-template, or use "
                "backend='vllm', which applies the template here."
            )
        return f"The server at {url} refused a request to {path.removeprefix('/v1')} with {problem}. {fix}"

    def _get(self, url: str) -> Any:
        request = urllib.request.Request(url, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=min(10.0, max(self._timeout, 0.1))) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in REPEATED:
                raise
            if error.code in (401, 403):
                raise self._error(
                    f"The server at {url} refuses the key (HTTP {error.code}). {self._advice.key}"
                ) from None
            return None  # it is there, and has nothing to say here
        except ValueError:
            return None

    def _post(self, url: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(url, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as answer:
            return json.load(answer)


def _detail(error: urllib.error.HTTPError) -> str:
    """What the server said, cut to a readable length."""
    try:
        return error.read().decode("utf-8", "replace")[:300]
    except (OSError, http.client.HTTPException):
        return error.reason
