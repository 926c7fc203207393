"""A server of chat completions on this machine, whose answers a test decides."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from preftune.judging import Server, connect

Reply = Callable[[str], Any]
"""The question -> the answer's text, its bytes, a status, (status, headers[, body]), or None
for a connection that ends."""


def _spelled(found: Any) -> tuple[int, str, Any]:
    """Status, body and headers of a reply."""
    if isinstance(found, int):
        return found, "no\nmore", ()
    if isinstance(found, tuple):
        status, headers, *body = found
        return status, body[0] if body else "no", headers
    if isinstance(found, bytes):
        return 200, found.decode(), ()
    message = {"choices": [{"message": {"role": "assistant", "content": found}}]}
    return 200, json.dumps(message), ()


class Judge:
    """A server whose answers a test decides."""

    def __init__(self) -> None:
        self.reply: Reply = lambda question: "A"
        self.models: Any = {"data": [{"id": "tiny-judge"}]}
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                with judge.lock:
                    judge.paths.append(self.path)
                self.answer(200 if judge.models else 404, json.dumps(judge.models))

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(size))
                with judge.lock:
                    judge.paths.append(self.path)
                    judge.asked.append(body)
                    judge.keys.append(self.headers.get("Authorization"))
                found = judge.reply(body["messages"][0]["content"])
                if found is not None:
                    self.answer(*_spelled(found))

            def answer(self, status: int, text: str, headers: Any = ()) -> None:
                try:
                    self.send_response(status)
                    for name, value in dict(headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:  # the client has gone
                    pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def server(self, **patience: Any) -> Server:
        return connect(self.url, **({"wait": 0.01, "timeout": 5.0} | patience))

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def between(question: str, tag: str) -> str:
    return question.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]


def longer_wins(question: str) -> str:
    if "<response_A>" not in question:  # whether it is there at all
        return "A"
    a, b = between(question, "response_A"), between(question, "response_B")
    return "neither" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
