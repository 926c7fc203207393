"""Numbers and identities of SimPO, ORPO and CPO."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preftune import objectives as o


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


# Log-probs -6 over 3 tokens (mean -2) and -2 over 4 tokens (mean -0.5).
PAIR = (f64(-6.0), f64(-2.0))
LENGTHS = (torch.tensor([3]), torch.tensor([4]))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_simpo_by_hand() -> None:
    """Beta 2, gamma 0.5: margin 2·(-2 + 0.5) - 0.5 = -3.5, loss ln(1 + e^3.5) = 3.529750."""
    loss = o.simpo(*PAIR, *LENGTHS, beta=2.0, gamma=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(3.5)), abs=1e-12)


def test_simpo_gradient_by_hand() -> None:
    """d/d logp = ∓beta/length·σ(3.5): 2/3 and 2/4 times 0.970688."""
    chosen, rejected = (x.clone().requires_grad_() for x in PAIR)
    o.simpo(chosen, rejected, *LENGTHS, beta=2.0, gamma=0.5).backward()
    sigma = 1 / (1 + math.exp(-3.5))
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-2 / 3 * sigma, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(2 / 4 * sigma, abs=1e-12)


def test_simpo_at_length_one_is_bradley_terry_with_a_margin() -> None:
    one = torch.ones(1)
    simpo = o.simpo(*PAIR, one, one, beta=0.3, gamma=0.7)
    torch.testing.assert_close(simpo, o.bradley_terry(*(0.3 * x for x in PAIR), margin=0.7))


def test_orpo_by_hand() -> None:
    """p_w = e^-2, p_l = e^-0.5: odds 0.156518 and 1.541494, log odds ratio -2.287339; loss
    2 + 0.1·ln(1 + e^2.287339) = 2.238404."""
    p_w, p_l = math.exp(-2), math.exp(-0.5)
    ratio = math.log(p_w / (1 - p_w)) - math.log(p_l / (1 - p_l))
    loss = o.orpo(*PAIR, *LENGTHS, odds_weight=0.1)
    assert loss.item() == pytest.approx(2 - 0.1 * log_sigmoid(ratio), abs=1e-12)
    assert loss.item() == pytest.approx(2.2384045, abs=1e-7)


def test_orpo_without_odds_is_the_mean_nll() -> None:
    loss = o.orpo(*PAIR, *LENGTHS, odds_weight=0.0)
    assert loss.item() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("mean", [-1e-5, -0.1, -0.69, -0.7, -5.0, -300.0])
def test_orpo_odds_are_exact(mean: float) -> None:
    """Against the rejected response at p = 1/2 (odds 1) the loss is ln p + ln(1 + 1/odds), both of
    which `math` has exactly: -mean + ln(1 + (1 - p)/p) = -2·mean."""
    half = f64(-math.log(2))
    one = torch.ones(1)
    loss = o.orpo(f64(mean), half, one, one, odds_weight=1.0)
    assert loss.item() == pytest.approx(-2 * mean, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-6, -0.69, -1000.0])
def test_orpo_stays_finite(mean: float, dtype: torch.dtype) -> None:
    """From certainty, where odds are infinite, to a probability that underflows; either side."""
    logp = torch.tensor([mean, -1.0], dtype=dtype).requires_grad_()
    length = torch.ones(2)
    loss = o.orpo(logp, logp.flip(0), length.to(dtype), length.to(dtype), odds_weight=1.0)
    loss.sum().backward()
    assert logp.grad is not None
    assert loss.isfinite().all() and logp.grad.isfinite().all()


def test_cpo_by_hand() -> None:
    """Beta 0.1, weight 0.5: margin 0.1·(-6 + 2) = -0.4, loss ln(1 + e^0.4) + 0.5·6 = 3.913015."""
    loss = o.cpo(*PAIR, beta=0.1, nll_weight=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.4)) + 3.0, abs=1e-12)


def test_cpo_without_nll_is_dpo_with_equal_references() -> None:
    ref = f64(-4.0)
    torch.testing.assert_close(
        o.cpo(*PAIR, beta=0.3, nll_weight=0.0), o.dpo(*PAIR, ref, ref, beta=0.3)
    )


def test_cpo_nll_adds_to_the_chosen_gradient_alone() -> None:
    """Weight 0.5 adds -0.5 to the chosen log-prob's gradient and 0 to the rejected one's."""
    grads = []
    for weight in (0.0, 0.5):
        leaves = [x.clone().requires_grad_() for x in PAIR]
        grads.append(torch.autograd.grad(o.cpo(*leaves, beta=0.3, nll_weight=weight).sum(), leaves))
    assert (grads[1][0] - grads[0][0]).item() == pytest.approx(-0.5, abs=1e-12)
    assert (grads[1][1] - grads[0][1]).item() == 0.0


def simpo(chosen: Tensor, rejected: Tensor, len_chosen: Tensor, len_rejected: Tensor) -> Tensor:
    return o.simpo(chosen, rejected, len_chosen, len_rejected, beta=2.0, gamma=0.5)


def orpo(chosen: Tensor, rejected: Tensor, len_chosen: Tensor, len_rejected: Tensor) -> Tensor:
    return o.orpo(chosen, rejected, len_chosen, len_rejected, odds_weight=0.4)


@pytest.mark.parametrize("loss", [simpo, orpo])
def test_length_does_not_matter_at_equal_means(loss: Callable[..., Tensor]) -> None:
    """Three times the tokens at the same log-prob a token: the same loss. The same sum over three
    times the tokens: another."""
    (chosen, rejected), (len_chosen, len_rejected) = PAIR, LENGTHS
    base = loss(chosen, rejected, len_chosen, len_rejected)
    longer_chosen = loss(3 * chosen, rejected, 3 * len_chosen, len_rejected)
    longer_rejected = loss(chosen, 3 * rejected, len_chosen, 3 * len_rejected)
    torch.testing.assert_close(longer_chosen, base, rtol=1e-12, atol=0)
    torch.testing.assert_close(longer_rejected, base, rtol=1e-12, atol=0)
    for lengths in ((3 * len_chosen, len_rejected), (len_chosen, 3 * len_rejected)):
        assert (loss(chosen, rejected, *lengths) - base).abs().item() > 0.01


@pytest.mark.parametrize("loss", [simpo, orpo])
def test_an_empty_response_is_finite(loss: Callable[..., Tensor]) -> None:
    """No token, log-prob 0: it counts as one token, where 0/0 would be NaN."""
    empty = torch.zeros(1, requires_grad=True)
    out = loss(empty, torch.tensor([-2.0]), torch.tensor([0]), torch.tensor([4]))
    out.backward()
    assert out.isfinite().all() and empty.grad is not None and empty.grad.isfinite().all()
