"""Many runs as one program: each is bitwise what it is alone, in any company, order or chunk."""

import json
import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

import tables
from preftune import loop
from preftune import objectives as o
from preftune.cells import Cell, advance
from preftune.errors import GuardStop, UserError
from preftune.method import Method, resolve
from preftune.policies.categorical import Categorical
from preftune.problems.arms import Arms, States
from preftune.problems.unseen import Unseen
from preftune.problems.words import Words
from preftune.reproduce import rows
from preftune.runs import LOCK, RunFolder
from preftune.study import CellsFailed, Study, curves
from preftune.terms import Times

pytestmark = pytest.mark.long

SEEDS = (3, 11, 4, 900, 27)


def _cell(problem: Any, method: Method, batch_size: int, updates: int = 6, **more: Any) -> Cell:
    return Cell(
        problem=problem, method=method, updates=updates, batch_size=batch_size,
        learning_rate=1e-2, eval_every=2, **more,
    )  # fmt: skip


ARMS, KEPT = Arms(rows=8), Arms(rows=8, responses=4)
FRESH, OLD = rows.fresh(4, 2, 4), rows.kept(4)
CELLS = {
    "arms best_of_n": _cell(ARMS, rows.best_of_n(FRESH), 2),
    "arms rwr": _cell(ARMS, rows.rwr(FRESH, 0.1), 2),
    "arms ppo": _cell(ARMS, rows.ppo(FRESH, 0.2), 2),
    "arms dpo": _cell(ARMS, rows.dpo(FRESH, 0.1), 12),
    "arms reinforce": _cell(KEPT, rows.reinforce(OLD, False), 4),
    "arms ipo": _cell(KEPT, rows.ipo(OLD, 0.05, 0.2), 24),
    "arms scaled": _cell(KEPT, rows.dpo_with(OLD, 0.1, 0.25), 24, max_grad_norm=1e-3),
    "states best_of_n": _cell(States(states=12), rows.best_of_n(FRESH), 2),
    "states ipo": _cell(States(states=6, responses=4), rows.ipo(OLD, 0.05, 0.0), 36),
    "words dpo": _cell(Words(pairs=40), rows.given_pairs(0.1), 10),
    "words chi_po": _cell(Words(pairs=40, data="covered"),
                          rows.given_pairs(0.1, o.chi_po, clip=4.0), 10),
    "words hypo": _cell(Words(pairs=40), rows.hypo(0.1, 0.01, 3), 10),
    "words half": _cell(Words(pairs=40, labels="rm_same"), rows.half_and_half(0.1), 10),
    "words replay": _cell(Words(), rows.given_pairs(0.1), 10,
                          after=_cell(Words(), rows.fresh_pairs(0.1), 10)),
    "unseen": _cell(Unseen(arms=20, seen=10, reward_range=2.0, pairs=30, anti=2.0),
                    rows.given_pairs(0.1), 10),
}  # fmt: skip


