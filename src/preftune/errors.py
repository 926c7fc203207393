"""The ways in which a run may end before its time, apart from a fault of ours.

The command line turns them into exit codes (`exit_code`).
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave: the message says what, where and the cure."""


class NoRows(UserError):
    """No row of the data can be used."""


class BadRows(UserError):
    """Too much of the data cannot be used; `rejected` holds the rows, to be kept for the user."""

    def __init__(self, message: str, rejected: Sequence[Any]) -> None:
        super().__init__(message)
        self.rejected = rejected


class GuardStop(Exception):
    """A guard ended the run (a non-finite loss, a diverged policy).

    `details` is what is known of the batch, as plain data.
    """

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = dict(details or {})


class Saved(Exception):
    """The system asked the run to end (SIGTERM, SIGUSR1); it is saved and can go on."""


class Elsewhere(Exception):
    """Another process of the run ended it and says why; `code` is the exit code of all."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(f"ended by another process: {message}")
        self.code = code


def exit_code(error: BaseException) -> int:
    """What the command line ends with."""
    if isinstance(error, Elsewhere):
        return error.code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 2
    codes = {UserError: 2, GuardStop: 3, Saved: 75, KeyboardInterrupt: 130}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known names closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)

    def alike(other: str) -> float:
        return difflib.SequenceMatcher(None, other, name).ratio()

    equal = [c for c in close if alike(c) > alike(close[0]) - 1e-9]
    quoted = " or ".join(f"'{c}'" for c in equal)
    return f" Did you mean {quoted}?" if close else ""
