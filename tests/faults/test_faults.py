"""A few faults of each kind; `make faults` tries hundreds."""

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Trials  # noqa: E402


@pytest.fixture(scope="module")
def runs(tiny_model: str, pairs_file: str, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tiny_model, pairs_file, tmp_path_factory.mktemp("faults"), "ppo")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("at_random", ()), ("at_point", ("tensors", 2)), ("at_point", ("flushed", 1)),
        ("at_point", ("renamed", 3)), ("at_point", ("model", 1)), ("disk_full", ("filled", 2)),
        ("file_too_large", ()), ("damaged", ()), ("damaged", ()),
        ("asked", (signal.SIGTERM,)), ("asked", (signal.SIGUSR1,)),
    ],
)  # fmt: skip
def test_a_disturbed_run_ends_like_an_undisturbed_one(
    name: str, arguments: tuple, runs: Trials
) -> None:
    trial = getattr(runs, name)(*arguments)
    assert not trial.fault, f"{trial.kind} ({trial.where}): {trial.fault}"
