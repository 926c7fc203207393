"""What several processes share out, and that nothing of it changes a run. Their part is played by
threads; `test_processes` has the processes themselves."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import DEEPSPEED
from threads import team_of

from preftune import building
from preftune.config import Adapter, Config
from preftune.errors import Elsewhere, GuardStop, UserError
from preftune.samples import Samples
from preftune.strategy import launched, without_deepspeed
from preftune.team import Team, working
from tables import Table, begin, by_arm, gradient, make_world, row_of

ROWS = ("dpo", "hypo", "ppo", "rloo", "on_policy_dpo", "best_of_n", "kto", "reward")


def two_updates(name: str, **more: Any) -> dict[str, Any]:
    """Losses, figures and gradients of two updates."""
    world = make_world(name, batch_size=5, micro_batch_tokens=7, **more)
    run, settings = begin(row_of(name), world)
    out: dict[str, Any] = {}
    for step in range(2):
        run.optimizer.zero_grad()
        loss, figures = gradient(run.groups, world, run.version)
        out[f"loss{step}"] = float("nan") if loss is None else loss
        out |= {f"{k}{step}": v for k, v in figures.items()}
        for parameter_name, p in world.policy.named_parameters():
            out[f"{parameter_name}{step}"] = p.grad.clone()
        run.optimizer.step(0.05, torch.tensor(True))
        run.version += 1
    return out


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if value is None:
            assert other is None, name
            continue
        close = torch.allclose(
            torch.as_tensor(other, dtype=torch.float64),
            torch.as_tensor(value, dtype=torch.float64),
            rtol=1e-9, atol=1e-9, equal_nan=True,
        )  # fmt: skip
        assert close, (name, other, value)


@pytest.mark.long
@pytest.mark.parametrize("size, name", [*((2, name) for name in ROWS), (3, "ppo")])
def test_updates_are_those_of_one_process(name: str, size: int) -> None:
    expected = two_updates(name)
    for found in team_of(size, lambda team: two_updates(name)):
        assert isinstance(found, dict), found
        assert_alike(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("name", ["dpo", "hypo"])
def test_more_processes_than_prompts(name: str) -> None:
    few = Table(rows=((0, 1), (2, 3)))
    expected = two_updates(name, table=few)
    for found in team_of(5, lambda team: two_updates(name, table=few)):
        assert isinstance(found, dict), found
        assert_alike(found, expected)


def test_every_response_is_judged_once() -> None:
    lock, asked = threading.Lock(), []

    def reward(samples: Samples) -> torch.Tensor:
        with lock:
            asked.extend(samples.row.tolist())
        return by_arm(samples)

    two_updates("rloo", reward=reward)
    alone = sorted(asked)
    asked.clear()
    team_of(2, lambda team: two_updates("rloo", reward=reward))
    assert sorted(asked) == alone and alone


def test_an_error_of_one_ends_all_and_is_said_once() -> None:
    def work(team: Team) -> None:
        team.gather(0)
        if team.rank == 1:
            raise GuardStop("the reward fell silent")
        team.gather(1)

    first, second, third = team_of(3, work)
    assert isinstance(second, GuardStop)
    for other in (first, third):
        assert isinstance(other, Elsewhere) and other.code == 3 and "fell silent" in str(other)


def test_an_error_of_all_is_said_by_the_first() -> None:
    def work(team: Team) -> None:
        raise UserError("data: no such file")

    first, second = team_of(2, work)
    assert isinstance(first, UserError)
    assert isinstance(second, Elsewhere) and second.code == 2


def test_who_is_done_waits_for_those_who_fail() -> None:
    def work(team: Team) -> str:
        if team.rank == 1:
            raise UserError("full disk")
        return "done"

    first, second = team_of(2, work)
    assert isinstance(first, Elsewhere) and isinstance(second, UserError)


def test_one_who_is_gone_is_missed() -> None:
    def gone(value: Any) -> list[Any]:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(UserError, match="is gone.*--resume"):
        Team(0, 2, gone).gather(0)
    assert "is gone" in str(Team(1, 2, gone).ended(RuntimeError("all-reduce failed")))


def test_out_of_memory_of_one_is_smaller_pieces_of_all(caplog: pytest.LogCaptureFixture) -> None:
    expected = two_updates("dpo")

    def work(team: Team) -> Any:
        world = make_world("dpo", batch_size=5)
        run, _ = begin(row_of("dpo"), world)
        inner, calls = world.policy.outputs, []

        def outputs(samples: Samples, names: frozenset[str]) -> Any:
            calls.append(len(samples.row))
            if team.rank == 1 and len(calls) == 1:
                raise MemoryError
            return inner(samples, names)

        world.policy.outputs = outputs
        found = gradient(run.groups, world, 0)
        return {"loss": found[0], "calls": calls}

    for found in team_of(2, work):
        assert isinstance(found, dict), found
        assert torch.allclose(found["loss"], expected["loss0"])


def test_sharded_passes_are_as_many_in_every_process() -> None:
    work = list("abcde")
    own = [Team(rank, 3, sharded=True).turns(work) for rank in range(3)]
    assert {len(x) for x in own} == {2}
    assert sorted(x for turns in own for x, counts in turns if counts) == work
    assert own[2][1] == ("e", False)
    assert [Team(rank, 3).turns(work) for rank in range(3)] == [
        [(x, True) for x in "ad"], [(x, True) for x in "be"], [(x, True) for x in "c"]
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", ["dpo", "hypo"])
def test_passes_that_do_not_count_change_nothing(name: str) -> None:
    """Sharded weights' gradients are summed by the passes themselves: here by hand."""
    expected = two_updates(name)

    def work(team: Team) -> dict[str, Any]:
        world = make_world(name, batch_size=5, micro_batch_tokens=7)
        run, _ = begin(row_of(name), world)
        loss, figures = gradient(run.groups, world, 0)
        grads = [sum(team.gather(p.grad)) for _, p in world.policy.named_parameters()]
        return {"loss": loss, "grads": grads}

    for found in team_of(2, work, sharded=True):
        assert isinstance(found, dict), found
        assert torch.allclose(found["loss"], expected["loss0"])
        names = [k for k in expected if k.endswith("logits0")]
        for n, g in zip(names, found["grads"], strict=True):
            assert torch.allclose(g, expected[n])


