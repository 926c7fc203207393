"""The page and what it asks for, on this machine alone.

The address holds a key, without which nothing is told or taken: other users of the machine and
pages of other sites that the browser has open do not have it. A site that gives its own name this
machine's address is refused by the name.
"""

import json
import secrets
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from string import Template
from typing import Any

from preftune.labelling.agreement import alpha, share_alike
from preftune.labelling.book import CHOICES, Choice
from preftune.labelling.supply import Supply

HOST = "127.0.0.1"
LARGEST = 2**14
"""Bytes of a request."""
NAME = 60
"""Characters of an annotator's name, at most."""
WAIT = 20.0
"""Seconds that a request waits for a pair to be drawn; the page asks again."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class Refused(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves one supply of pairs until someone says that it is enough."""

    daemon_threads = True

    def __init__(self, supply: Supply, *, names: bool, port: int = 0) -> None:
        """Listen.

        Args:
            names: which model wrote a response is shown.
            port: 0 takes a free one.
        """
        super().__init__((HOST, port), _Handler)
        self.supply, self.names = supply, names
        self.key = secrets.token_urlsafe(16)
        self.failed: BaseException | None = None

    @property
    def address(self) -> str:
        """To open in a browser."""
        return f"http://{HOST}:{self.server_port}/?key={self.key}"

    def page(self) -> str:
        """The page, whole."""
        here = resources.files("preftune.labelling")
        parts = {n: here.joinpath(f"page.{n}").read_text("utf-8") for n in ("css", "js")}
        text = here.joinpath("page.html").read_text("utf-8")
        return Template(text).substitute(parts, key=json.dumps(self.key))

    def state(self, annotator: str, wait: float = WAIT) -> dict[str, Any]:
        """What the page of an annotator shows."""
        try:
            shown = self.supply.show(annotator, wait)
        except Exception as error:
            self.failed = error
            raise Refused(500, f"No pair could be drawn: {error}") from None
        _, judged = self.supply.book.snapshot()
        own = [s for s in judged if s.annotator == annotator]
        out: dict[str, Any] = {
            "pair": None, "waiting": self.supply.waiting, "mine": len(own),
            "pairs": len({s.pair for s in judged}), "count": self.supply.count,
            "agreement": share_alike(judged), "alpha": alpha(judged),
        }  # fmt: skip
        if shown is not None:
            order = (shown.left, 1 - shown.left)
            pair = shown.pair
            out["pair"] = {
                "id": pair.id, "prompt": _messages(pair.prompt),
                "sides": [
                    {"text": pair.responses[k], "finished": pair.finished[k]}
                    | ({"writer": pair.writers[k]} if self.names else {})
                    for k in order
                ],
            }  # fmt: skip
        return out

    def judge(self, said: dict[str, Any], annotator: str) -> None:
        """Write down what was said on the page."""
        number, word, seconds = said.get("pair"), said.get("choice"), said.get("seconds")
        if not isinstance(number, int) or word not in ("left", "right", "tie", "skip"):
            raise Refused(400, "pair and choice (left, right, tie or skip) are needed")
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e7:
            raise Refused(400, "seconds must be a number")
        shown = self.supply.show(annotator, 0.0)
        if shown is None or shown.pair.id != number:
            return  # of an older window; the page is told what stands there now
        left, right = CHOICES[shown.left], CHOICES[1 - shown.left]
        words: dict[str, Choice] = {"left": left, "right": right, "tie": "tie", "skip": "skip"}
        self.supply.say(annotator, number, words[word], float(seconds))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error of ours."""


def _messages(prompt: Any) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "", "content": prompt}]
    return [{"role": str(m["role"]), "content": str(m["content"])} for m in prompt]


class _Handler(BaseHTTPRequestHandler):
    timeout = 60

    @property
    def labels(self) -> Server:
        """The server that this is a request to."""
        assert isinstance(self.server, Server), "it is made by that"
        return self.server

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is for progress."""

    def _get(self) -> tuple[str, str]:
        path, _, query = self.path.partition("?")
        if path != "/":
            raise Refused(404, "there is one page: /")
        self._check_key(query.removeprefix("key="))
        return "text/html; charset=utf-8", self.labels.page()

    def _post(self) -> tuple[str, str]:
        self._check_key(self.headers.get("X-Key", ""))
        given = self._body()
        annotator = given.get("annotator")
        if not isinstance(annotator, str) or not 0 < len(annotator.strip()) <= NAME:
            raise Refused(400, f"a name of 1 to {NAME} characters is needed")
        annotator = annotator.strip()
        if self.path == "/judge":
            self.labels.judge(given, annotator)
        elif self.path == "/undo":
            self.labels.supply.undo(annotator)
        elif self.path == "/finish":
            # from another thread: this one answers first, and shutdown waits for the loop's end
            import threading

            threading.Timer(0.2, self.labels.shutdown).start()
            return _json({"ended": True})
        elif self.path != "/show":
            raise Refused(404, "unknown")
        return _json(self.labels.state(annotator))

    def _check_key(self, key: str) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            raise Refused(403, "the page answers under its own address alone")
        if not secrets.compare_digest(key.encode(), self.labels.key.encode()):
            raise Refused(403, "open the address that the terminal shows")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST:
            raise Refused(413, "too long")
        try:
            found = json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise Refused(400, "no JSON") from None
        if not isinstance(found, dict):
            raise Refused(400, "no JSON object")
        return found

    def _answer(self, make: Callable[[], tuple[str, str]]) -> None:
        try:
            status, (kind, text) = 200, make()
        except Refused as refused:
            status, (kind, text) = refused.status, _json({"error": str(refused)})
        data = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _json(value: dict[str, Any]) -> tuple[str, str]:
    return "application/json", json.dumps(value)
