"""One-step laws of a tabular softmax against autograd, and the exact conditions they give."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.theory import dynamics
from preftune.theory.closed_form import kl
from preftune.theory.dynamics import Order

BATCH = 250
many = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
sizes = st.integers(3, 9)


def policies(seed: int, arms: int, count: int) -> list[Tensor]:
    """Log-probs [BATCH, arms], from nearly uniform to nearly deterministic."""
    gen = torch.Generator().manual_seed(seed)
    scale = 4 * torch.rand(BATCH, 1, generator=gen, dtype=torch.float64)
    return [
        (scale * torch.randn(BATCH, arms, generator=gen, dtype=torch.float64)).log_softmax(-1)
        for _ in range(count)
    ]


def arm(index: int) -> Tensor:
    return torch.full((BATCH,), index)


@given(seeds, sizes, st.floats(0.01, 2))
@many
def test_steps_are_the_gradients(seed: int, arms: int, lr: float) -> None:
    """Minus lr times autograd of KL(q ‖ p) and KL(p ‖ q) by the logits."""
    p, q = policies(seed, arms, 2)
    for step, loss in (
        (dynamics.forward_kl_step, lambda lp: kl(q, lp)),
        (dynamics.reverse_kl_step, lambda lp: kl(lp, q)),
    ):
        logits = p.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits.log_softmax(-1)).sum(), logits)
        torch.testing.assert_close(step(p, q, lr), -lr * grad, rtol=0, atol=1e-12)


@given(seeds, sizes, st.floats(0.01, 2))
@many
def test_log_ratio_changes(seed: int, arms: int, lr: float) -> None:
    """The changes as the equations state them, and as the updated softmax shows them."""
    p, q = policies(seed, arms, 2)
    divergence = kl(p, q)
    (p1, p2), (q1, q2) = p.exp()[:, :2].unbind(-1), q.exp()[:, :2].unbind(-1)
    reverse = p1 * ((q1 / p1).log() + divergence) - p2 * ((q2 / p2).log() + divergence)
    for step, stated in (
        (dynamics.forward_kl_step(p, q, lr), (q1 - p1) - (q2 - p2)),
        (dynamics.reverse_kl_step(p, q, lr), reverse),
    ):
        out = dynamics.log_ratio_change(step, arm(0), arm(1))
        torch.testing.assert_close(out, lr * stated, rtol=0, atol=1e-12)
        moved = (p + step).log_softmax(-1)
        shown = (moved[:, 0] - moved[:, 1]) - (p[:, 0] - p[:, 1])
        torch.testing.assert_close(out, shown, rtol=0, atol=1e-12)


def both_changes(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    steps = dynamics.forward_kl_step(p, q, 1.0), dynamics.reverse_kl_step(p, q, 1.0)
    forward, reverse = (dynamics.log_ratio_change(s, arm(0), arm(1)) for s in steps)
    return forward, reverse


def test_means_by_hand() -> None:
    """L(e, 1) = e − 1 and I(2, 1) = 4 / e; equal arguments are their own mean."""
    one = torch.ones((), dtype=torch.float64)
    assert dynamics.logarithmic_mean(math.e * one, one).item() == pytest.approx(math.e - 1)
    assert dynamics.identric_mean(one, 2 * one).item() == pytest.approx(4 / math.e)
    assert dynamics.logarithmic_mean(one / 3, one / 3).item() == pytest.approx(1 / 3)
    assert dynamics.identric_mean(one / 3, one / 3).item() == pytest.approx(1 / 3)


@given(seeds, sizes)
@many
def test_equal_policy_mass(seed: int, arms: int) -> None:
    """Case 1: reverse widens the ratio more exactly where p exceeds the logarithmic mean."""
    p, q = policies(seed, arms, 2)
    p[:, 1] = p[:, 0]
    p = p.log_softmax(-1)
    q = torch.cat([q[:, :2].sort(-1, descending=True).values, q[:, 2:]], -1)
    forward, reverse = both_changes(p, q)
    mean = dynamics.logarithmic_mean(q[:, 0].exp(), q[:, 1].exp())
    p1 = p[:, 0].exp()
    clear = (p1 - mean).abs() > 1e-9
    assert torch.equal((reverse > forward)[clear], (p1 > mean)[clear])
    assert (mean <= q[:, 0].exp() + 1e-15).all() and (mean >= q[:, 1].exp() - 1e-15).all()
    assert (p1 > mean).any() and (p1 < mean).any()


@given(seeds, sizes)
@many
def test_equal_target_mass(seed: int, arms: int) -> None:
    """Cases 2 and 3: the order is read off exactly, and the simple conditions suffice for it."""
    p, q = policies(seed, arms, 2)
    p = torch.cat([p[:, :2].sort(-1, descending=True).values, p[:, 2:]], -1)
    q[:, 1] = q[:, 0]
    q = q.log_softmax(-1)
    forward, reverse = both_changes(p, q)
    divergence = kl(p, q)
    p1, p2, q1 = p[:, 0].exp(), p[:, 1].exp(), q[:, 0].exp()
    order = dynamics.equal_target_order(p1, p2, q1, divergence)
    clear = (reverse.abs() > 1e-10) & ((reverse - forward).abs() > 1e-10)
    seen = torch.full_like(order, int(Order.BETWEEN))
    seen[reverse > 0] = int(Order.ABOVE)
    seen[reverse < forward] = int(Order.BELOW)
    assert torch.equal(order[clear], seen[clear])
    assert set(order.tolist()) == {0, 1, 2}
    assert (forward <= 0).all()
    assert (order[p1 < q1 * (divergence - 1).exp()] == Order.ABOVE).all()
    assert (order[q1 > math.e * p1] == Order.ABOVE).all()
    assert (order[q1 < (-divergence).exp() * p2] == Order.BELOW).all()


def test_the_simple_condition_of_case_2_is_not_necessary() -> None:
    """p = (.2, .02, .78), q = (.3, .3, .4): K = .3859, so q e^(K−1) = .1623 < p1 = .2, and yet
    Δ^r = .1583 − .0619 > 0, for I(p1, p2) = .0950 lies below .1623."""
    p = torch.tensor([[0.2, 0.02, 0.78]], dtype=torch.float64).log().expand(BATCH, 3)
    q = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log().expand(BATCH, 3)
    _, reverse = both_changes(p, q)
    edge = q[0, 0].exp() * (kl(p, q)[0] - 1).exp()
    assert edge.item() == pytest.approx(0.1623, abs=1e-4)
    mean = dynamics.identric_mean(p[0, 0].exp(), p[0, 1].exp())
    assert mean.item() == pytest.approx(0.0950, abs=1e-4)
    assert reverse[0].item() == pytest.approx(0.1583 - 0.0619, abs=2e-4)


def test_the_simple_condition_of_case_3_is_not_necessary() -> None:
    """p = (.4, .01, .59), q = (.05, .05, .9): K = .5668, so e^(−K) p2 = .0057 < q, and yet
    Δ^r < Δ^f = −.39, for I(p1, p2) = .1617 lies above q e^K = .0881."""
    p = torch.tensor([[0.4, 0.01, 0.59]], dtype=torch.float64).log().expand(BATCH, 3)
    q = torch.tensor([[0.05, 0.05, 0.9]], dtype=torch.float64).log().expand(BATCH, 3)
    forward, reverse = both_changes(p, q)
    assert q[0, 0].exp() > (-kl(p, q)[0]).exp() * p[0, 1].exp()
    assert forward[0].item() == pytest.approx(-0.39)
    assert reverse[0] < forward[0]


@given(seeds, sizes, st.floats(1e-3, 5))
@many
def test_a_dpo_pair(seed: int, arms: int, push: float) -> None:
    """The exact law is the updated softmax; its slope at 0 is the first-order law; the chosen
    log-prob never falls and the rejected never rises; others rise iff π(y⁻) > e^g π(y⁺)."""
    (p,) = policies(seed, arms, 1)
    y, n = arm(0), arm(1)
    out = dynamics.dpo_change(p, y, n, push)
    moved = p.clone()
    moved[:, 0] += push
    moved[:, 1] -= push
    torch.testing.assert_close(out, moved.log_softmax(-1) - p, rtol=0, atol=1e-10)
    assert (out[:, 0] >= -1e-15).all() and (out[:, 1] <= 1e-15).all()
    gap = p[:, 0] + push - p[:, 1]
    clear = gap.abs() > 1e-9
    assert torch.equal((out[:, 2] > 0)[clear], (gap < 0)[clear])
    first, tiny = dynamics.dpo_first_order(p, y, n, 1.0), 1e-6
    torch.testing.assert_close(dynamics.dpo_change(p, y, n, tiny) / tiny, first, rtol=0, atol=1e-5)
    law = -(p[:, 0].exp() - p[:, 1].exp())
    torch.testing.assert_close(first[:, 2:], law[:, None].expand(-1, arms - 2), rtol=0, atol=1e-14)


def test_first_order_is_dpos_gradient() -> None:
    """g = β σ(−β Δh) of the DPO loss, by autograd: policy (.2, .5, .3), uniform reference, β .5."""
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log().requires_grad_()
    loss = -torch.nn.functional.logsigmoid(0.5 * (logits[0] - logits[1]))
    (grad,) = torch.autograd.grad(loss, logits)
    push = 0.5 / (1 + math.exp(0.5 * math.log(0.2 / 0.5)))
    out = dynamics.dpo_first_order(logits.detach(), torch.tensor(0), torch.tensor(1), push)
    centred = -grad - (-grad * logits.detach().exp()).sum()
    torch.testing.assert_close(out, centred, rtol=0, atol=1e-12)
    assert out[2].item() == pytest.approx(push * 0.3)  # rejected is likelier: the third arm rises


@given(seeds, sizes)
@many
def test_pairs_from_a_flat_start_never_feed_the_rest(seed: int, arms: int) -> None:
    """Any pushes inside a set that starts flat leave the mass outside at or below its start."""
    gen = torch.Generator().manual_seed(seed)
    total = torch.randn(BATCH, arms, generator=gen, dtype=torch.float64).cumsum(-1)
    inside = total - total.mean(-1, keepdim=True)  # the pushes of each pair sum to zero
    logits = torch.cat([inside, torch.zeros(BATCH, arms, dtype=torch.float64)], -1)
    assert (logits.softmax(-1)[:, arms:].sum(-1) <= 0.5 + 1e-15).all()
