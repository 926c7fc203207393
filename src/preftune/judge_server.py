"""A server that speaks OpenAI's chat completions, asked with patience and without surprises.

Only the address given is contacted: redirects are refused, and where no model is named the server's
first is taken. The key, if the server wants one, comes from PREFTUNE_JUDGE_KEY, never from a
setting; OPENAI_API_KEY is for OpenAI's own address and is sent to no other. A server that is gone
is a user's error; one request that it refuses is not.
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from preftune.asking import Again, Patience, Refused, address, once, patiently
from preftune.errors import UserError
from preftune.judge_answers import JudgeAnswers

KEY = "PREFTUNE_JUDGE_KEY"
OPENAI, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"


def key_for(url: str) -> str | None:
    """The key of the environment that an address is given, or None."""
    names = (KEY, OPENAI_KEY) if urlsplit(url).hostname == OPENAI else (KEY,)
    return next((key for name in names if (key := os.environ.get(name))), None)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server of chat completions, and how patient to be with it."""

    url: str
    """Up to and with `/v1`."""
    model: str | None = None
    """None: the first that the server lists."""
    timeout: float = 120.0
    """Seconds that one answer may take."""
    tries: int = 4
    wait: float = 1.0
    """Seconds before the second try; doubled each time."""
    workers: int = 8
    """Requests at once."""
    answers: JudgeAnswers | None = field(default=None, compare=False, repr=False)
    """Where answers are kept, and found again."""
    _known: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, compare=False, repr=False)

    def ask(self, question: str) -> str:
        """The model's answer to one question, at temperature 0.

        Raises:
            UserError: the server cannot be reached, or wants another key or address.
            Refused: it refuses this question.
        """
        model = self.name_of_model()
        if self.answers is None:
            return self._answer(model, question)
        where = f"{self.url}#{model}"
        return self.answers.get(where, question, lambda: self._answer(model, question))

    def _answer(self, model: str, question: str) -> str:
        message = {"role": "user", "content": question}
        body = {"model": model, "messages": [message], "temperature": 0}
        return content(self._request("/chat/completions", body))

    def name_of_model(self) -> str:
        """The model that is asked; the server's list is read once."""
        if self.model is not None:
            return self.model
        with self._lock:
            if "model" not in self._known:
                self._known["model"] = self._first_model()
            return self._known["model"]

    def _first_model(self) -> str:
        try:
            return str(self._request("/models")["data"][0]["id"])
        except (Refused, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"judge '{self.url}': lists no model. Name one behind the address, "
                f"as judge:{self.url}#MODEL."
            ) from error

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON (None where even the last is none), after as many tries as it takes."""
        key = key_for(self.url)

        def attempt(left: int) -> Any:
            found = once(self.url + path, body, timeout=self.timeout, key=key)
            if isinstance(found, dict) or not left:
                return found
            raise Again("an answer that is cut off or no JSON")

        patience = Patience(timeout=self.timeout, tries=self.tries, wait=self.wait)
        try:
            return patiently(attempt, patience)
        except Refused as error:
            raise self._final(error) from error
        except Again as error:
            raise UserError(
                f"judge '{self.url}': no answer after {self.tries} tries ({error}). Start the "
                "server, or check the address, which ends in /v1 with most servers."
            ) from error

    def _final(self, error: Refused) -> Exception:
        """What a status that does not pass means."""
        if error.status in (401, 403):
            return UserError(
                f"judge '{self.url}': it wants another key ({error}). Put it into the "
                f"environment as {KEY}."
            )
        if error.status == 404 or 300 <= error.status < 400:
            return UserError(
                f"judge '{self.url}': no such address or model ({error}). Give the address up to "
                "/v1, and behind it the model: judge:http://host:port/v1#MODEL."
            )
        return error


def content(reply: Any) -> str:
    """The text of an answer; empty where it has none."""
    try:
        return str(reply["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        return ""


def connect(given: str, **patience: Any) -> Server:
    """The server that `judge:URL[#MODEL]`, or the bare URL, names. Nothing is contacted yet.

    Args:
        patience: timeout, tries, wait, workers.
    Raises:
        UserError: what is wrong with the address.
    """
    bare, _, model = given.removeprefix("judge:").partition("#")
    parts = address(bare)
    if parts is None:
        raise UserError(
            f"judge '{given}': is no address. Give judge:http://host:port/v1, and #MODEL behind "
            "it where the server has several."
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            "judge: the address holds a key or a query, which would stand in config.yaml. Put the "
            f"key into the environment as {KEY}."
        )
    url = bare.rstrip("/").removesuffix("/chat/completions")
    return Server(url=url, model=model or None, **patience)


def check(server: Server) -> None:
    """Ask one question, so that a wrong address or key is known before the work.

    Raises:
        UserError: as `Server.ask`.
    """
    try:
        server.ask("Answer with the one letter A.")
    except Refused as error:
        raise all_refused(server, str(error)) from error


def all_refused(server: Server, reason: str) -> UserError:
    """The error of a server that answers nothing."""
    return UserError(
        f"judge '{server.url}': it refuses every question ({reason}). Check the model's name "
        f"(now {server.name_of_model()}) and what the server allows."
    )
