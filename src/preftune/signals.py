"""Signals that end a run at its next step, with everything saved."""

import signal
import threading
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Ctrl-C; what a system sends before it ends a process; what a cluster's scheduler is told to."""


class Signals:
    """The first signal asks the loop to end after its step; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """The first signal."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, n) for n in _NAMES if hasattr(signal, n)):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked = number
