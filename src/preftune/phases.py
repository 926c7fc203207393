"""Where the time of an update goes: phases are named where the work is done, and timed where
somebody records them.

    prefill   prompts through the sampler        decode   one token after another
    score     log-probs and values of a round    reward   the reward's own time
    train     forward and backward of an update, and the step
    sync      weights to an engine that samples

A phase inside another takes its time away from the outer one, so that times add up. What no phase
covers is idle.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

NAMES = ("prefill", "decode", "score", "reward", "train", "sync")


@dataclass
class Recorder:
    """Seconds and tokens of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    def turn(self) -> None:
        """The time since the last turn belongs to the innermost open phase."""
        if torch.cuda.is_initialized():  # kernels run behind the program's back
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def begin(self, name: str) -> None:
        """Open a phase."""
        self.turn()
        self._open.append(name)

    def end(self) -> None:
        """Close the innermost phase."""
        self.turn()
        self._open.pop()


_recorders: list[Recorder] = []


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record the phases that are run inside."""
    recorder = Recorder()
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


@contextmanager
def phase(name: str, tokens: int = 0) -> Iterator[None]:
    """Time what is run inside under that name, where somebody records.

    Args:
        tokens: that the work goes through, where known beforehand (`count` adds others).
    """
    assert name in NAMES, f"'{name}' is no phase"
    recorder = _recorders[-1] if _recorders else None
    if recorder is None:
        yield
        return
    recorder.begin(name)
    try:
        yield
    finally:
        recorder.end()
        count(name, tokens)


def count(name: str, tokens: int) -> None:
    """Add tokens to a phase's."""
    if _recorders and tokens:
        recorder = _recorders[-1]
        recorder.tokens[name] = recorder.tokens.get(name, 0) + tokens
