"""The rows that are compared, with the settings among which each is tuned."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from preftune import methods, plain_yaml, spec
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
        return resolve(configure(_row(self.row), settings))

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


def _row(name: str) -> Method:
    own = _all()[name].get("row")
    return spec.from_row(own) if own else methods.get(name)


def ends_by_itself(row: str) -> bool:
    """Its reward no longer rising, it stops."""
    return _row(row).patience is not None


def names() -> list[str]:
    """Of the rows."""
    return list(_all())


@cache
def settings_of(row: str) -> tuple[Setting, ...]:
    """All that the row is tuned over."""
    given = _all()[row]
    each = itertools.product(given["settings"], given["rates"])
    return tuple(
        Setting(
            row=row, place=i, learning_rate=rate, batch_size=given["batch_size"],
            flat=tuple(sorted(flat.items())),
        )
        for i, (flat, rate) in enumerate(each)
    )  # fmt: skip
