"""`ServedModel`: one reward model on vLLM servers, asked by token ids, and checked before its scores are used.

It knows vLLM's routes `/classify` and `/pooling`, and the probes in a model's `reward_model.json`. It knows nothing of
text, of normalisers, or of how scores are used.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trl_ext.models.sidecar import Sidecar
from trl_ext.serving.probe_check import matching_columns
from trl_ext.serving.served_models import cards_of, find_card, longest_text, names_of
from trl_ext.serving.server_pool import Advice, ServerError, ServerPool


logger = logging.getLogger(__name__)

# Rows of a request. The server makes its own batches, so that this decides only what a request costs.
ROWS = 64
# Requests at a time over all servers, which keep them busy: a server lines up what it cannot run yet.
REQUESTS = 8
TIMEOUT = 240.0  # seconds to wait for a server to start, and for an answer
RETRIES = 6  # of a request
# The environment variable with the servers' key, which vLLM reads too.
KEY = "VLLM_API_KEY"

_CLASSIFY_TOKENS = {"task": "token_classify", "use_activation": False}


class ServedModel:
    """
    A reward model that vLLM serves, on one or several servers.

    When this is made, each server scores the probes that were stored with the model. They must have the scores that
    they had when the model was saved. So a wrong adapter, an untrained head, a server that applies a sigmoid, a second
    normaliser or less precision is refused. A server that does not answer then is not used later either.

    Args:
        urls (`str`): where the servers are, with commas between; with or without `/v1`.
        folder (`str`): folder or id of the model. The servers know it by that, if `model` is not given.
        model (`str` or `None`): the name by which the servers know it.
        sidecar ([`Sidecar`] or `None`): what the model is. Without it, or without probes, nothing is checked.
        rows (`int`, *optional*, defaults to `64`): rows of a request.

    Attributes:
        name (`str`): the name by which the servers know the model.
        max_tokens (`int` or `None`): the longest text that they take.

    Raises:
        [`ServerError`]: no server answers, the model is not there, or it gives other scores.
    """

    def __init__(
        self,
        urls: str,
        folder: str,
        model: str | None,
        sidecar: Sidecar | None,
        rows: int = ROWS,
    ):
        self._rows = rows
        self._by_token = sidecar is not None and sidecar.kind != "scalar"
        self._columns = slice(0, 1)  # which outputs of the server are this model's
        advice = Advice(
            address="Start it with the command that `trl-ext serve-info` prints, or correct the URL.",
            key=f"Set the environment variable {KEY} to its key.",
            slow="A slow server needs fewer rows in a request (batch_size).",
            refused=f"Start the server with the command that `trl-ext serve-info {folder}` prints.",
        )
        key = KEY if KEY in os.environ else None
        connect = partial(
            ServerPool, timeout=TIMEOUT, max_concurrency=REQUESTS, max_retries=RETRIES, api_key_variable=key
        )
        answers = connect(urls, advice=advice).describe("/v1/models")
        self._servers = connect(list(answers), advice=advice)  # one that starts later would not be checked
        self.name, self.max_tokens = _find(answers, folder, model)
        if sidecar is None or sidecar.probes is None:
            logger.warning(
                f"{folder} has no probes in a reward_model.json, so it is not checked whether {self.name} at {urls} "
                "gives its scores. Save it with a trainer of trl_ext to have it checked."
            )
            return
        columns = {url: self._check(connect(url, advice=advice), url, sidecar) for url in answers}
        self._columns = next(iter(columns.values()))
        if any(other != self._columns for other in columns.values()):
            raise ServerError(f"The servers have the outputs of {self.name} at different places: {columns}.")
        if self.max_tokens is not None and (sidecar.max_length or 0) > self.max_tokens:
            logger.warning(
                f"{urls} takes texts of up to {self.max_tokens} tokens, and {folder} was trained with up to "
                f"{sidecar.max_length}: start it with --max-model-len {sidecar.max_length}."
            )

    def outputs(self, ids: Sequence[list[int]]) -> list[list[float]]:
        """The raw outputs of the head at the last token of each list of token ids, none of them empty."""
        return [row[self._columns] for row in self._at_last_token(self._servers, ids)]

    def token_outputs(self, ids: Sequence[list[int]]) -> list[list[list[float]]]:
        """The raw outputs of the head at each token of each list of token ids, none of them empty."""
        found = self._ask(self._servers, "/pooling", _CLASSIFY_TOKENS, _tokens, ids)
        return [[token[self._columns] for token in row] for row in found]

    def _at_last_token(self, servers: ServerPool, ids: Sequence[list[int]]) -> list[list[float]]:
        """All outputs of the server. A server of token-level models has no other route than that for all tokens."""
        if self._by_token:
            return [row[-1] for row in self._ask(servers, "/pooling", _CLASSIFY_TOKENS, _tokens, ids)]
        return self._ask(servers, "/classify", {"use_activation": False}, _classes, ids)

    def _check(self, server: ServerPool, url: str, sidecar: Sidecar) -> slice:
        """The columns of the model's outputs. Raises [`ServerError`] unless a server gives the saved scores."""
        found = self._at_last_token(server, sidecar.probes["input_ids"])
        return matching_columns(found, sidecar, url, self.name)

    def _ask(
        self,
        servers: ServerPool,
        path: str,
        options: dict[str, Any],
        read: Callable[[Any], list[Any]],
        ids: Sequence[list[int]],
    ) -> list[Any]:
        """What `read` finds in the answers, in the order of the rows; rows of like length share a request."""
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        parts = [order[start : start + self._rows] for start in range(0, len(order), self._rows)]
        jobs = []
        for rows in reversed(parts):  # the longest first, so that nothing long is left to the end
            body = {"model": self.name, "input": [ids[row] for row in rows], **options}
            jobs.append(partial(servers.ask, path, body, partial(_in_order, read, rows)))
        found: list[Any] = [None] * len(ids)
        for part in servers.map(jobs):
            for row, outputs in part:
                found[row] = outputs
        return found


