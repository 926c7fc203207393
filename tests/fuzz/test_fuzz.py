"""Hostile input: five hundred cases a target; `make fuzz` tries ten thousand."""

import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from mutation import mutated  # noqa: E402
from targets import SEEDS, TARGETS  # noqa: E402

CASES = int(os.environ.get("FUZZ_CASES", "500"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
PATIENCE = 5
"""Seconds a case may take."""
MEMORY = 2**30
"""Bytes by which all cases of a target may raise the peak."""


@pytest.fixture
def patience() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", list(TARGETS))
def test_no_input_breaks_it(name: str, patience: None) -> None:
    chance = random.Random(f"{name} {SEED}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = [*SEEDS[name], *(mutated(SEEDS[name], chance) for _ in range(CASES))]
    for data in cases:
        signal.alarm(PATIENCE)
        try:
            TARGETS[name](data)
        except Exception as error:
            raise AssertionError(f"{name}: {data[:200]!r} ({len(data)} bytes)") from error
    signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY
