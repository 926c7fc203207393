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
from processes import DEEPSPEED, FSDP, launch, metrics
from safetensors.torch import load_file

STRATEGIES: Mapping[str, Mapping[str, str]] = {"ddp": {}, "fsdp": FSDP}
SETTINGS = {
    "max_steps": "3", "batch_size": "5", "reward": "length:min", "eval_fraction": "0.2",
    "learning_rate": "0.01", "lr_schedule": "constant", "save_every": "1", "warmup_ratio": "0",
}  # fmt: skip


@pytest.fixture
def run(train: Callable[..., list[str]], here: Path) -> Callable[..., Path]:
    """Train in so many processes; the folder."""

    def do(
        name: str, size: int, *more: str, env: Mapping[str, str] | None = None, **changes: str
    ) -> Path:
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
        if 0 < row["step"] < others[-1]["step"]:  # an earlier end has an evaluation of its own
            row, other = ({k: v for k, v in x.items() if "eval" not in k} for x in (row, other))
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


@pytest.mark.slow
@pytest.mark.parametrize("asked", [FSDP, DEEPSPEED], ids=["fsdp", "deepspeed"])
def test_weights_are_spread(
    train: Callable[..., list[str]], here: Path, asked: Mapping[str, str]
) -> None:
    """Each process holds its part of every weight and moment: DTensors on a CPU mesh."""

    def before(rank: int) -> None:
        from preftune import checkpoint, loop

        start = checkpoint.save

        def look(run: loop.State, folder: Path) -> Path:
            from torch.distributed.tensor import DTensor

            weights = list(run.world.policy.parameters())
            moments = [s["exp_avg"] for s in run.optimizer.state_dict()["state"].values()]
            assert len(moments) == len(weights)
            assert all(isinstance(x, DTensor) for x in (*weights, *moments))
            whole, own = (
                sum(x.numel() for x in xs) for xs in (weights, [w.to_local() for w in weights])
            )
            Path(f"held{rank}.json").write_text(json.dumps([own, whole]))
            return start(run, folder)

        checkpoint.save = look

    args = train(**{**SETTINGS, "method": "ppo"})
    started = launch(args, here / "logs", 2, asked, before)
    assert started.wait() == [0, 0], started.said(0) + started.said(1)
    assert ("ZeRO-2 is done by" in started.said(0)) is (asked is DEEPSPEED)
    (first, whole), (second, _) = (json.loads((here / f"held{r}.json").read_text()) for r in (0, 1))
    assert first + second == whole and first < 0.6 * whole


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp-one", "one-ddp", "fsdp-one", "one-fsdp", "fsdp-ddp"])
def test_checkpoints_are_interchangeable(run: Callable[..., Path], way: str) -> None:
    """Two steps one way, the third another: as three steps of one process."""
    sizes = {"one": (1, None), "ddp": (2, {}), "fsdp": (2, FSDP)}
    (size, env), (then, after) = (sizes[x] for x in way.split("-"))
    expected = run("expected", 1, method="ppo")
    run("out", size, method="ppo", env=env, max_steps="2")
    assert_alike(run("out", then, "--resume", method="ppo", env=after), expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(
    train: Callable[..., list[str]], here: Path, victim: int, strategy: str
) -> None:
    def before(rank: int) -> None:
        from preftune import loop

        update = loop.update

        def dying(run: loop.State, *args: Any, **more: Any) -> Any:
            if rank == victim and run.step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(run, *args, **more)

        loop.update = dying

    args = train(**{**SETTINGS, "method": "hypo"})
    began = time.monotonic()
    started = launch(args, here / "logs", 2, STRATEGIES[strategy], before)
    codes = started.wait()
    assert time.monotonic() - began < 280, "long before gloo's half hour"
    assert codes[victim] == -9 and codes[1 - victim] == 2
    said = started.said(1 - victim)
    assert said.count("error: ") == 1 and "is gone" in said and "Traceback" not in said
    assert (here / "out" / "checkpoints" / "step-000001").is_dir()


REWARD = """
import os
def reward(prompts, completions, **_):
    if os.environ.get("FAILS") == os.environ["RANK"] and len(open("asked").read()) > {after}:
        raise ValueError("the reward fell silent")
    open("asked", "a").write("x")
    return [float(len(c)) for c in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_is_said_once(
    train: Callable[..., list[str]], here: Path, rank: int
) -> None:
    (here / "silent.py").write_text(REWARD.format(after=4))
    (here / "asked").write_text("")
    changes = {**SETTINGS, "method": "rloo", "reward": "silent.py:reward", "max_steps": "30"}
    started = launch(train(**changes), here / "logs", 2, {"FAILS": str(rank)})
    assert started.wait() == [2, 2], started.said(0) + started.said(1)
    said = [started.said(r).count("the reward fell silent") for r in (0, 1)]
    assert said[rank] == 1 and said[1 - rank] == 0, said


@pytest.mark.slow
def test_what_all_do_wrong_is_said_once(train: Callable[..., list[str]], here: Path) -> None:
    started = launch(train(**{**SETTINGS, "data": "nowhere.jsonl"}), here / "logs", 2)
    assert started.wait() == [2, 2]
    assert started.said(0).count("error: ") == 1 and started.said(1) == ""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_saves_all(
    train: Callable[..., list[str]], run: Callable[..., Path], here: Path, strategy: str
) -> None:
    def before(rank: int) -> None:
        from preftune import loop

        update = loop.update

        def asked(run: loop.State, *args: Any, **more: Any) -> Any:
            if rank == 1 and run.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(run, *args, **more)

        loop.update = asked

    expected = run("expected", 1, method="ppo")
    args = train(**{**SETTINGS, "method": "ppo", "save_every": "50"})
    started = launch(args, here / "logs", 2, STRATEGIES[strategy], before)
    assert started.wait() == [75, 75], started.said(0) + started.said(1)
    assert started.said(0).count("saved: ") == 1 and started.said(1) == ""
    resumed = run("out", 2, "--resume", method="ppo", env=STRATEGIES[strategy], save_every="50")
    assert_alike(resumed, expected)
