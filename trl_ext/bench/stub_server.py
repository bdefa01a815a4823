"""A server that answers vLLM's `/classify` at once, so that what a client takes beside it is the client's time.

It runs in a process of its own and knows no model: the probes get their saved scores, once, and all later texts zeros.
"""

import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection


@contextmanager
def stub_server(name: str, max_model_len: int, probes: dict[str, list]) -> Iterator[str]:
    """
    Run the server in a process of its own; it is ended at the end. Gives its URL.

    Args:
        name (`str`): name of the model that it claims to serve.
        max_model_len (`int`): longest text in tokens that it claims to take.
        probes (`dict`): those of the model, `{"input_ids": [[int]], "scores": [float]}`.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, name, max_model_len, probes), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(port: Connection, name: str, max_model_len: int, probes: dict[str, list]) -> None:
    to_come = dict(zip(map(tuple, probes["input_ids"]), probes["scores"], strict=True))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": name, "max_model_len": max_model_len}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if to_come:
                scores = [to_come.pop(tuple(ids), 0.0) for ids in json.loads(body)["input"]]
            else:
                scores = [0.0] * (body.count(b"[") - 1)  # parsing the token ids would take longer than the answer
            self._send({"data": [{"index": place, "probs": [score]} for place, score in enumerate(scores)]})

        def _send(self, content: dict) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    port.send(http.server_address[1])
    http.serve_forever()
