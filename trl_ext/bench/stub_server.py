"""A server that answers vLLM's `/classify` at once, so that what a client takes beside it is the client's time.

It runs in a process of its own and knows no model: it returns the saved scores of the probes to the first request, and
zeros to the others.
"""

import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection


@contextmanager
def stub_server(name: str, max_model_len: int, probe_scores: list[float]) -> Iterator[str]:
    """
    Run the server in a process of its own; it is ended at the end. Gives its URL.

    Args:
        name (`str`): name of the model that it claims to serve.
        max_model_len (`int`): longest text in tokens that it claims to take.
        probe_scores (`list[float]`): its answer to the first request.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, name, max_model_len, probe_scores), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(port: Connection, name: str, max_model_len: int, probe_scores: list[float]) -> None:
    answers = [probe_scores]  # of the requests to come

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": name, "max_model_len": max_model_len}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            rows = body.count(b"[") - 1  # lists of token ids; parsing them would take longer than the answer
            scores = answers.pop() if answers else [0.0] * rows
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
