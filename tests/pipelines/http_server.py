"""A small HTTP server that answers as vLLM's or OpenAI's does, or fails as a test chooses, and notes requests.

Only failures and what is sent are tested with it; that real servers understand us is tested with `transformers serve`.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """What it was asked, and how it answers: `answer(number, path, body)` gives (status, bytes or JSON, headers)."""

    def __init__(self, answer: Callable[[int, str, dict], tuple]):
        self.answer = answer
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.url = ""

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Bodies of the requests."""
        return [body for _, body, _ in self.requests]

    def note(self, path: str, body: dict, headers: dict) -> int:
        """Number of a request, from 0."""
        with self._lock:
            self.requests.append((path, body, headers))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return len(self.requests) - 1

    def done(self) -> None:
        """A request was answered."""
        with self._lock:
            self._at_once -= 1


@contextmanager
def serving(answer: Callable[[int, str, dict], tuple], described: dict[str, Any] | None = None) -> Iterator[Server]:
    """A server on a free port of this machine; `described` is what it returns for GET requests, by path, or the
    status of a failure."""
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = {"/health": b"", "/v1/models": b'{"data": [{"id": "served"}]}'}
            known |= {path: json.dumps(content).encode() for path, content in (described or {}).items()}
            status = (described or {}).get(self.path)
            if isinstance(status, int):
                self._send(status, b"<html>no", {})
            else:
                self._send(200 if self.path in known else 404, known.get(self.path, b""), {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number = server.note(self.path, body, dict(self.headers))
            try:
                status, content, headers = server.answer(number, self.path, body)
            finally:
                server.done()
            if status is None:  # dies in the middle
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
                self.close_connection = True
            else:
                self._send(status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers)

        def _send(self, status: int, content: bytes, headers: dict):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def good(text: str = " fine", reason: str = "stop", **choice: Any) -> Callable[[int, str, dict], tuple]:
    """Answers as an OpenAI-compatible server."""

    def answer(number: int, path: str, body: dict) -> tuple:
        time.sleep(0.01)
        content = {"message": {"content": text}} if path.endswith("chat/completions") else {"text": text}
        return 200, {"choices": [content | {"finish_reason": reason} | choice]}, {}

    return answer