def _by_run(found: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {s: [r for r in found if r["seed"] == s] for s in {r["seed"] for r in found}}


def _same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """Bit for bit; NaN equals NaN."""
    return repr(a) == repr(b)


@pytest.mark.parametrize("name", CELLS)
def test_a_run_alone_is_what_it_is_in_company(name: str) -> None:
    cell = CELLS[name]
    together = _by_run(advance(cell, SEEDS))
    assert all(len(r) == 4 for r in together.values()), "steps 0, 2, 4, 6"
    assert len({repr(r[-1]) for r in together.values()}) > 1, "seeds differ"
    reversed_ = _by_run(advance(cell, SEEDS[::-1]))
    for seed in SEEDS:
        assert _same(together[seed], reversed_[seed]), f"seed {seed}: order"
    for seed in SEEDS[:2]:
        assert _same(together[seed], _by_run(advance(cell, (seed,)))[seed]), f"seed {seed}: alone"


def test_other_processes_and_chunks_change_nothing(tmp_path) -> None:
    cell = replace(CELLS["arms dpo"], problem=replace(ARMS, chunk=2))
    here, there = Study(tmp_path / "a", workers=0), Study(tmp_path / "b", workers=2)
    told: list[tuple[int, int]] = []
    here.run([(cell, SEEDS)])
    there.run([(cell, SEEDS)], tick=lambda done, total: told.append((done, total)))
    assert told[-1] == (30, 30)
    a, b = here.curves(cell, SEEDS), there.curves(cell, SEEDS)
    assert a.steps == b.steps == (0, 2, 4, 6)
    assert all(torch.equal(a.figures[n].nan_to_num(-1), b.figures[n].nan_to_num(-1))
               for n in a.figures)  # fmt: skip
    whole = curves(advance(replace(cell, problem=ARMS), SEEDS), SEEDS)
    assert torch.equal(whole.figures["reward"], a.figures["reward"])


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are read from the folder, a torn last line is run again."""
    cell = CELLS["arms rwr"]
    Study(tmp_path, workers=0).run([(cell, SEEDS[:3])])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    assert {"cell", "seed", "step", "reward", "loss"} <= json.loads(lines[-1]).keys()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    asked: list[tuple[int, ...]] = []
    plain = advance
    monkeypatch.setattr(
        "preftune.cells.advance", lambda c, seeds: (asked.append(seeds), plain(c, seeds))[1]
    )
    again = Study(tmp_path, workers=0)
    again.run([(cell, SEEDS)])
    assert asked == [(SEEDS[2], *SEEDS[3:])]
    fresh = Study(None, workers=0)
    fresh.run([(cell, SEEDS)])
    a, b = again.curves(cell, SEEDS), fresh.curves(cell, SEEDS)
    assert torch.equal(a.figures["reward"], b.figures["reward"])
    assert Study(tmp_path).missing(cell, SEEDS) == [], "what followed the torn line is kept, too"


def test_a_folder_has_one_study_at_a_time(tmp_path: Path) -> None:
    cell, other = CELLS["arms rwr"], FileLock(tmp_path / LOCK)
    study = Study(tmp_path, workers=0)
    with other, pytest.raises(UserError, match="another run is writing there"):
        study.run([(cell, SEEDS[:1])])
    assert study.missing(cell, SEEDS[:1]) == [SEEDS[0]]
    with RunFolder.held(tmp_path):
        study.run([(cell, SEEDS[:1])])
    assert not RunFolder.is_busy(tmp_path) and study.missing(cell, SEEDS[:1]) == []


def test_cells_have_names_of_their_own() -> None:
    """What decides the result is in the key, and nothing that differs between processes."""
    keys = [c.key for c in CELLS.values()]
    assert len(set(keys)) == len(keys)
    base = CELLS["arms dpo"]
    others = [
        replace(base, learning_rate=2e-2), replace(base, updates=8),
        replace(base, problem=replace(ARMS, reward="near")),
        replace(base, method=rows.dpo(FRESH, 0.2)), replace(base, lr_schedule="linear"),
    ]  # fmt: skip
    assert len({c.key for c in [base, *others]}) == 6
    assert " at 0x" not in repr(base.plain())


def _after_five(method: Method, runs: list[int], rates: Any) -> Tensor:
    """Logits of these of three runs, five updates on."""
    whole = tables.make_world("hypo", table=tables.Table(runs=(3,)))
    world = replace(
        whole, policy=Categorical(whole.policy.logits[runs]),
        reference=Categorical(whole.reference.logits[runs]),
        data=tables.Table(runs=(len(runs),)), prompts=tables.Table(runs=(len(runs),)),
        seed=tuple(5 + r for r in runs),
    )  # fmt: skip
    settings = loop.Settings(max_steps=5, learning_rate=rates, warmup_ratio=0.0)
    state = loop.start(method, world, settings)
    for _ in range(5):
        loop.update(state, settings)
    return state.world.policy.logits.detach()


def test_numbers_of_a_run_are_its_own() -> None:
    """A rate, a beta and a weight for each run give what three studies of one number give."""
    base = tables.row_of("hypo")
    betas, weights, rates = (0.1, 0.3, 0.5), (0.0, 0.01, 0.2), (0.1, 0.02, 0.3)

    def row(beta: Any, weight: Any) -> Method:
        dpo, kl = base.terms
        dpo = replace(dpo, settings={"beta": beta})
        return replace(base, terms=(dpo, replace(kl, weight=weight)))

    each = _after_five(row(betas, weights), [0, 1, 2], rates)
    for i in range(3):
        alone = _after_five(row(betas[i], weights[i] or 1e-300), [i], rates[i])
        torch.testing.assert_close(each[i], alone[0], rtol=1e-9, atol=1e-9)
    followed = replace(base.terms[1], weight=Times(0.05, "beta"))
    terms = (replace(base.terms[0], settings={"beta": betas}), followed)
    assert resolve(replace(base, terms=terms)).terms[1].weight == pytest.approx(
        (0.005, 0.015, 0.025)
    )


def test_a_run_that_is_not_finite_stops_alone() -> None:
    def broken(samples: Any) -> Tensor:
        reward = tables.by_arm(samples)
        reward[1] = torch.nan
        return reward

    row = tables.row_of("rloo")
    table = tables.Table(runs=(3,))
    world = replace(tables.make_world("rloo", table=table, reward=broken), seed=(1, 2, 3))
    state, settings = tables.begin(row, world, 3)
    before = world.policy.logits.detach().clone()
    metrics = loop.update(state, settings)
    assert state.stopped.tolist() == [False, True, False]
    assert math.isnan(metrics["loss"][1]) and math.isfinite(metrics["loss"][0])
    moved = (world.policy.logits.detach() != before).flatten(1).any(-1)
    assert moved.tolist() == [True, False, True]
    world = tables.make_world(
        "rloo", table=tables.Table(runs=(1,)),
        reward=lambda s: tables.by_arm(s) * torch.nan,
    )  # fmt: skip
    state, settings = tables.begin(row, world, 3)
    with pytest.raises(GuardStop):
        loop.update(state, settings)


def test_a_run_whose_pairs_all_tie_makes_no_update() -> None:
    def tied(samples: Any) -> Tensor:
        reward = tables.by_arm(samples)
        reward[0] = 1.0
        return reward

    row = tables.row_of("on_policy_dpo", samples_per_prompt=4)
    world = tables.make_world(
        "on_policy_dpo", table=tables.Table(runs=(2,)), reward=tied,
        batch_size=6,
    )  # fmt: skip
    state, settings = tables.begin(row, world, 4)
    before = world.policy.logits.detach().clone()
    metrics = [loop.update(state, settings) for _ in range(4)][-1]
    assert math.isnan(metrics["loss"][0]) and metrics["pairs"][0] == 0 < metrics["pairs"][1]
    assert torch.equal(world.policy.logits[0], before[0])
    assert not torch.equal(world.policy.logits[1], before[1])


@dataclass(frozen=True)
class _NoWorld(Arms):
    """A problem that cannot be run."""

    def world(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no world")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_fails_loses_no_other(workers: int, tmp_path: Path) -> None:
    good, bad = CELLS["arms dpo"], replace(CELLS["arms dpo"], problem=_NoWorld(rows=8))
    study = Study(tmp_path, workers=workers)
    with pytest.raises(CellsFailed) as raised:
        study.run([(bad, (1,)), (good, (1, 2))])
    assert len(raised.value.exceptions) == 1 and study.failed.keys() == {bad.key}
    assert study.missing(good, (1, 2)) == [] and study.missing(bad, (1,)) == [1]
    kept = json.loads((tmp_path / "failed.jsonl").read_text())
    assert (kept["cell"], kept["seeds"]) == (bad.key, [1])
    if workers == 0:
        assert "RuntimeError: no world" in kept["traceback"]


@dataclass(frozen=True)
class _Killed:
    """What makes the system end a process."""

    key: str = "killed"
    updates: int = 1
    chunk: int = 1
    cost: float = 1.0

    def run(self, seeds: Any) -> list[Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_process_that_the_system_ended_is_one_message() -> None:
    with pytest.raises(UserError, match="ended from outside, mostly for want of memory"):
        Study(None, workers=2).run([(_Killed(), (1,))])
