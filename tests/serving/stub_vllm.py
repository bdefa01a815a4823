"""A stand-in for vLLM's pooling server: its routes and answers, with a real tiny model behind them.

That a real vLLM gives the same is tested in `test_vllm.py` where it is installed.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.pipelines.http_server import Server, serving
from trl_ext.models.heads import run_with_head_output
from trl_ext.models.loading import load_reward_model


def outputs_of(folder: Path) -> Callable[[list[int]], torch.Tensor]:
    """The outputs (T, C) of a saved model for token ids."""
    model, lock = load_reward_model(folder), threading.Lock()  # the hook on the head is one for all threads

    def run(ids: list[int]) -> torch.Tensor:
        inputs = torch.tensor([ids])
        with lock, torch.no_grad():
            return run_with_head_output(model, inputs, torch.ones_like(inputs), call=model)[1][0]

    return run


@contextmanager
def pooling_server(
    models: dict[str, Callable[[list[int]], torch.Tensor]],
    task: str = "classify",
    max_model_len: int = 512,
    change: Callable[[int, str, dict], tuple | None] = lambda number, path, body: None,
) -> Iterator[Server]:
    """
    Serve models under their names; `change` may answer in the server's place.

    Only a request that names a known model, brings lists of token ids and switches the activation off gets what the
    model gives, as vLLM applies a sigmoid otherwise.
    """

    def answer(number: int, path: str, body: dict[str, Any]) -> tuple:
        other = change(number, path, body)
        if other is not None:
            return other
        if body["model"] not in models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}, {}
        found = [models[body["model"]](ids) for ids in body["input"]]
        if body.get("use_activation") is not False:
            found = [outputs.sigmoid() for outputs in found]
        if path == "/classify" and task == "classify":
            entries = [{"index": i, "probs": outputs[-1].tolist()} for i, outputs in enumerate(found)]
        elif path == "/pooling" and task == body.get("task") == "token_classify":
            entries = [{"index": i, "data": outputs.tolist()} for i, outputs in enumerate(found)]
        else:
            return 404, {"detail": "Not Found"}, {}
        return 200, {"data": entries[::-1]}, {}  # the index says the place, not the order

    cards = [{"id": name, "max_model_len": max_model_len} for name in models]
    with serving(answer, {"/v1/models": {"data": cards}}) as server:
        yield server
