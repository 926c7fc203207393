"""Jobs taken from a folder: one holder each, whoever dies, sleeps or is told to end."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preftune.comparing import fleet, locks, running
from preftune.comparing.job import RUNS, Job, read, result_of, write, write_result
from preftune.errors import Saved, UserError
from preftune.runs import RunFolder


def job(key: str, order: int = 0) -> Job:
    return Job(key=key, kind="final", entry="m", order=order, settings={"seed": 3}, prompts=1)


def held_by_another(folder: Path, key: str, **said: Any) -> Path:
    """A lock as another process leaves it."""
    lock = locks.acquire(folder, key)
    assert lock is not None
    lock.path.write_text(json.dumps({"host": locks.this_host(), "pid": os.getpid(), **said}))
    return lock.path


def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_a_job_is_a_file_and_comes_back_in_order(tmp_path: Path) -> None:
    for one in (job("b", 2), job("a", 5), job("c", 1), job("b", 2)):
        write(tmp_path, one)
    assert [j.key for j in read(tmp_path)] == ["c", "b", "a"]
    assert read(tmp_path)[0] == job("c", 1) and job("c").seed == 3


def test_only_one_of_many_gets_a_job(tmp_path: Path) -> None:
    found: list[locks.Lock | None] = []
    start = threading.Barrier(16)

    def grab() -> None:
        start.wait()
        found.append(locks.acquire(tmp_path, "k"))

    threads = [threading.Thread(target=grab) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lock is not None for lock in found) == 1 and len(found) == 16


def test_who_lives_keeps_it_and_who_let_go_does_not(tmp_path: Path) -> None:
    lock = locks.acquire(tmp_path, "k")
    assert lock is not None and locks.acquire(tmp_path, "k") is None
    lock.said["step"] = 4
    lock.beat()
    said = locks.held(tmp_path, "k")
    assert said is not None and said["step"] == 4
    lock.release()
    assert locks.held(tmp_path, "k") is None
    again = locks.acquire(tmp_path, "k")
    assert again is not None and again.number == 2 and lock.lost() and not again.lost()
    assert locks.deaths(tmp_path, "k", again.number) == 0


def test_a_dead_process_is_followed_at_once(tmp_path: Path) -> None:
    held_by_another(tmp_path, "k", pid=gone())
    found = locks.acquire(tmp_path, "k")
    assert found is not None and found.number == 2
    assert locks.deaths(tmp_path, "k", found.number) == 1


def test_a_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    held_by_another(tmp_path, "k", begun="long ago")
    assert locks.acquire(tmp_path, "k") is not None


def test_another_machine_is_followed_when_it_falls_silent(tmp_path: Path) -> None:
    path = held_by_another(tmp_path, "k", host="elsewhere/1", pid=gone())
    assert locks.acquire(tmp_path, "k") is None, "its processes cannot be seen from here"
    before = time.time() - locks.SILENT - 5
    os.utime(path, (before, before))
    assert locks.acquire(tmp_path, "k") is not None


def test_a_container_does_not_know_the_processes_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one machine, with the same name: the number is of another process, or of none, here."""
    here = locks.this_host()
    held_by_another(tmp_path, "k", pid=gone())
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert locks.this_host() != here
    assert locks.acquire(tmp_path, "k") is None and not locks.is_ours(tmp_path, "k")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was run, in place of running it."""
    done: list[str] = []

    def run(one: Job, folder: Path, tell: running.Tell) -> dict[str, Any]:
        tell(1, 2)
        done.append(one.key)
        return {"key": one.key, "kind": one.kind, "entry": one.entry, "seed": 3}

    monkeypatch.setattr(running, "run", run)
    return done


def test_every_job_is_run_once_by_whoever_is_there(tmp_path: Path, runs: list[str]) -> None:
    jobs = [job(f"k{i}", i) for i in range(12)]
    for one in jobs:
        write(tmp_path, one)

    def take_all() -> None:
        while fleet.work(tmp_path):
            pass

    threads = [threading.Thread(target=take_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(runs) == sorted(j.key for j in jobs)
    assert not fleet.work(tmp_path)


def test_a_job_that_ends_between_two_looks_is_not_run(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, job("k"))
    acquire = locks.acquire

    def late(folder: Path, key: str) -> locks.Lock | None:
        write_result(folder, key, {"key": key})
        return acquire(folder, key)

    monkeypatch.setattr(locks, "acquire", late)
    assert fleet.take(tmp_path) is None and locks.held(tmp_path, "k") is None


def test_a_fleet_of_none_runs_them_here_and_says_how_far_it_is(
    tmp_path: Path, runs: list[str]
) -> None:
    write_result(tmp_path, "k0", {"key": "k0", "kept": True})
    seen: list[tuple[int, int]] = []
    with fleet.Fleet(tmp_path, 0) as here:
        found = here.finish(
            [job("k0"), job("k1")], lambda done, total, said: seen.append((done, total))
        )
    assert found["k0"]["kept"] and found["k1"]["entry"] == "m"
    assert runs == ["k1"], "what has a result is not run again"
    assert seen[0] == (1, 2) and seen[-1] == (2, 2)


def test_a_job_over_which_processes_die_is_given_up(tmp_path: Path, runs: list[str]) -> None:
    write(tmp_path, job("k"))
    for _ in range(fleet.DEATHS):
        held_by_another(tmp_path, "k", pid=gone())
    assert not fleet.work(tmp_path) and runs == []
    result = result_of(tmp_path, "k")
    assert result is not None and "memory" in result["failed"] and result["why"] == running.FAULT


def test_one_that_is_told_to_end_leaves_its_job_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: object) -> dict[str, Any]:
        raise Saved("asked to end")

    monkeypatch.setattr(running, "run", run)
    write(tmp_path, job("k"))
    with pytest.raises(Saved):
        fleet.work(tmp_path)
    assert result_of(tmp_path, "k") is None
    taken = fleet.take(tmp_path)
    assert taken is not None and taken[1].number == 2


def test_a_run_that_cannot_begin_here_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has no such model must not fail all jobs."""
    asked: list[object] = []

    def prepare(config: object, overrides: object) -> None:
        asked.append(overrides)
        raise UserError("model 'x': no such folder")

    monkeypatch.setattr(running, "prepare", prepare)
    for key, kind, name in (("a", "final", "m"), ("b", "reference", "the untrained model")):
        one = replace(job(key), kind=kind, overrides={"terms.0.beta": 0.5})
        write(tmp_path, one)
        with pytest.raises(running.Unable, match=f"{name}: model 'x': no such folder"):
            fleet.work(tmp_path, [key])
        assert result_of(tmp_path, key) is None and asked.pop() == one.overrides
        taken = fleet.take(tmp_path, [key])
        assert taken is not None and locks.deaths(tmp_path, key, taken[1].number) == 0


