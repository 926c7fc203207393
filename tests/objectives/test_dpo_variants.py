"""Numbers and identities of DPOP, robust DPO, χPO and WPO."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preftune import objectives as o


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


# Log-ratios of the hand-worked pair: chosen -10 - (-12) = 2, rejected -7 - (-6) = -1.
PAIR = (f64(-10.0), f64(-7.0), f64(-12.0), f64(-6.0))
SWAPPED = (PAIR[1], PAIR[0], PAIR[3], PAIR[2])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def many_pairs(scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    logp = torch.randn(4, 20, generator=generator, dtype=torch.float64) * scale - 10
    return tuple(logp)


def gradients(loss: Callable[..., Tensor], pair: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in pair[:2]]
    return torch.autograd.grad(loss(*leaves, *pair[2:]).sum(), leaves)


def test_dpop_by_hand() -> None:
    """Swapped, the chosen log-ratio is -1 and the rejected one 2. Beta 0.1, penalty 5: margin
    0.1·(-1 - 2 - 5·1) = -0.8, loss ln(1 + e^0.8) = 1.171101. Not swapped, the chosen one is above
    the reference and nothing is paid: margin 0.3, loss ln(1 + e^-0.3) = 0.554355."""
    paid = o.dpop(*SWAPPED, beta=0.1, penalty=5.0)
    free = o.dpop(*PAIR, beta=0.1, penalty=5.0)
    assert paid.item() == pytest.approx(softplus(0.8), abs=1e-12)
    assert free.item() == pytest.approx(softplus(-0.3), abs=1e-12)


def test_dpop_gradient_by_hand() -> None:
    """Below the reference the chosen log-prob's gradient is 1 + penalty times the rejected one's:
    -0.1·σ(0.8)·6 against 0.1·σ(0.8)."""
    chosen, rejected = gradients(lambda *x: o.dpop(*x, beta=0.1, penalty=5.0), SWAPPED)
    sigma = 1 / (1 + math.exp(-0.8))
    assert rejected.item() == pytest.approx(0.1 * sigma, abs=1e-12)
    assert chosen.item() == pytest.approx(-0.6 * sigma, abs=1e-12)


def test_dpop_without_penalty_is_dpo() -> None:
    pairs = many_pairs()
    torch.testing.assert_close(o.dpop(*pairs, beta=0.3, penalty=0.0), o.dpo(*pairs, beta=0.3))


def test_dpop_at_the_reference_has_the_gradient_of_dpo() -> None:
    logp = f64(-3.0, -9.0)
    pair = (logp, logp - 1, logp, logp - 1)
    dpop = gradients(lambda *x: o.dpop(*x, beta=0.3, penalty=50.0), pair)
    torch.testing.assert_close(dpop, gradients(lambda *x: o.dpo(*x, beta=0.3), pair))


def test_robust_dpo_by_hand() -> None:
    """Margin 0.3, ε 0.1: (0.9·ln(1 + e^-0.3) - 0.1·ln(1 + e^0.3)) / 0.8 = 0.516855."""
    loss = o.robust_dpo(*PAIR, beta=0.1, label_smoothing=0.1)
    expected = (0.9 * softplus(-0.3) - 0.1 * softplus(0.3)) / 0.8
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert loss.item() == pytest.approx(softplus(-0.3) - 0.3 * 0.1 / 0.8, abs=1e-12)


def test_robust_dpo_without_flips_is_dpo() -> None:
    pairs = many_pairs()
    torch.testing.assert_close(
        o.robust_dpo(*pairs, beta=0.3, label_smoothing=0.0), o.dpo(*pairs, beta=0.3)
    )


def test_robust_dpo_is_unbiased_under_flips() -> None:
    """(1-ε) times the loss plus ε times the loss of the swapped pair is DPO's loss, exactly; the
    same mean of smoothed DPO is not."""
    chosen, rejected, ref_chosen, ref_rejected = pairs = many_pairs()
    swapped = (rejected, chosen, ref_rejected, ref_chosen)
    epsilon = torch.linspace(0, 0.4, 20, dtype=torch.float64)

    def mean_over_flips(loss: Callable[..., Tensor]) -> Tensor:
        as_labelled = loss(*pairs, beta=0.3, label_smoothing=epsilon)
        return (1 - epsilon) * as_labelled + epsilon * loss(
            *swapped, beta=0.3, label_smoothing=epsilon
        )

    clean = o.dpo(*pairs, beta=0.3)
    torch.testing.assert_close(mean_over_flips(o.robust_dpo), clean)
    assert (mean_over_flips(o.dpo) - clean).abs().max() > 0.01


def test_robust_dpo_learns_nothing_of_a_pair_that_is_as_likely_either_way() -> None:
    """ε = 1/2, as of a soft label: 1 / (1 - 2ε) does not exist. Others are as without it."""
    known, half = f64(0.1, 0.6), f64(0.1, 0.5, 0.6)

    def found(smoothing: Tensor) -> Tensor:
        def loss(*x: Tensor) -> Tensor:
            return o.robust_dpo(*x, beta=0.1, label_smoothing=smoothing)

        pairs = tuple(x.expand(len(smoothing)) for x in PAIR)
        return torch.stack([loss(*pairs), *gradients(loss, pairs)])

    assert torch.equal(found(half)[:, [0, 2]], found(known))
    assert found(half)[:, 1].tolist() == [0.0, 0.0, 0.0]


def test_chi_po_by_hand() -> None:
    """φ(e^2) = e^2 + 2 = 9.389056, φ(e^-1) = e^-1 - 1 = -0.632121. Beta 0.1: margin 1.002118,
    loss ln(1 + e^-1.002118) = 0.312693. Clip 0.5: ln(1 + e^-0.5); swapped: ln(1 + e^0.5)."""
    margin = 0.1 * (math.exp(2) + 2 - math.exp(-1) + 1)
    loss = o.chi_po(*PAIR, beta=0.1, clip=4.0)
    assert loss.item() == pytest.approx(softplus(-margin), abs=1e-12)
    clipped = [o.chi_po(*pair, beta=0.1, clip=0.5).item() for pair in (PAIR, SWAPPED)]
    assert clipped == pytest.approx([softplus(-0.5), softplus(0.5)], abs=1e-12)


def test_chi_po_gradient_by_hand() -> None:
    """d margin / d logp = beta·(1 + ρ): -0.1·(1 + e^2)·σ(-1.002118) on the chosen,
    0.1·(1 + e^-1)·σ(-1.002118) on the rejected; none beyond the clip."""
    margin = 0.1 * (math.exp(2) + 2 - math.exp(-1) + 1)
    sigma = 1 / (1 + math.exp(margin))
    chosen, rejected = gradients(lambda *x: o.chi_po(*x, beta=0.1, clip=4.0), PAIR)
    assert chosen.item() == pytest.approx(-0.1 * (1 + math.exp(2)) * sigma, abs=1e-12)
    assert rejected.item() == pytest.approx(0.1 * (1 + math.exp(-1)) * sigma, abs=1e-12)
    beyond = gradients(lambda *x: o.chi_po(*x, beta=0.1, clip=0.5), PAIR)
    assert [x.item() for x in beyond] == [0.0, 0.0]


def test_chi_po_near_the_reference_is_dpo_at_twice_beta() -> None:
    """Log-ratios of about 1e-6: φ' = 2, so the gradients agree to about 1e-6, and at beta they do
    not."""
    logp = f64(-3.0, -9.0)
    pair = (logp + 1e-6, logp - 1, logp, logp - 1 + 1e-6)
    chi = gradients(lambda *x: o.chi_po(*x, beta=0.3, clip=1.0), pair)
    dpo = gradients(lambda *x: o.dpo(*x, beta=0.6), pair)
    torch.testing.assert_close(chi, dpo, rtol=1e-5, atol=0)
    once = gradients(lambda *x: o.dpo(*x, beta=0.3), pair)
    assert not torch.allclose(chi[0], once[0], rtol=0.1)


def test_chi_po_limits_its_exponent_at_20() -> None:
    """Log-ratios 30 and 25, both beyond 20: e^20 cancels and 0.1·5 remains."""
    zero = f64(0.0)
    loss = o.chi_po(f64(30.0), f64(25.0), zero, zero, beta=0.1, clip=4.0)
    assert loss.item() == pytest.approx(softplus(-0.5), abs=1e-6)


def test_wpo_by_hand() -> None:
    """Collisions -13 and -8, lengths 4 and 2: log-weights (-10 + 13)/4 = 0.75 and (-7 + 8)/2 = 0.5;
    loss e^1.25·ln(1 + e^-0.3) = 1.934890; with ε 0.1 also 0.1 of ln(1 + e^0.3)."""
    data = (f64(-13.0), f64(-8.0), torch.tensor([4]), torch.tensor([2]))
    loss = o.wpo(*PAIR, *data, beta=0.1)
    assert loss.item() == pytest.approx(math.exp(1.25) * softplus(-0.3), abs=1e-12)
    smoothed = o.wpo(*PAIR, *data, beta=0.1, label_smoothing=0.1)
    expected = math.exp(1.25) * (0.9 * softplus(-0.3) + 0.1 * softplus(0.3))
    assert smoothed.item() == pytest.approx(expected, abs=1e-12)


def test_wpo_weights_are_data() -> None:
    """The gradient is the weight times DPO's: nothing flows through the weight."""
    pairs = many_pairs()
    generator = torch.Generator().manual_seed(6)
    collision = torch.randn(2, 20, generator=generator, dtype=torch.float64) - 10
    length = torch.randint(1, 9, (2, 20), generator=generator)
    weight = (((torch.stack(pairs[:2]) - collision) / length).sum(0)).exp()
    wpo = gradients(lambda *x: o.wpo(*x, *collision, *length, beta=0.3), pairs)
    dpo = gradients(lambda *x: o.dpo(*x, beta=0.3), pairs)
    torch.testing.assert_close(wpo, tuple(weight * g for g in dpo))


