"""The tilted policy is the optimum, and KL is exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.theory import closed_form


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def arms(num: int, bound: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-bound, bound), min_size=num, max_size=num)


# Reference logits, rewards, and a direction away from the optimum, for 2 to 6 arms.
problems = st.integers(2, 6).flatmap(lambda n: st.tuples(arms(n, 5), arms(n, 3), arms(n, 4)))


def objective(logp: Tensor, ref_logp: Tensor, reward: Tensor, beta: float) -> float:
    """E[reward] - beta KL, summed over arms in plain numbers."""
    return sum(
        math.exp(a) * (r - beta * (a - b))
        for a, b, r in zip(logp.tolist(), ref_logp.tolist(), reward.tolist(), strict=True)
    )


def test_tilted_by_hand() -> None:
    """Reference (1/4, 3/4), reward (2 ln 9, 0), beta 2: 9·1/4 against 3/4, so (3/4, 1/4).

    Logits are given unnormalised, as (0 + 7, ln 3 + 7).
    """
    out = closed_form.tilted(f64(7.0, math.log(3) + 7), f64(2 * math.log(9), 0.0), 2.0)
    torch.testing.assert_close(out.exp(), f64(0.75, 0.25), rtol=0, atol=1e-12)


def test_kl_by_hand() -> None:
    """KL((3/4, 1/4) ‖ (1/4, 3/4)) = 3/4 ln 3 - 1/4 ln 3 = ½ ln 3."""
    p = f64(0.75, 0.25).log()
    assert closed_form.kl(p, p.flip(0)).item() == pytest.approx(0.5 * math.log(3), abs=1e-12)


def test_kl_where_a_policy_has_no_mass() -> None:
    """p without mass on an arm adds 0 there: KL((1, 0) ‖ (½, ½)) = ln 2 and KL(p ‖ p) = 0, with a
    finite gradient; q without mass where p has some gives inf."""
    log_p, log_q = f64(0.0, -math.inf).requires_grad_(), f64(0.5, 0.5).log()
    value = closed_form.kl(log_p, log_q)
    value.backward()
    assert log_p.grad is not None and log_p.grad.isfinite().all()
    assert value.item() == pytest.approx(math.log(2), abs=1e-12)
    assert closed_form.kl(log_p, log_p).item() == 0.0
    assert closed_form.kl(log_q, log_p).item() == math.inf


def test_an_uncovered_arm_stays_without_mass() -> None:
    """Reference (½, ½, 0), equal rewards on the first two: the third stays at 0 for any reward."""
    out = closed_form.tilted(f64(0.0, 0.0, -math.inf), f64(1.0, 1.0, 50.0), 0.1)
    torch.testing.assert_close(out.exp(), f64(0.5, 0.5, 0.0), rtol=0, atol=1e-12)


@given(problems, st.floats(0.1, 5))
@settings(max_examples=60, deadline=None)
def test_tilted_is_the_optimum(
    problem: tuple[list[float], list[float], list[float]], beta: float
) -> None:
    """No other policy does better, and one that differs loses exactly beta KL(it ‖ optimum)."""
    logits, reward, direction = (f64(*x) for x in problem)
    ref = logits.log_softmax(-1)
    best = closed_form.tilted(logits, reward, beta)
    other = (best + direction).log_softmax(-1)
    lost = objective(best, ref, reward, beta) - objective(other, ref, reward, beta)
    assert best.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert lost >= -1e-9
    assert lost == pytest.approx(beta * closed_form.kl(other, best).item(), abs=1e-9)


@given(problems, st.floats(0.1, 5))
@settings(max_examples=60, deadline=None)
def test_kl_of_the_optimum_is_bounded_by_the_range_of_rewards(
    problem: tuple[list[float], list[float], list[float]], beta: float
) -> None:
    """KL(optimum ‖ reference) ≤ min(range/beta, range²/(8 beta²))."""
    logits, reward, _ = (f64(*x) for x in problem)
    kl = closed_form.kl(closed_form.tilted(logits, reward, beta), logits.log_softmax(-1)).item()
    spread = (reward.max() - reward.min()).item()
    assert -1e-12 <= kl <= min(spread / beta, spread**2 / (8 * beta**2)) + 1e-12


def test_leading_dims_and_a_beta_a_run() -> None:
    """[2, 3, 4] logits against one reward vector, beta [2, 1, 1]."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward = f64(0.0, 1.0, 2.0, -1.0)
    beta = f64(0.5, 2.0)[:, None, None]
    out = closed_form.tilted(logits, reward, beta)
    for run in range(2):
        for i in range(3):
            alone = closed_form.tilted(logits[run, i], reward, beta[run].item())
            torch.testing.assert_close(out[run, i], alone, rtol=0, atol=1e-12)
    assert closed_form.kl(out, logits.log_softmax(-1)).shape == (2, 3)
