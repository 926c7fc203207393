"""AdamW with a run axis against torch's own, and bit for bit against itself in other company."""

from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.optimizer import Single, Stacked, make

RUNS, STEPS, LARGEST = 6, 12, 5.0
SHAPES = ((RUNS, 1, 100), (RUNS, 32, 48), (RUNS, 7))
"""A remainder of 4, none, and less than a fused update takes at once."""


def _draws(dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]], Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(3)
    start = [torch.randn(s, generator=draw, dtype=dtype) for s in SHAPES]
    grads = [
        [(1 + i % 3) * torch.randn(s, generator=draw, dtype=dtype) for s in SHAPES]
        for i in range(STEPS)
    ]
    rates = torch.tensor([1e-2, 1e-2, 1e-3, 1e-3, 1e-2, 5e-2], dtype=torch.float64)
    active = [torch.rand(RUNS, generator=draw) > 0.25 for _ in range(STEPS)]
    return start, grads, rates, active


def _run(dtype: torch.dtype, runs: list[int], decay: float = 0.1) -> tuple[list[Tensor], Tensor]:
    """Weights and norms of these runs, advanced together."""
    start, grads, rates, active = _draws(dtype)
    weights = [p[runs].clone().requires_grad_() for p in start]
    optimizer = make(weights, (len(runs),), decay)
    norms = []
    for g, on in zip(grads, active, strict=True):
        optimizer.zero_grad()
        for p, x in zip(weights, g, strict=True):
            p.grad = x[runs].clone()
        norms.append(optimizer.clip(LARGEST))
        optimizer.step(rates[runs], on[runs])
    return [p.detach() for p in weights], torch.stack(norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("runs", [[0], [4], [5, 2, 0], [3, 5, 0, 1, 4, 2]])
def test_a_run_is_the_same_in_any_company(dtype: torch.dtype, runs: list[int]) -> None:
    """Its rate, its norm, its clipping, its count of steps and its skipped updates are its own."""
    every, norms = _run(dtype, list(range(RUNS)))
    some, own = _run(dtype, runs)
    for a, b in zip(some, every, strict=True):
        assert torch.equal(a, b[runs])
    assert torch.equal(own, norms[:, runs])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_run_is_torchs_adamw(decay: float) -> None:
    start, grads, rates, active = _draws(torch.float64)
    found, norms = _run(torch.float64, list(range(RUNS)), decay)
    for r in range(RUNS):
        weights = [p[r].clone().requires_grad_() for p in start]
        plain = torch.optim.AdamW(weights, lr=float(rates[r]), weight_decay=decay)
        for i, (g, on) in enumerate(zip(grads, active, strict=True)):
            for p, x in zip(weights, g, strict=True):
                p.grad = x[r].clone()
            norm = torch.nn.utils.clip_grad_norm_(weights, LARGEST)
            assert float(norm) == pytest.approx(float(norms[i, r]))
            if on[r]:
                plain.step()
        for p, all_runs in zip(weights, found, strict=True):
            torch.testing.assert_close(p.detach(), all_runs[r], rtol=1e-12, atol=1e-12)


def test_an_inactive_run_stays() -> None:
    weights = [torch.ones(2, 32, requires_grad=True), torch.ones(2, 5, requires_grad=True)]
    optimizer = make(weights, (2,), 0.0)
    for p in weights:
        p.grad = torch.full_like(p, torch.nan)
        p.grad[1] = 1.0
    optimizer.clip(torch.inf)
    optimizer.step(0.1, torch.tensor([False, True]))
    for p in weights:
        assert bool((p[0] == 1).all()) and torch.allclose(p[1].detach(), torch.tensor(0.9))


def test_its_state_comes_back() -> None:
    """Half the steps, saved and loaded, then the rest: as if never stopped."""
    start, grads, rates, active = _draws(torch.float32)

    def go(optimizer: Any, weights: list[Tensor], steps: range) -> None:
        for i in steps:
            for p, x in zip(weights, grads[i], strict=True):
                p.grad = x.clone()
            optimizer.step(rates, active[i])

    straight = [p.clone().requires_grad_() for p in start]
    whole = Stacked(straight, RUNS, 0.0)
    go(whole, straight, range(STEPS))
    weights = [p.clone().requires_grad_() for p in start]
    first = Stacked(weights, RUNS, 0.0)
    go(first, weights, range(5))
    saved = {
        i: {k: v.clone() for k, v in s.items()} for i, s in first.state_dict()["state"].items()
    }
    second = Stacked(weights, RUNS, 0.0)
    second.load_state_dict({"state": saved})
    go(second, weights, range(5, STEPS))
    for a, b in zip(straight, weights, strict=True):
        assert torch.equal(a, b)


def test_one_model_keeps_torchs_own() -> None:
    p = torch.ones(4, requires_grad=True)
    optimizer = make([p], (), 0.0)
    assert isinstance(optimizer, Single)
    p.grad = torch.ones(4)
    optimizer.step(0.1, torch.tensor(False))
    assert bool((p == 1).all())
    optimizer.step(0.1, torch.tensor(True))
    assert torch.allclose(p.detach(), torch.tensor(0.9))
