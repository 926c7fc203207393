"""Patience: a run ends where its reward no longer rises, and stays ended."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tables
from preftune import loop, methods
from preftune.errors import UserError
from preftune.method import configure, resolve
from preftune.method_checks import check
from preftune.rounds import World
from preftune.samples import Samples
from preftune.sampling.decoding import Decoding
from preftune.stopping import WINDOW, Plateau
from tables import Table

pytestmark = pytest.mark.long

S, A = 4, 4
TABLE = Table(rows=tuple((s % A, (s + 1) % A) for s in range(S)))


def through(rewards: list[float | None]) -> Plateau:
    seen = Plateau()
    for reward in rewards:
        seen = seen.after(reward)
    return seen


def test_windows_are_compared_not_updates() -> None:
    rising = [float(i) for i in range(4 * WINDOW)]
    assert through(rising).since == 0 and through(rising).best == pytest.approx(
        sum(rising[-WINDOW:]) / WINDOW
    )
    flat = [1.0] * (4 * WINDOW)
    assert through(flat).since == 3
    assert through(flat[:-1]).since == 2 and through(flat[:-1]).count == WINDOW - 1
    noisy = [x + (10.0 if i % 2 else -10.0) for i, x in enumerate(rising)]
    assert through(noisy).since == 0


def test_updates_without_a_reward_do_not_count() -> None:
    assert through([None] * 100) == Plateau()
    assert through([1.0, None] * WINDOW).best == 1.0


def test_patience_is_reached() -> None:
    seen = through([1.0] * (4 * WINDOW))
    assert seen.reached(3) and not seen.reached(4) and not seen.reached(None)


def world(reward: float) -> World:
    """A table of states and arms, of which the last arm is worth `reward`."""

    def judged(samples: Samples) -> Tensor:
        return torch.where(samples.tokens[..., 0] == A - 1, reward, 0.0).double()

    made = tables.make_world("rloo", table=TABLE, shape=(S, A), batch_size=32, at_reference=True)
    return replace(made, reward=judged)


def run(reward: float, patience: int | None, steps: int = 300) -> tuple[loop.State, list[dict]]:
    method = resolve(configure(methods.get("rloo"), {"patience": patience}))
    settings = loop.Settings(max_steps=steps, learning_rate=0.05, log_every=1000)
    state = loop.start(method, world(reward), settings)
    rows: list[dict] = []
    loop.advance(state, settings, loop.Hooks(log=lambda step, m: rows.append({"step": step, **m})))
    return state, rows


def test_a_run_ends_where_its_reward_stays() -> None:
    state, rows = run(0.0, 2)
    assert state.step == 3 * WINDOW and rows[-1]["ended"] == "plateau"
    assert rows[-1]["step"] == state.step, "the last step is logged, whatever log_every says"
    state, rows = run(0.0, None, steps=100)
    assert state.step == 100 and "ended" not in rows[-1]


def test_a_reward_that_rises_keeps_it_going() -> None:
    state, _ = run(1.0, 2, steps=4 * WINDOW)
    assert state.step == 4 * WINDOW
    assert state.plateau.best is not None and state.plateau.best > 0.5


def test_an_ended_run_goes_no_further() -> None:
    method = resolve(configure(methods.get("rloo"), {"patience": 2}))
    settings = loop.Settings(max_steps=300, learning_rate=0.05)
    state = loop.start(method, world(0.0), settings)
    state.plateau = Plateau(best=1.0, since=2)
    loop.advance(state, settings, loop.Hooks())
    assert state.step == 0


def test_patience_without_rewards_is_refused() -> None:
    for name in ("dpo", "hypo"):
        with pytest.raises(UserError, match="patience"):
            check(replace(resolve(methods.get(name)), patience=2), Decoding(), 8)
    check(resolve(methods.get("auto")), Decoding(), 8)
