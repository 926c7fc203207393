"""Numbers and identities of DPO and its divergences, IPO and Bradley-Terry."""

import math

import pytest
import torch
from torch import Tensor

from preftune import objectives as o


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


# Log-ratios of the hand-worked pair: chosen -10 - (-12) = 2, rejected -7 - (-6) = -1.
PAIR = (f64(-10.0), f64(-7.0), f64(-12.0), f64(-6.0))


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("reverse_kl", 0.5543552444685271),
        ("forward_kl", 0.5723162894492977),
        ("js", 0.6355887005576846),
        ("alpha", 0.5732434456754528),
    ],
)
def test_dpo_by_hand(divergence: str, expected: float) -> None:
    """Log-ratios 2 and -1, beta 0.1, loss ln(1 + exp(-0.1·d)) with d = f'(e^2) - f'(e^-1).

    reverse_kl: d = 2 + 1 = 3, loss ln(1 + e^-0.3) = 0.554355
    forward_kl: d = -e^-2 + e^1 = -0.135335 + 2.718282 = 2.582947, loss 0.572316
    js: d = ln σ(2) - ln σ(-1) = -0.126928 + 1.313262 = 1.186334, loss 0.635589
    alpha 0.5: f'(u) = 2 - 2 u^-0.5, d = -2 e^-1 + 2 e^0.5 = -0.735759 + 3.297443 = 2.561684,
    loss 0.573243
    """
    loss = o.dpo(*PAIR, beta=0.1, divergence=divergence, alpha=0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_dpo_label_smoothing_by_hand() -> None:
    """Margin 0.3, ε 0.1: 0.9·ln(1 + e^-0.3) + 0.1·ln(1 + e^0.3) = 0.9·0.554355 + 0.1·0.854355."""
    loss = o.dpo(*PAIR, beta=0.1, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.5843552444685271, abs=1e-12)


def test_dpo_gradient_by_hand() -> None:
    """Margin 0.3, beta 0.1: ∓0.1·σ(-0.3) = ∓0.1·0.425557 on chosen and rejected."""
    chosen, rejected = PAIR[0].clone().requires_grad_(), PAIR[1].clone().requires_grad_()
    o.dpo(chosen, rejected, *PAIR[2:], beta=0.1).backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.04255574831883411, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(0.04255574831883411, abs=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_at_the_reference_is_ln_2(divergence: str, label_smoothing: float) -> None:
    logp = f64(-3.0, -40.0, -0.1)
    loss = o.dpo(
        logp,
        logp - 2,
        logp,
        logp - 2,
        beta=0.7,
        label_smoothing=label_smoothing,
        divergence=divergence,
        alpha=0.3,
    )
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-15)


def test_alpha_ends_are_the_named_divergences() -> None:
    """α = 1 is the limit log u; α = 0 gives f'(u) = 1 - 1/u, the forward KL. Also inside a tensor
    that mixes the limit with other values, where the gradient must stay finite."""
    chosen = PAIR[0].clone().requires_grad_()
    args = (chosen, *PAIR[1:])
    alphas = f64(1.0, 1 + 1e-4, 0.0)
    losses = o.dpo(*(x.expand(3) for x in args), beta=0.1, divergence="alpha", alpha=alphas)
    expected = [
        o.dpo(*args, beta=0.1, divergence=name) for name in ("reverse_kl", "reverse_kl")
    ] + [o.dpo(*args, beta=0.1, divergence="forward_kl")]
    assert losses[0].item() == expected[0].item()
    assert losses[1].item() == pytest.approx(expected[1].item(), abs=1e-4)
    assert losses[2].item() == pytest.approx(expected[2].item(), abs=1e-12)
    losses.sum().backward()
    assert chosen.grad is not None and chosen.grad.isfinite()


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_exponents_do_not_overflow(divergence: str) -> None:
    """Log-ratios of -500 on both sides, where exp(500) is infinite: finite loss and gradient."""
    chosen, rejected = (torch.tensor([-500.0], requires_grad=True) for _ in range(2))
    zero = torch.zeros(1)
    loss = o.dpo(chosen, rejected, zero, zero, beta=0.1, divergence=divergence, alpha=0.0)
    loss.backward()
    assert loss.isfinite().all()
    assert chosen.grad is not None and chosen.grad.isfinite().all()


def test_dpo_is_exact_at_large_margins() -> None:
    """Margin 40: loss ln(1 + e^-40) = e^-40 to all digits; margin -1000: loss 1000, not inf."""
    loss = o.dpo(f64(40.0, -1000.0), f64(0.0, 0.0), f64(0.0, 0.0), f64(0.0, 0.0), beta=1.0)
    assert loss[0].item() == pytest.approx(math.exp(-40), rel=1e-12, abs=0)
    assert loss[1].item() == 1000.0


def test_unknown_divergence_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="'kl'.*reverse_kl, forward_kl, js, alpha"):
        o.dpo(*PAIR, beta=0.1, divergence="kl")


def test_alpha_is_required_by_its_divergence() -> None:
    with pytest.raises(ValueError, match="needs `alpha`"):
        o.dpo(*PAIR, beta=0.1, divergence="alpha")


