"""Problem files of a folder, of either kind."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from preftune.advising import problem, texts
from preftune.advising.problem import Problem
from preftune.advising.stated import Stated
from preftune.errors import UserError

_WRONG = (
    KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError,
    RuntimeError, UserError,
)  # fmt: skip
"""What data that are not as the schema says raise on their way."""


def paths(folder: Path) -> list[Path]:
    """Of all problems: first the enumerable ones, by name, then those of language models, so that
    the numbers of the former do not depend on the latter.

    Raises:
        UserError: a file that cannot be read.
    """
    return [*enumerable(folder), *_those(folder, of_text=True)]


def enumerable(folder: Path) -> list[Path]:
    """Of enumerable problems, by name."""
    return _those(folder, of_text=False)


def _those(folder: Path, *, of_text: bool) -> list[Path]:
    return [p for p in sorted(folder.glob("*.json")) if texts.is_text(_read(p)) == of_text]


def load_all(folder: Path) -> list[Stated]:
    """Every problem of a folder, in the order of `paths`.

    Raises:
        UserError: no file, one that is not as the schema says, or two of one name.
    """
    found = paths(folder) if folder.is_dir() else []
    if not found:
        raise UserError(f"problems '{folder}': no .json file there. Draw some with --draw N.")
    problems, each = [load(path) for path in found], dict[str, Path]()
    for path, stated in zip(found, problems, strict=True):
        other = each.setdefault(stated.name, path)
        if other != path:
            raise UserError(
                f"problems '{folder}': {other.name} and {path.name} are both called "
                f"'{stated.name}'. Give one of them another name."
            )
    return problems


@lru_cache(maxsize=1024)
def load(path: Path) -> Stated:
    """Read one.

    Raises:
        UserError: what is wrong, and where.
    """
    plain = _read(path)
    try:
        of_text = texts.is_text(plain)
        return texts.checked(plain, path.parent) if of_text else problem.checked(plain)
    except _WRONG as error:
        missing = isinstance(error, KeyError)
        what = f"'{error.args[0]}' is missing" if missing else str(error).rstrip(".")
        raise UserError(f"problem '{path}': {what}. See docs/advise.md for the schema.") from error


def table(path: Path) -> Problem:
    """Read one whose responses are enumerated."""
    found = load(path)
    assert isinstance(found, Problem), "a language model's problem has no table"
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"problem '{path}': cannot be read ({error}).") from error
