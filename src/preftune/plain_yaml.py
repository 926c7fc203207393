"""YAML of plain values: no tags that would run code, no aliases that grow without end."""

from typing import Any

LARGEST = 2**20
"""Bytes of a text, and values in it."""


class NotPlain(ValueError):
    """The text is no YAML, or more than plain values."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line
        """From 1, where it is known."""


def load(text: str) -> Any:
    """The value that a text spells.

    Raises:
        NotPlain: with the reason.
    """
    import yaml

    if len(text.encode("utf-8", "surrogatepass")) > LARGEST:
        raise NotPlain(f"it is larger than {LARGEST >> 20} MiB")
    try:
        value = yaml.safe_load(text)
        nodes = _nodes(value, {})
    except RecursionError as error:
        raise NotPlain("it is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        raise NotPlain(reason, mark.line + 1 if mark else None) from error
    except (ValueError, OverflowError, TypeError) as error:  # a date that is none, say
        raise NotPlain(str(error)) from error
    if nodes > LARGEST:
        raise NotPlain("its aliases (*name) stand for too much")
    return value


def _nodes(value: Any, known: dict[int, int]) -> int:
    """Values below this one, those of aliases each time they stand there."""
    if id(value) not in known:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = LARGEST + 1  # an alias of what it stands in has no end
        below = (_nodes(x, known) for x in parts) if isinstance(value, dict | list) else ()
        known[id(value)] = 1 + sum(below)
    return known[id(value)]