def _find(answers: dict[str, Any], folder: str, model: str | None) -> tuple[str, int | None]:
    """The name by which all servers know a model, and the longest text that they take."""
    found: dict[str, str] = {}
    limits = []
    for url, answer in answers.items():
        cards = cards_of(answer)
        if not cards:
            raise ServerError(
                f"The server at {url} does not say which models it serves (/v1/models), so it is no vLLM server. "
                "Correct the URL."
            )
        card = find_card(cards, model or folder)
        if card is None and model is None and len(cards) == 1:
            card = cards[0]  # the probes say whether it is the model
        if card is None:
            raise ServerError(
                f"The server at {url} serves {names_of(cards)}, and not {model or folder}. Start it with the command "
                f"that `trl-ext serve-info {folder}` prints, or pass the model's name there as `model`."
            )
        found[url] = card["id"]
        limits.append(longest_text(card, cards))
    if len(set(found.values())) > 1:
        raise ServerError(
            f"The servers have different names for the model: {found}. Start them with the same --served-model-name."
        )
    return next(iter(found.values())), min((limit for limit in limits if limit is not None), default=None)


def _in_order(
    read: Callable[[Any], list[Any]], rows: list[int], answer: Any, seconds: float
) -> list[tuple[int, list[Any]]]:
    """The outputs of each row of a request; raises `ValueError` for an answer that lacks some."""
    entries = sorted(answer["data"], key=lambda entry: entry["index"])
    if [entry["index"] for entry in entries] != list(range(len(rows))):
        raise ValueError(f"{len(entries)} results for {len(rows)} texts")
    return list(zip(rows, [read(entry) for entry in entries], strict=True))


def _classes(entry: Any) -> list[float]:
    return [float(value) for value in entry["probs"]]


def _tokens(entry: Any) -> list[list[float]]:
    return [[float(value) for value in token] for token in entry["data"]]
