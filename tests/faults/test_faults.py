"""A few faults of each kind; `make faults` tries hundreds."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from harness import Trials  # noqa: E402
from judges import KINDS, JudgeTrials  # noqa: E402

pytestmark = pytest.mark.long


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


@pytest.fixture(scope="module")
def judged(
    tiny_model: str, pairs_file: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[JudgeTrials]:
    found = JudgeTrials(tiny_model, pairs_file, tmp_path_factory.mktemp("judged"))
    yield found
    found.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_judges_faults_that_pass_change_nothing(kind: str, judged: JudgeTrials) -> None:
    trial = judged.sometimes(kind)
    assert not trial.fault, f"{trial.kind} ({trial.where}): {trial.fault}"


@pytest.mark.parametrize("name", ["goes_away", "goes_away", "run_killed"])
def test_a_judge_or_a_run_that_ends_while_it_asks(name: str, judged: JudgeTrials) -> None:
    trial = getattr(judged, name)()
    assert not trial.fault, f"{trial.kind} ({trial.where}): {trial.fault}"
