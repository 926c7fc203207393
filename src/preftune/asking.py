"""One question to a server over HTTP, asked with patience.

Only the address given is contacted: redirects are refused, and on this machine no proxy is used.
What a failure means is the caller's to say: `Again` may pass, `Refused` does not.
"""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar

LOCAL = {"localhost", "127.0.0.1", "::1"}
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses that may pass."""
_LONGEST_WAIT = 30.0
_LARGEST = 2**22

Found = TypeVar("Found")


class Again(Exception):
    """There is no answer, and another try may get one."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        """
        Args:
            pause: seconds that the server asks to wait.
        """
        super().__init__(reason)
        self.pause = pause


class Refused(Exception):
    """The server refuses this one request (too long, say); others may be answered."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often to ask."""

    timeout: float = 120.0
    """Seconds that one answer may take."""
    tries: int = 4
    wait: float = 1.0
    """Seconds before the second try; doubled each time."""


def patiently(attempt: Callable[[int], Found], patience: Patience) -> Found:
    """What an attempt gives, after as many tries as it takes.

    Args:
        attempt: told how many tries are left after this one; raises `Again` for another.
    Raises:
        Again: the last one's.
    """
    wait = patience.wait
    for left in range(patience.tries - 1, -1, -1):
        try:
            return attempt(left)
        except Again as error:
            if not left:
                raise
            time.sleep(min(max(wait, error.pause), _LONGEST_WAIT))
            wait *= 2
    raise AssertionError("there is one try at least")


def once(
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    timeout: float,
    key: str | None = None,
    largest: int = _LARGEST,
) -> Any:
    """The answer's JSON, None where it is none.

    Args:
        body: sent as JSON; None asks by GET.
        key: of the server, which no message repeats.
        largest: bytes of an answer that are read.
    Raises:
        Again: no connection, no answer in time, or a status that may pass.
        Refused: any other status.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data)
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with _opener(url).open(request, timeout=timeout) as reply:
            return parse(reply.read(largest))
    except urllib.error.HTTPError as error:
        with error:
            reason = f"status {error.code}: {_said(error, key)}"
            if error.code not in _PASSING:
                raise Refused(reason, error.code) from error
            raise Again(reason, _retry_after(error.headers.get("Retry-After"))) from error
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        raise Again(str(getattr(error, "reason", None) or error) or type(error).__name__) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none: only the address given is contacted."""
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Without redirects, and on this machine without a proxy."""
    local = urllib.parse.urlsplit(url).hostname in LOCAL
    proxies = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_NoRedirect, *proxies)


def parse(data: bytes) -> Any:
    """A server's JSON; None where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def address(given: str) -> urllib.parse.SplitResult | None:
    """The parts of an http address; None where it is none."""
    try:
        parts = urllib.parse.urlsplit(given)
        port_is_number = parts.port is None or parts.port > 0
    except ValueError:
        return None
    whole = parts.scheme in ("http", "https") and parts.hostname and port_is_number
    return parts if whole else None


def _said(error: urllib.error.HTTPError, key: str | None) -> str:
    """The first line of what the server says about a failure, but for the key, if it repeats it."""
    try:
        text = error.read(2000).decode("utf-8", "replace").strip()
    except (OSError, HTTPException):
        text = ""
    line = (text.splitlines() or [str(error.reason)])[0]
    return (line.replace(key, "***") if key else line)[:200]


def _retry_after(value: str | None) -> float:
    try:
        return float(value or 0)
    except ValueError:  # a date
        return 0.0