def test_wpo_on_a_uniform_policy_is_dpo() -> None:
    """Uniform over V tokens, log π and log Σ π² are both -log V a token: weight 1."""
    length = torch.tensor([3, 5])
    logp = tuple(-math.log(7) * n.double()[None] for n in length)
    ref = (f64(-5.0), f64(-9.0))
    wpo = o.wpo(*logp, *ref, *logp, *length[:, None], beta=0.3)
    torch.testing.assert_close(wpo, o.dpo(*logp, *ref, beta=0.3))


def chi_po(chosen: Tensor, rejected: Tensor, ref: Tensor) -> Tensor:
    return o.chi_po(chosen, rejected, ref, ref, beta=0.5, clip=4.0)


def wpo(chosen: Tensor, rejected: Tensor, ref: Tensor) -> Tensor:
    one = torch.ones_like(ref)
    return o.wpo(chosen, rejected, ref, ref, ref, ref, one, one, beta=0.5)


def dpop(chosen: Tensor, rejected: Tensor, ref: Tensor) -> Tensor:
    return o.dpop(chosen, rejected, ref, ref, beta=0.5, penalty=50.0)


def robust(chosen: Tensor, rejected: Tensor, ref: Tensor) -> Tensor:
    return o.robust_dpo(chosen, rejected, ref, ref, beta=0.5, label_smoothing=0.1)


@pytest.mark.parametrize("loss", [chi_po, wpo, dpop, robust])
@pytest.mark.parametrize("chosen", [-1000.0, 0.0, 1000.0])
@pytest.mark.parametrize("rejected", [-1000.0, 0.0, 1000.0])
def test_far_from_the_reference_all_is_finite(
    loss: Callable[..., Tensor], chosen: float, rejected: float
) -> None:
    """Log-ratios of ±1000 in float32 (for WPO also a log-weight of ±1000): loss and gradient."""
    leaves = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    out = loss(*leaves, torch.zeros(1))
    out.backward()
    assert out.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
