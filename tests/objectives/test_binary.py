"""Numbers and identities of KTO."""

import math

import pytest
import torch
from torch import Tensor

from preftune import objectives as o

SETTINGS = {"beta": 0.2, "weight_good": 1.5, "weight_bad": 0.5}


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Log-ratios -4 - (-7) = 3 and -5 - (-3) = -2, of a good and of a bad response.
LOGP, REF = f64(-4.0, -5.0), f64(-7.0, -3.0)


@pytest.mark.parametrize("label", [f64(1.0, 0.0), torch.tensor([True, False])], ids=str)
@pytest.mark.parametrize("kl", [1.0, torch.tensor(1.0), f64(1.0, 1.0)], ids=str)
def test_kto_by_hand(label: Tensor, kl: float | Tensor) -> None:
    """KL 1, beta 0.2: good 1.5·(1 - σ(0.2·(3 - 1))) = 1.5·0.401312 = 0.601969; bad
    0.5·(1 - σ(0.2·(1 + 2))) = 0.5·0.354344 = 0.177172."""
    loss = o.kto(LOGP, REF, label, kl, **SETTINGS)
    expected = [1.5 * (1 - sigmoid(0.4)), 0.5 * (1 - sigmoid(0.6))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_kto_gradient_by_hand() -> None:
    """∓weight·beta·σ(v)·σ(-v): good -0.3·σ(0.4)·σ(-0.4), bad 0.1·σ(0.6)·σ(-0.6)."""
    logp = LOGP.clone().requires_grad_()
    o.kto(logp, REF, f64(1.0, 0.0), 1.0, **SETTINGS).sum().backward()
    expected = [-0.3 * sigmoid(0.4) * sigmoid(-0.4), 0.1 * sigmoid(0.6) * sigmoid(-0.6)]
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx(expected, abs=1e-12)


def test_at_the_reference_point_half_the_weight_is_lost() -> None:
    loss = o.kto(REF + 1, REF, f64(1.0, 0.0), 1.0, **SETTINGS)
    torch.testing.assert_close(loss, f64(0.75, 0.25))


def test_good_and_bad_mirror_each_other() -> None:
    """At equal weights, a bad response at KL - d loses what a good one at KL + d loses; a response
    that is good and bad at once loses exactly the weight."""
    d = f64(-3.0, 0.5, 7.0)
    zero = torch.zeros_like(d)
    weights = {"beta": 0.2, "weight_good": 1.0, "weight_bad": 1.0}
    good = o.kto(2 + d, zero, torch.ones_like(d), 2.0, **weights)
    bad = o.kto(2 - d, zero, zero, 2.0, **weights)
    torch.testing.assert_close(good, bad)
    same = o.kto(2 + d, zero, zero, 2.0, **weights)
    torch.testing.assert_close(good + same, torch.ones_like(d))


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_far_from_the_reference_all_is_finite(label: float) -> None:
    """Log-ratios of ±1000 in float32: the loss is 0 or the weight, the gradient 0."""
    logp = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    loss = o.kto(logp, torch.zeros(2), torch.full((2,), label), 0.0, **SETTINGS)
    loss.sum().backward()
    assert logp.grad is not None
    assert loss.tolist() == ([1.5, 0.0] if label else [0.0, 0.5])
    assert logp.grad.tolist() == [0.0, 0.0]


def test_small_losses_keep_their_digits() -> None:
    """1 - σ(40) = e^-40 to all digits in float32, where 1 - 1 would be 0."""
    loss = o.kto(
        torch.tensor([40.0]),
        torch.zeros(1),
        torch.ones(1),
        0.0,
        beta=1.0,
        weight_good=1.0,
        weight_bad=1.0,
    )
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-5, abs=0)