def test_pieces_are_a_multiple_of_the_processes() -> None:
    assert Team(0, 1).piece(100, None) is None and Team(0, 1).piece(100, 7) == 7
    assert Team(0, 2).piece(100, None) == 50
    assert Team(0, 2).piece(100, 40) == 25  # three passes would be one too few
    assert Team(0, 4).piece(3, None) == 1


@pytest.mark.parametrize(
    "variables, file, sharded",
    [
        ({}, None, True),  # the launcher's own default is stage 2
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, None, False),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, None, True),
        ({}, {"zero_optimization": {"stage": 1, "offload_param": {"device": "none"}}}, True),
        ({}, {"zero_optimization": {"stage": 0}}, False),
        ({}, {"bf16": {"enabled": True}}, False),
        ({}, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, None),
    ],
)
def test_zero_is_done_by_fsdp(
    variables: dict[str, str], file: Any, sharded: bool | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in (DEEPSPEED | variables).items():
        monkeypatch.setenv(name, value)
    if file is not None:
        (tmp_path / "zero.json").write_text(json.dumps(file))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    if sharded is None:
        with pytest.raises(UserError, match="optimizer is not offloaded to 'cpu'"):
            launched()
        return
    found = launched()
    assert found.sharded is sharded and found.note and "DeepSpeed" in found.note
    with without_deepspeed():
        assert not launched().note, "Accelerate does not look for its package"
    assert launched() == found


@pytest.mark.parametrize(
    "variables, what",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "--fsdp_version 2"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "stage is '4'"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "param is not offload"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, "cannot be read"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
    ],
)
def test_other_strategies_are_refused(
    variables: dict[str, str], what: str, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    assert what in refused("train", "--data", "pairs.jsonl")


def test_sharded_adapters_are_refused() -> None:
    settings = Config(adapter=Adapter(kind="lora"))
    building.check_adapter(settings)
    with working(Team(sharded=True)), pytest.raises(UserError, match="not with FSDP"):
        building.check_adapter(settings)
