"""What is compared and what it may cost: what the user asked for, as a folder keeps it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.comparing.entries import Entry
from preftune.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is compared, and what it may cost."""

    entries: Sequence[Entry]
    settings: Mapping[str, Any]
    """Of all."""
    budget: float | None = None
    """Seconds of the whole command, from `began`."""
    per_run: float | None = None
    steps: int | None = None
    samples: int | None = None
    seeds: int = 3
    rates: Sequence[float] = ()
    """The grid of each method; empty: three about a centre."""
    keep_models: bool = False
    notes: Sequence[str] = field(default_factory=tuple)

    def plain(self) -> dict[str, Any]:
        """As config.yaml holds it."""
        own = {k: v for k, v in vars(self).items() if k not in ("entries", "settings")}
        return {
            "command": "compare",
            "settings": dict(self.settings),
            "entries": [{k: _copied(v) for k, v in vars(e).items()} for e in self.entries],
            **{k: _copied(v) for k, v in own.items()},
        }


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def request_of(found: Mapping[str, Any], folder: Path) -> Request:
    """What `plain` gave.

    Raises:
        UserError: the folder holds something else.
    """
    if found.get("command") != "compare":
        raise UserError(f"output '{folder}': holds no comparison. Give another folder.")
    values = {k: v for k, v in found.items() if k != "command"}
    return Request(**{**values, "entries": [Entry(**e) for e in found["entries"]]})