def test_a_run_whose_folder_is_still_written_to_is_not_taken(
    tmp_path: Path, runs: list[str]
) -> None:
    write(tmp_path, job("a"))
    write(tmp_path, job("b"))
    with RunFolder.held(tmp_path / RUNS / "a"):
        assert fleet.work(tmp_path) and not fleet.work(tmp_path)
        assert runs == ["b"] and result_of(tmp_path, "a") is None
    assert fleet.work(tmp_path) and runs == ["b", "a"]


def test_what_a_run_ends_with_is_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure is kept as one, and asks nothing of the others; being told to end is none."""
    from preftune.errors import GuardStop

    for error, why in (
        (GuardStop("step 3: the loss is nan"), running.STOPPED),
        (UserError("data: none"), running.REFUSED),
        (MemoryError("out of it"), running.FAULT),
    ):

        def broken(*args: object, error: Exception = error) -> dict[str, Any]:
            raise error

        monkeypatch.setattr(running, "_trained", broken)
        found = running.run(job("k"), tmp_path)
        assert found["why"] == why and str(error) in found["failed"]

    def saved(*args: object) -> dict[str, Any]:
        raise Saved("x")

    monkeypatch.setattr(running, "_trained", saved)
    with pytest.raises(Saved):
        running.run(job("k"), tmp_path)
