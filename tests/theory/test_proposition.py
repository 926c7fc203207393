"""Constructions of the coverage theory, with their numbers, and HyPO's tie-break."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.theory import coverage, proposition
from preftune.theory.closed_form import kl

pytestmark = pytest.mark.long

BATCH = 200
many = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def test_unseen_arm_by_hand() -> None:
    """ε = .01, β = .1: 1 − 1/e = .632 of the mass on the arm never seen, KL infinite; with a
    reference mass of 1e−6 there that arm alone adds .632 log(.632e6) = 8.443 nats."""
    data, reward = f64(0.5, 0.5).log(), f64(0.3, 0.0)
    out = proposition.unseen_arm(data, reward, 0.01, 0.1)
    assert out.log_p[2].exp().item() == pytest.approx(1 - math.exp(-1))
    assert kl(out.log_p, out.log_ref).item() == math.inf
    assert (out.log_p.exp().sum() - 1).abs() < 1e-12
    soft = proposition.unseen_arm(data, reward, 0.01, 0.1, 1e-6)
    term = soft.log_p[2].exp() * (soft.log_p[2] - soft.log_ref[2])
    assert term.item() == pytest.approx(8.443, abs=1e-3)
    assert (soft.log_ref.exp().sum() - 1).abs() < 1e-12


@given(st.integers(0, 2**31), st.floats(1e-6, 1), st.floats(0.05, 3), st.floats(1e-9, 0.5))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_unseen_arm(seed: int, eps: float, beta: float, unseen: float) -> None:
    """Its error in distribution is ε and that of differences 0, its mass is as stated, and so is
    the whole KL."""
    gen = torch.Generator().manual_seed(seed)
    data = torch.randn(2, generator=gen, dtype=torch.float64).log_softmax(-1)
    reward = 2 * torch.randn(2, generator=gen, dtype=torch.float64)
    out = proposition.unseen_arm(data, reward, eps, beta, unseen)
    seen = out.log_p[:2]
    error = proposition.in_distribution_error(seen, data, out.reward, beta)
    assert error.item() == pytest.approx(eps, rel=1e-6)
    assert coverage.pair_error(data, reward, beta * (seen - data)).item() < 1e-20
    mass = 1 - math.exp(-math.sqrt(eps) / beta)
    assert out.log_p[2].exp().item() == pytest.approx(mass, abs=1e-12)
    for dist in (out.log_p, out.log_ref, out.log_data):
        assert dist.exp().sum().item() == pytest.approx(1, abs=1e-12)
    tilt = kl(data + out.reward / beta, data).item()
    whole = mass * math.log(mass / unseen) + (1 - mass) * (
        math.log((1 - mass) / (1 - unseen)) + tilt
    )
    assert kl(out.log_p, out.log_ref).item() == pytest.approx(whole, rel=1e-9, abs=1e-9)


def split(seen: Tensor, ref: Tensor, m: Tensor) -> Tensor:
    """Mass 1 − m as `seen`, and m on the last two arms in the reference's proportion."""
    rest = ref[:, -2:].log_softmax(-1)
    return torch.cat([seen + torch.log1p(-m)[:, None], rest + m.log()[:, None]], -1)


def test_hypo_odds_by_hand() -> None:
    """Reference (¼, ¼, ½), π̃ = (¾, ¼): K = ¾ ln 3, so odds ½ · 3^¾ = 1.13975."""
    out = proposition.hypo_limit_odds(f64(0.75, 0.25).log(), f64(0.25, 0.25).log())
    assert out.item() == pytest.approx(1.13975, abs=1e-5)


@given(seeds, st.integers(1, 6))
@many
def test_hypo_odds_minimise_the_penalty(seed: int, arms: int) -> None:
    """The KL is stationary there, has the value stated, and is larger at every other split."""
    gen = torch.Generator().manual_seed(seed)
    ref = 2 * torch.randn(BATCH, arms + 2, generator=gen, dtype=torch.float64)
    ref = ref.log_softmax(-1)
    seen = torch.randn(BATCH, arms, generator=gen, dtype=torch.float64).log_softmax(-1)
    odds = proposition.hypo_limit_odds(seen, ref[:, :arms])
    p0, inner = ref[:, arms:].exp().sum(-1), ref[:, :arms].log_softmax(-1)
    renormalised = p0 / (1 - p0) * kl(seen, inner).exp()
    torch.testing.assert_close(odds, renormalised, rtol=1e-9, atol=0)
    logit = odds.log().requires_grad_()
    best = kl(split(seen, ref, logit.sigmoid()), ref)
    (grad,) = torch.autograd.grad(best.sum(), logit)
    assert grad.abs().max() < 1e-10
    value = -(p0 + (-kl(seen, ref[:, :arms])).exp()).log()
    torch.testing.assert_close(best.detach(), value, rtol=1e-9, atol=1e-10)
    for _ in range(5):
        step = torch.randn(BATCH, generator=gen, dtype=torch.float64)
        other = kl(split(seen, ref, (odds.log() + step).sigmoid()), ref)
        assert (other >= best - 1e-12).all()