def test_tabular_dpo_moves_unseen_arms_by_the_sign_law() -> None:
    """On softmax logits one pair's gradient is ∓g on its two arms and 0 elsewhere, so an unseen
    arm moves by d log π = -g (π_chosen - π_rejected): up only if the policy still ranks the
    rejected arm first."""
    for logits, rises in (([0.0, 1.0, 0.5], True), ([1.0, 0.0, 0.5], False)):
        z = f64(*logits).requires_grad_()
        logp = z.log_softmax(-1)
        ref = torch.zeros((), dtype=torch.float64)
        o.dpo(logp[0], logp[1], ref, ref, beta=1.0).backward()
        assert z.grad is not None
        g = torch.sigmoid(logp[1] - logp[0]).item()
        torch.testing.assert_close(-z.grad, f64(g, -g, 0.0), rtol=0, atol=1e-12)
        p = logp.detach().exp()
        step = -z.grad
        change = (step[2] - (p * step).sum()).item()
        assert change == pytest.approx(-g * (p[0] - p[1]).item(), abs=1e-12)
        assert (change > 0) is rises


def test_ipo_by_hand() -> None:
    """Gap 2 + 1 = 3, tau 0.25: target 1/(2·0.25) = 2, loss (3 - 2)² = 1."""
    assert o.ipo(*PAIR, tau=0.25).item() == pytest.approx(1.0, abs=1e-12)


def test_ipo_minimum_is_at_half_over_tau() -> None:
    """tau 0.1: the minimum is 0, at gap 5, with zero gradient; 0.1 to either side it is 0.01."""
    gap = f64(4.9, 5.0, 5.1).requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    loss = o.ipo(gap, zero, zero, zero, tau=0.1)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), f64(0.01, 0.0, 0.01), rtol=0, atol=1e-12)
    assert gap.grad is not None
    torch.testing.assert_close(gap.grad, f64(-0.2, 0.0, 0.2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_ipo_optimum_of_uncertain_labels(p: float) -> None:
    """A pair labelled one way with probability p and the other way otherwise: the best gap is
    (2p - 1)/(2·tau), found by gradient descent on the exact mean; p = 0.7, tau 0.2: 0.4/0.4 = 1."""
    gap = f64(0.3).requires_grad_()
    zero = f64(0.0)
    for _ in range(100):
        loss = p * o.ipo(gap, zero, zero, zero, tau=0.2) + (1 - p) * o.ipo(
            zero, gap, zero, zero, tau=0.2
        )
        (gradient,) = torch.autograd.grad(loss, [gap])
        gap = (gap - 0.2 * gradient).detach().requires_grad_()
    assert gap.item() == pytest.approx((2 * p - 1) / 0.4, abs=1e-9)


def test_swapping_a_pair_negates_its_gap() -> None:
    """Gap 3 becomes -3: DPO at beta 0.1 ln(1 + e^0.3), IPO at tau 0.25 (-3 - 2)² = 25."""
    chosen, rejected, ref_chosen, ref_rejected = PAIR
    swapped = (rejected, chosen, ref_rejected, ref_chosen)
    assert o.dpo(*swapped, beta=0.1).item() == pytest.approx(math.log1p(math.exp(0.3)), abs=1e-12)
    assert o.ipo(*swapped, tau=0.25).item() == pytest.approx(25.0, abs=1e-12)


def test_smoothing_is_the_mean_over_swapped_labels() -> None:
    """ε 0.2: 0.8 times the loss of the pair plus 0.2 times that of the swapped pair."""
    chosen, rejected, ref_chosen, ref_rejected = PAIR
    swapped = (rejected, chosen, ref_rejected, ref_chosen)
    mean = 0.8 * o.dpo(*PAIR, beta=0.1) + 0.2 * o.dpo(*swapped, beta=0.1)
    torch.testing.assert_close(o.dpo(*PAIR, beta=0.1, label_smoothing=0.2), mean)


def test_bradley_terry_smoothing_by_hand() -> None:
    """Scores 2 and 1, margin 0.5, ε 0.1: 0.9·ln(1 + e^-0.5) + 0.1·ln(1 + e^0.5) = 0.524077."""
    loss = o.bradley_terry(f64(2.0), f64(1.0), margin=0.5, label_smoothing=0.1)
    expected = 0.9 * math.log1p(math.exp(-0.5)) + 0.1 * math.log1p(math.exp(0.5))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_bradley_terry_smoothing_has_its_minimum_at_the_log_odds() -> None:
    """ε 0.1, margin 0.5: no gradient at a lead of 0.5 + ln 9; signs to either side."""
    lead = (0.5 + math.log(9) + f64(-0.1, 0.0, 0.1)).requires_grad_()
    loss = o.bradley_terry(lead, torch.zeros_like(lead), margin=0.5, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), [lead])
    assert gradient[0] < -1e-3 and abs(gradient[1]) < 1e-12 and gradient[2] > 1e-3


def test_bradley_terry_by_hand() -> None:
    """Scores 2 and 1: ln(1 + e^-1) = 0.313262; margin 0.5: ln(1 + e^-0.5) = 0.474077; swapped,
    with margin 0: ln(1 + e^1) = 1.313262."""
    high, low = f64(2.0), f64(1.0)
    assert o.bradley_terry(high, low).item() == pytest.approx(0.31326168751822286, abs=1e-12)
    assert o.bradley_terry(high, low, margin=0.5).item() == pytest.approx(
        0.4740769841801067, abs=1e-12
    )
    assert o.bradley_terry(low, high).item() == pytest.approx(1.3132616875182228, abs=1e-12)


def test_bradley_terry_of_log_ratios_is_dpo() -> None:
    chosen, rejected, ref_chosen, ref_rejected = PAIR
    reward = (0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected))
    torch.testing.assert_close(o.bradley_terry(*reward), o.dpo(*PAIR, beta=0.1))
