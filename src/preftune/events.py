"""What a run tells those that follow it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a callback is told."""

    kind: str
    """note, stage (work before the first update), start, step, save, end or interrupted."""
    step: int = 0
    total: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""


Callback = Callable[[Event], None]
Tell = Callable[..., None]
"""tell(kind, **fields of Event)."""


def teller(callbacks: Sequence[Callback]) -> Tell:
    """Tell every callback."""

    def tell(kind: str, **details: Any) -> None:
        for callback in callbacks:
            callback(Event(kind=kind, **details))

    return tell
