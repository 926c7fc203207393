"""What runs cost on this machine, and the learning rates that suit their length. Arithmetic."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from preftune.diagnosis.cost import duration
from preftune.errors import UserError

FACTOR = 3.0
"""From one rate of the grid to the next."""
MOST_RATE = 3e-3
CURVE_POINTS = 3
"""Evaluations on the way of a run."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method costs on this machine, beside the other processes: seconds, and responses."""

    ready: float
    """To load and prepare."""
    update: float
    """Of an update, the reference's log-probs of its data with it."""
    answer: float
    """To answer one held-out prompt and to measure the answer."""
    trained: float = 1.0
    """Responses trained on in an update."""
    parameters: float = 135e6
    default_rate: float = 1e-6

    def run(self, updates: int, prompts: int, curve: int = 0) -> float:
        """Seconds of a run with its evaluations."""
        return self.ready + updates * self.update + (prompts + CURVE_POINTS * curve) * self.answer


def parse_time(text: str, flag: str = "--budget") -> float:
    """Seconds of `90s`, `10m` or `1.5h`.

    Raises:
        UserError: it is none of these.
    """
    seconds = duration(text)
    if seconds <= 0 or not text.rstrip()[-1].isalpha():  # the unit is not left to be guessed
        raise UserError(f"{flag} '{text}': is no time. Give seconds, minutes or hours: 90s, 10m.")
    return seconds


def in_words(seconds: float) -> str:
    """A time as `parse_time` reads it, rounded up."""
    return f"{math.ceil(seconds)}s" if seconds < 100 else f"{math.ceil(seconds / 60)}m"


def rates(cost: Cost, updates: int, count: int) -> list[float]:
    """A small grid about a centre, the lowest first.

    A row's own rate was vetted in runs of thousands of updates. A run of a few must take larger
    steps to get anywhere: 5e-4 over all updates was found for 135M parameters, and larger models
    want smaller steps. Two rates lie around the centre; one is the centre.
    """
    short = 5e-4 * (135e6 / max(1.0, cost.parameters)) ** 0.6 / max(1, updates)
    centre = max(cost.default_rate, short)
    steps = {1: (0.0,), 2: (-0.5, 0.5)}.get(count, tuple(range(-(count // 2), count - count // 2)))
    found = [min(MOST_RATE, centre * FACTOR**step) for step in steps]
    return list(dict.fromkeys(float(f"{rate:.2g}") for rate in found))


def spread(length: int, count: int) -> list[int]:
    """Places of `count` of so many things, evenly from the first to the last; the middle of one."""
    if count >= length:
        return list(range(length))
    if count == 1:
        return [length // 2]
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


def makespan(costs: Sequence[float], workers: int) -> float:
    """Seconds until all jobs have ended, the longest begun first."""
    ends = [0.0] * max(1, workers)
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)
