"""Two runs in one folder; a lock whose owner was killed; a cache that two runs fill at once."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from preftune import cli
from preftune.errors import UserError
from preftune.runs import LOCK, RunFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork")


def elsewhere(path: Path) -> tuple[int, int]:
    """Another process that holds the folder until it is killed; its id, and where it says so."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with RunFolder.held(path):
                os.write(tell, b"held")
                time.sleep(60)
        finally:
            os._exit(1)
    assert os.read(told, 4) == b"held"
    return pid, told


def test_a_second_run_is_refused_until_the_first_is_killed(here, train, refused, capsys) -> None:
    assert cli.run(train("--max-steps", "2", "--save-every", "1")) == 0
    pid, told = elsewhere(here / "out")
    try:
        message = refused("train", "--output", "out", "--resume", "--max-steps", "3")
        assert "another run is writing there" in message
        with pytest.raises(UserError, match="another run"), RunFolder.held(here / "out"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
    assert (here / "out" / LOCK).exists(), "the file stays; it is the lock on it that is gone"
    assert cli.run(["train", "--output", "out", "--resume", "--max-steps", "3"]) == 0
    assert "going on from" in capsys.readouterr().err


def test_a_run_lets_go_after_an_error(here, train, refused) -> None:
    refused(*train("--reward", "length:min", method="on_policy_dpo", max_new_tokens="4000"))
    with RunFolder.held(here / "out"):
        pass


def _fill(folder: str, model: str, data: str, gate: object) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    import torch

    from preftune import train

    torch.set_num_threads(1)
    gate.wait()  # type: ignore[attr-defined]
    train({"model": model, "data": data, "output": folder, "method": "dpo", "max_steps": 3,
           "batch_size": 4, "threads": 1, "eval_fraction": 0})  # fmt: skip


def test_two_runs_fill_one_cache(tiny_model, pairs_file, tmp_path, monkeypatch) -> None:
    """At the same time, with the same result as one that had a cache of its own."""
    from preftune import train
    from test_training import same

    context = multiprocessing.get_context("fork")
    for number in range(2):
        monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / f"cache-{number}"))
        gate = context.Barrier(2)
        folders = [tmp_path / f"run-{number}-{i}" for i in range(2)]
        both = [
            context.Process(target=_fill, args=(str(f), tiny_model, pairs_file, gate))
            for f in folders
        ]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [p.exitcode for p in both] == [0, 0]
        monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / f"cache-{number}-alone"))
        alone = train({"model": tiny_model, "data": pairs_file, "method": "dpo", "max_steps": 3,
                       "output": str(tmp_path / f"alone-{number}"), "batch_size": 4,
                       "threads": 1, "eval_fraction": 0})  # fmt: skip
        assert all(same(alone.folder, f) for f in folders)
