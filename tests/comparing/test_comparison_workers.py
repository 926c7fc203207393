"""Workers: what they run by, how they end, and what is made of it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preftune.comparing import fleet, locks, running, worker
from preftune.comparing.job import Job, result_of, write, write_result
from preftune.errors import UserError
from preftune.reward_kinds import Function, Judged


def job(key: str) -> Job:
    return Job(key=key, kind="final", entry="m", order=0, settings={"seed": 3}, prompts=1)


def test_threads_and_device_are_those_of_who_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(running, "run", lambda one, *rest: seen.append(one.settings) or {})
    write(tmp_path, replace(job("k"), settings={"seed": 3, "device": "cuda", "threads": 64}))
    assert fleet.work(tmp_path, threads=2, device="cpu")
    assert seen == [{"seed": 3, "device": "cpu", "threads": 2}]


def test_a_worker_told_to_end_in_a_reward_ends_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reward raises is told to the user as its fault; this is not."""

    def reward(completions: list[str]) -> list[float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return [0.0 for _ in completions for _ in range(10)]

    def trained(*args: object) -> dict[str, Any]:
        Function("r", reward)(Judged(prompts=["a"], completions=["b"], tokens=[1], columns={}))
        return {}

    monkeypatch.setattr(running, "_trained", trained)
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    write(tmp_path, job("k"))
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: pytest.fail("it goes on"))
    try:
        assert worker.main(tmp_path, 1, "cpu") == fleet.SAVED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result_of(tmp_path, "k") is None and locks.held(tmp_path, "k") is None


def fleet_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, workers: int = 2
) -> tuple[fleet.Fleet, list[int]]:
    """Workers that do this in place of a worker's work, and the numbers of those begun."""
    begun: list[int] = []

    def start(self: fleet.Fleet, number: int) -> "subprocess.Popen[bytes]":
        begun.append(number)
        self._log(number).parent.mkdir(exist_ok=True)
        with open(self._log(number), "ab") as out:
            return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=out, stderr=out)

    monkeypatch.setattr(fleet.Fleet, "_start", start)
    monkeypatch.setattr(fleet, "LOOK", 0.02)
    return fleet.Fleet(tmp_path, workers), begun


def test_workers_that_keep_dying_are_not_begun_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "raise OSError('[Errno 28] No space left on device')"
    here, begun = fleet_of(tmp_path, monkeypatch, code)
    with pytest.raises(fleet.MayPass, match="No space left on device.*--resume") as caught, here:
        here.finish([job("k")], lambda done, total, said: None)
    assert "7 processes ended" in str(caught.value)
    assert len(begun) <= fleet.DEATHS * 2 + 2, "a job over which processes die is given up before"


def test_one_that_says_why_it_cannot_run_them_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import sys; print('{fleet.REASON}dpo: no such model'); sys.exit({fleet.CANNOT})"
    here, _ = fleet_of(tmp_path, monkeypatch, code)
    with pytest.raises(UserError, match="^dpo: no such model$"), here:
        here.finish([job("k")], lambda done, total, said: None)
    assert result_of(tmp_path, "k") is None


def test_deaths_are_counted_from_the_last_job_that_ended_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that another machine ends say nothing of this one's."""
    here, _ = fleet_of(tmp_path, monkeypatch, "", workers=1)
    keys = ["a", "b"]
    here._log(0).parent.mkdir()
    here._log(0).write_text("no space")
    for _ in range(3):
        here._look_into(0, 1, keys)
    locks.acquire(tmp_path, "a")
    write_result(tmp_path, "a", {"key": "a"})
    here._look_into(0, 1, keys)
    assert here._died == 1
    write_result(tmp_path, "b", {"key": "b"})
    other = locks.acquire(tmp_path, "b")
    assert other is not None
    other.path.write_text(json.dumps({"host": "elsewhere/1", "pid": 1}))
    here._look_into(0, fleet.SAVED, keys)
    here._look_into(0, -9, keys)
    assert here._died == 2
