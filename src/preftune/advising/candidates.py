"""The rows that are compared, with the settings among which each is tuned."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from preftune import methods, plain_yaml
from preftune.advising.stated import EFFORT, Kind
from preftune.method import Method, configure, resolve


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a row."""

    row: str
    place: int
    """Among the row's settings."""
    learning_rate: float
    batch_size: int
    flat: tuple[tuple[str, Any], ...]
    """Flat settings; `2b` is twice the problem's beta."""

    def method(self, beta: float) -> Method:
        """The row with these settings, for a problem with that beta."""
        settings = {name: _value(v, beta) for name, v in self.flat}
        return resolve(configure(methods.get(self.row), settings))

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {"learning_rate": self.learning_rate, **dict(self.flat)}


def _value(value: Any, beta: float) -> Any:
    if isinstance(value, str) and value.endswith("b"):
        return float(value[:-1]) * beta
    return value


@cache
def _all() -> Mapping[str, Any]:
    text = resources.files("preftune.advising").joinpath("candidates.yaml").read_text()
    return plain_yaml.load(text)


def patience(row: str) -> int | None:
    """After how many windows without a higher reward it stops by itself; None: never."""
    return methods.get(row).patience


def names() -> list[str]:
    """Of the rows."""
    return list(_all())


@cache
def settings_of(row: str, kind: Kind = "enumerable") -> tuple[Setting, ...]:
    """All that the row is tuned over, on problems of a kind."""
    given = _all()[row]
    before = "text_" if kind == "text" else ""
    settings = given.get(f"{before}settings", given["settings"])
    each = itertools.product(settings, given[f"{before}rates"])
    found = tuple(
        Setting(
            row=row, place=i, learning_rate=rate, batch_size=given["batch_size"],
            flat=tuple(sorted(flat.items())),
        )
        for i, (flat, rate) in enumerate(each)
    )  # fmt: skip
    return found[: EFFORT[kind].settings]
