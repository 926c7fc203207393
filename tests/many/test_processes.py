"""Two processes give what one gives, whichever way the weights are held."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import FSDP, launch, metrics

STRATEGIES: Mapping[str, Mapping[str, str]] = {"ddp": {}, "fsdp": FSDP}
SETTINGS = {
    "max_steps": "3", "batch_size": "5", "reward": "length:min", "eval_fraction": "0.2",
    "learning_rate": "0.01", "lr_schedule": "constant", "save_every": "1", "warmup_ratio": "0",
}  # fmt: skip


@pytest.fixture
def run(train: Callable[..., list[str]], here: Path) -> Callable[..., Path]:
    """Train in so many processes; the folder."""

    def do(name: str, size: int, *more: str, env: Mapping[str, str] | None = None, **changes: str) -> Path:
        args = train(*more, **{**SETTINGS, "output": name, **changes})
        started = launch(args, here / "logs" / name, size, env)
        codes = started.wait()
        assert codes == [0] * size, "\n".join(map(started.said, range(size)))
        for rank in range(1, size):
            assert started.said(rank) == "", "only the main process speaks"
        return here / name

    return do


def assert_alike(found: Path, expected: Path) -> None:
    """Equal metrics to 1e-5, and weights."""
    rows, others = metrics(found), metrics(expected)
    assert len(rows) == len(others) > 3
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
            else:
                assert row[name] == value, name
        if "loss" in other:
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    mine, theirs = (load_file(x / "model" / "model.safetensors") for x in (found, expected))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["dpo", "hypo", "ppo"])
def test_two_processes_are_as_one(run: Callable[..., Path], method: str, strategy: str) -> None:
    one = run("one", 1, method=method)
    assert_alike(run("two", 2, method=method, env=STRATEGIES[strategy]), one)