def test_hypo_reaches_the_limit() -> None:
    """Soft labels ¾ on one pair, β = ½, reference (¼, ¼, ½): DPO alone ends elsewhere, at
    odds set by its start; with λ = 1e−5 the minimiser comes to p₀ e^K with π̃ = (.9, .1)."""
    ref = f64(0.25, 0.25, 0.5).log()

    def solve(penalty: float) -> Tensor:
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [logits], 1.0, 400, 800, 1e-14, 1e-18, 50, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            p = logits.log_softmax(-1)
            h = 0.5 * ((p - ref)[0] - (p - ref)[1])
            loss = -0.75 * torch.nn.functional.logsigmoid(h)
            loss = loss - 0.25 * torch.nn.functional.logsigmoid(-h) + penalty * kl(p, ref)
            loss.backward()
            return loss

        solver.step(closure)
        return logits.detach().softmax(-1)

    limit = proposition.hypo_limit_odds(f64(0.9, 0.1).log(), ref[:2]).item()
    out = solve(1e-5)
    assert (out[2] / (1 - out[2])).item() == pytest.approx(limit, rel=1e-3)
    assert (out[0] / out[1]).item() == pytest.approx(9, rel=1e-3)
    free = solve(0.0)
    assert (free[0] / free[1]).item() == pytest.approx(9, rel=1e-3)
    assert abs((free[2] / (1 - free[2])).item() - limit) > 0.3


def test_misspecified_by_hand() -> None:
    """Only (1, 3) comparisons, β = 1: θ = 1, E[r] = (e + 2/e)/(e + 1/e + 1) = .8453 < 1."""
    example = proposition.auxdpo_example(0.0, 1.0, 0.0)
    theta = proposition.dpo_population_optimum(example, 1.0)
    assert theta.item() == pytest.approx(1, abs=1e-9)
    assert proposition.expected_reward(example, theta).item() == pytest.approx(0.8453, abs=1e-4)
    assert proposition.expected_reward(example, 0 * theta).item() == pytest.approx(1)
    uniform = torch.zeros(3, dtype=torch.float64).log_softmax(-1)
    assert coverage.global_coverage(uniform).item() == pytest.approx(3)


weights = st.floats(0.01, 1)


@given(weights, st.floats(0.01, 10), weights, st.floats(0.1, 3))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_when_dpo_prefers_the_worse_arm(w12: float, w13: float, w23: float, beta: float) -> None:
    """θ > 0 and E[r] < 1 exactly under the stated condition; the slope is autograd of the loss."""
    example = proposition.auxdpo_example(w12, w13, w23)
    theta = proposition.dpo_population_optimum(example, beta)
    t1, t2 = 1 / (1 + math.exp(-1)) - 0.5, 1 / (1 + math.exp(-2)) - 0.5
    excess = w13 * t1 - 2 * w12 * t1 - w23 * t2
    if abs(excess) > 1e-9:
        assert (theta.item() > 0) == (excess > 0)
        assert (proposition.expected_reward(example, theta).item() < 1) == (excess > 0)
    assert abs(proposition.dpo_population_slope(example, theta, beta).item()) < 1e-9
    assert abs(theta.item()) <= 2 / beta + 1e-9
    at = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    h = [2 * beta * at, beta * at, -beta * at]
    loss = torch.zeros((), dtype=torch.float64)
    for w, margin, gap in zip(example.weight, h, (-1.0, 1.0, 2.0), strict=True):
        truth = 1 / (1 + math.exp(-gap))
        win, lose = (torch.nn.functional.logsigmoid(s * margin) for s in (1, -1))
        loss = loss - w * (truth * win + (1 - truth) * lose)
    (grad,) = torch.autograd.grad(loss, at)
    slope = proposition.dpo_population_slope(example, at.detach(), beta)
    torch.testing.assert_close(slope, grad, rtol=0, atol=1e-12)
