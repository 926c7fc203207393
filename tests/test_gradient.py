"""An update that does not fit the memory, and one that fails half-way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune import loop
from preftune.errors import UserError
from preftune.gradient import gradient, out_of_memory
from preftune.policies.categorical import Categorical
from preftune.rounds import World, group_terms
from tables import by_arm, make_world, row_of

CPU = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
ERRORS: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError(CPU),
    MemoryError(),
]


def limited(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """The policy takes so many prompts at once; the numbers it was given."""
    asked: list[int] = []
    outputs = Categorical.outputs

    def few(self: Categorical, samples: Any, names: frozenset[str]) -> dict[str, Tensor]:
        if torch.is_grad_enabled():
            asked.append(len(samples.row))
            if len(samples.row) > most:
                raise error
        return outputs(self, samples, names)

    monkeypatch.setattr(Categorical, "outputs", few)
    return asked


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", ["dpo", "hypo"])
def test_smaller_micro_batches_give_the_same_gradient(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []
    losses: list[float] = []
    measured: list[dict[str, Any]] = []
    for most in (6, 2):
        world = make_world(name, batch_size=6)
        groups = group_terms(row_of(name))
        with monkeypatch.context() as patch:
            asked = limited(patch, most, error)
            result = gradient(groups, world, 0)
        found.append(world.policy.logits.grad)
        losses.append(float(result.loss))
        measured.append(result.measures.result())
        assert (result.micro_batch_tokens is None) == (most == 6)
        assert max(asked[-2:]) <= most and (most == 6 or max(asked) > most)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert measured[0] == pytest.approx(measured[1], abs=1e-12)


def test_what_fitted_is_kept_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world("dpo", batch_size=6)
    settings = loop.Settings(max_steps=3, learning_rate=0.1)
    state = loop.start(row_of("dpo"), world, settings)
    asked = limited(monkeypatch, 3, MemoryError())
    for _ in range(3):
        loop.update(state, settings)
    assert asked == [6, 3, 3, 3, 3, 3, 3]
    assert "out of memory" in caplog.text and caplog.text.count("micro-batches of") == 1


def test_one_prompt_that_does_not_fit_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 0, MemoryError())
    with pytest.raises(UserError, match="one prompt.*max_length"):
        gradient(group_terms(row_of("dpo")), make_world("dpo", batch_size=4), 0)


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not out_of_memory(RuntimeError("shapes do not match"))
    asked = limited(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        gradient(group_terms(row_of("dpo")), make_world("dpo", batch_size=4), 0)
    assert len(asked) == 1


class Gone(Exception):
    """The reward's server."""


@pytest.mark.parametrize("name", ["ppo", "on_policy_dpo", "rwr", "grpo"])
def test_a_reward_that_fails_leaves_the_run_where_it_was(name: str) -> None:
    """The update is made later, as if nothing had been: the same draws, the same numbers."""

    def world(reward: Callable[..., Tensor]) -> World:
        return replace(make_world(name, batch_size=4), reward=reward)

    calls = 0

    def sometimes(samples: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise Gone
        return by_arm(samples)

    settings = loop.Settings(max_steps=6, learning_rate=0.1)
    states = [loop.start(row_of(name), world(r), settings) for r in (by_arm, sometimes)]
    failed = 0
    for _ in range(6):
        loop.update(states[0], settings)
    while states[1].step < 6:
        try:
            loop.update(states[1], settings)
        except Gone:
            failed += 1
    assert failed == 2
    assert torch.equal(states[0].world.policy.logits, states[1].world.policy.logits)
    assert [g.cursor for g in states[0].groups] == [g.cursor for g in states[1].groups]
    assert [g.queries for g in states[0].groups] == [g.queries for g in states[1].groups]
