"""Hostile input: two hundred cases a target; `make fuzz` tries ten thousand."""

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from strategies import STRATEGIES  # noqa: E402
from targets import SEEDS, SLOW, TARGETS  # noqa: E402

CASES = int(os.environ.get("FUZZ_CASES", "200"))
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


def check(name: str, data: bytes) -> None:
    """One case, in its time."""
    signal.alarm(PATIENCE)
    try:
        TARGETS[name](data)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("name", list(TARGETS))
def test_no_input_breaks_it(name: str, patience: None) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in SEEDS[name]:
        check(name, data)

    @seed(SEED)
    @settings(
        max_examples=CASES // SLOW.get(name, 1), database=None,
        deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(data=STRATEGIES[name]())
    def cases(data: bytes) -> None:
        check(name, data)

    cases()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY
