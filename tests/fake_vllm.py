"""A server with vLLM's routes, for faults that no real one makes on demand.

What it draws is a function of prompt and seed, so that a question asked again has the same answer.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[dict[str, Any], int], Any]
"""(a whole answer, how often this prompt was asked before) -> what is answered in its place: JSON,
bytes, a status, seconds to be silent for, or None for a connection that ends."""

END = 1


def tokens_of(ids: list[int], seed: int, index: int, longest: int) -> list[int]:
    """A response: some tokens, of which every other one ends."""
    length = 1 + (sum(ids) + seed + index) % longest
    drawn = [3 + (seed + index + t) % 90 for t in range(length)]
    return [*drawn[:-1], END] if length < longest else drawn


class FakeVllm:
    """Answers as vLLM does, but for a fault."""

    def __init__(self) -> None:
        self.fault: Fault = lambda answer, times: answer
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.weights = "default"
        self.replies: dict[str, Any] = {
            "/health": {}, "/weight_info": {"weight_version": "default"},
            "/v1/models": {"data": [{"max_model_len": 4096}]}, "/server_info": {}, "/resume": {},
            "/tokenize": 404, "/pause": {}, "/collective_rpc": {}, "/reset_prefix_cache": {
                "success": True}, "/update_weight_version": {},
        }  # fmt: skip
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: dict[str, Any]) -> None:
                self.send(fake.answer(self.path.partition("?")[0], body))

            def send(self, found: Any) -> None:
                if isinstance(found, float):
                    time.sleep(found)
                if found is None or isinstance(found, float):
                    return
                status = found if isinstance(found, int) else 200
                data = found if isinstance(found, bytes) else json.dumps(found).encode()
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has gone
                    pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        with self.lock:
            self.paths.append(path)
            if path == "/update_weight_version":
                self.weights = body["new_version"]
            if path != "/inference/v1/generate":
                found = self.replies.get(path, 404)
                return found.pop(0) if isinstance(found, list) else found
            self.bodies.append(body)
            name = json.dumps([body["token_ids"], body["sampling_params"].get("seed")])
            times, self.asked[name] = self.asked[name], self.asked[name] + 1
        return self.fault(self.drawn(body), times)

    def drawn(self, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        sampling, ids = body["sampling_params"], body["token_ids"]
        choices = []
        for index in range(sampling["n"]):
            tokens = tokens_of(ids, sampling["seed"], index, sampling["max_tokens"])
            choices.append({
                "index": index, "token_ids": tokens,
                "finish_reason": "stop" if tokens[-1] == END else "length",
                "weight_versions": [{"version": self.weights, "start": 0, "end": len(tokens)}],
                "logprobs": {"content": [
                    {"token_id": t, "logprob": -1.0 - t / 100} for t in tokens]},
            })  # fmt: skip
        return {"request_id": f"generate-tokens-{body['request_id']}", "choices": choices}

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
