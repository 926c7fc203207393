"""Reverse KL: its numbers, and its expected gradient by exact enumeration of samples."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preftune import objectives as o
from preftune.advantages import leave_one_out
from preftune.objectives.divergence import kl_estimate
from preftune.theory import closed_form

NUM_ARMS = 5
Loss = Callable[[Tensor, Tensor], Tensor]


def test_reverse_kl_by_hand() -> None:
    """log π -1, log π_ref -3, baseline 0.5: value 2, d/d logp = 2 - 0.5 = 1.5; without a baseline
    the value is the same and d/d logp = 2."""
    for baseline, gradient in ((torch.tensor([0.5]), 1.5), (0.5, 1.5), (0.0, 2.0)):
        logp = torch.tensor([-1.0], requires_grad=True)
        loss = o.reverse_kl(logp, torch.tensor([-3.0]), baseline=baseline)
        loss.backward()
        assert logp.grad is not None
        assert loss.item() == 2.0
        assert logp.grad.item() == gradient


def test_value_keeps_full_precision() -> None:
    """The part that carries the gradient adds exactly 0 to the value."""
    logp, ref = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(o.reverse_kl(logp.requires_grad_(), ref, baseline=3.0), logp - ref)


def policy_and_reference() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits, ref = torch.randn(2, NUM_ARMS, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(-1)


def expected_over_tuples(loss: Loss, k: int) -> tuple[Tensor, Tensor]:
    """Mean of the loss over all k-tuples of samples, and its gradient by the policy's logits."""
    logits, ref = policy_and_reference()
    logp = logits.log_softmax(-1)
    tuples = torch.tensor(list(itertools.product(range(NUM_ARMS), repeat=k)))
    probability = logp.detach()[tuples].sum(-1).exp()
    value = (probability * loss(logp[tuples], ref[tuples]).mean(-1)).sum()
    return value.detach(), torch.autograd.grad(value, [logits])[0]


def exact() -> tuple[Tensor, Tensor]:
    """KL and its gradient, by autograd through the sum over arms."""
    logits, ref = policy_and_reference()
    value = closed_form.kl(logits.log_softmax(-1), ref)
    return value.detach(), torch.autograd.grad(value, [logits])[0]


def is_exact(loss: Loss, k: int) -> bool:
    return bool((expected_over_tuples(loss, k)[1] - exact()[1]).abs().max() < 1e-10)


def no_baseline(logp: Tensor, ref: Tensor) -> Tensor:
    return o.reverse_kl(logp, ref)


def other_samples_as_baseline(logp: Tensor, ref: Tensor) -> Tensor:
    return o.reverse_kl(logp, ref, baseline=leave_one_out(logp - ref))


def k2(logp: Tensor, ref: Tensor) -> Tensor:
    """The same gradient on-policy, another value."""
    return o.kl_loss(logp, ref, estimator="k2")


def k1(logp: Tensor, ref: Tensor) -> Tensor:
    """The log-ratio without stop-gradient: its expected gradient is 0."""
    return o.kl_loss(logp, ref, estimator="k1")


def product_without_stop_gradient(logp: Tensor, ref: Tensor) -> Tensor:
    return logp * (logp - ref)


def own_sample_in_baseline(logp: Tensor, ref: Tensor) -> Tensor:
    """Shrinks the expected gradient by (k - 1)/k."""
    log_ratio = logp - ref
    return o.reverse_kl(logp, ref, baseline=log_ratio.mean(-1, keepdim=True).expand_as(log_ratio))


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """The gradient of another divergence."""
    return o.kl_loss(logp, ref, estimator="k3")


@pytest.mark.parametrize(
    ("loss", "k"),
    [
        (no_baseline, 1),
        (no_baseline, 2),
        (other_samples_as_baseline, 2),
        (other_samples_as_baseline, 3),
        (k2, 1),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_expected_gradient_is_exact(loss: Loss, k: int) -> None:
    assert is_exact(loss, k)


@pytest.mark.parametrize(
    ("loss", "k"),
    [
        (k1, 1),
        (k1, 2),
        (product_without_stop_gradient, 1),
        (own_sample_in_baseline, 2),
        (own_sample_in_baseline, 3),
        (k3, 1),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_broken_variants_are_seen(loss: Loss, k: int) -> None:
    """The check above would catch each of these faults."""
    assert not is_exact(loss, k)


def test_what_the_broken_variants_do() -> None:
    """Without stop-gradient nothing is left; a mean that includes the sample keeps (k - 1)/k."""
    _, gradient = exact()
    none_left = expected_over_tuples(k1, 1)[1]
    torch.testing.assert_close(none_left, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    for k in (2, 3):
        shrunk = expected_over_tuples(own_sample_in_baseline, k)[1]
        torch.testing.assert_close(shrunk, gradient * (k - 1) / k, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_expected_value_is_the_kl(k: int) -> None:
    loss = no_baseline if k == 1 else other_samples_as_baseline
    torch.testing.assert_close(expected_over_tuples(loss, k)[0], exact()[0], rtol=0, atol=1e-12)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl() -> None:
    """In the mean ∇k3 is ∇KL(π_ref ‖ π), not ∇KL(π ‖ π_ref)."""
    logits, ref = policy_and_reference()
    (forward,) = torch.autograd.grad(closed_form.kl(ref, logits.log_softmax(-1)), [logits])
    torch.testing.assert_close(expected_over_tuples(k3, 1)[1], forward, rtol=0, atol=1e-12)


def test_k1_and_k3_have_the_kl_for_their_mean() -> None:
    """k2 has not: it is off by the third order of the log-ratio."""
    for loss, is_kl in ((k1, True), (k2, False), (k3, True)):
        off = (expected_over_tuples(loss, 1)[0] - exact()[0]).abs().item()
        assert (off < 1e-12) is is_kl, loss.__name__
        assert is_kl or off > 1e-3


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [("k1", 2.0, 1.0), ("k2", 2.0, 2.0), ("k3", math.exp(-2) + 1, 1 - math.exp(-2))],
)
def test_kl_loss_by_hand(estimator: str, value: float, gradient: float) -> None:
    """Log-ratio -1 + 3 = 2: k1 2 with slope 1; k2 2²/2 with slope 2; k3 e^-2 - 1 + 2 with slope
    1 - e^-2."""
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    loss = o.kl_loss(logp, torch.tensor([-3.0], dtype=torch.float64), estimator=estimator)
    loss.backward()
    assert logp.grad is not None
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert logp.grad.item() == pytest.approx(gradient, abs=1e-12)
    log_ratio = torch.tensor([2.0], dtype=torch.float64)
    assert kl_estimate(log_ratio, estimator).item() == pytest.approx(value, abs=1e-12)


def test_kl_loss_is_k2_by_default() -> None:
    logp, ref = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(o.kl_loss(logp, ref), o.kl_loss(logp, ref, estimator="k2"))


def test_k2_and_k3_are_never_negative_and_zero_at_the_reference() -> None:
    log_ratio = torch.arange(-50, 51, dtype=torch.float64) / 10
    for estimator in ("k2", "k3"):
        values = kl_estimate(log_ratio, estimator)
        assert (values >= 0).all() and values[50] == 0 and (values[:50] > 0).all()


def test_k3_keeps_its_digits_near_the_reference() -> None:
    """Log-ratio 1e-4 in float32: ½·1e-8, which e^-x - 1 + x would lose to cancellation."""
    value = kl_estimate(torch.tensor([1e-4]), "k3").item()
    assert value == pytest.approx(5e-9, rel=0.01)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_far_from_the_reference_all_is_finite(estimator: str) -> None:
    """Log-ratios of ±1000 in float32, where exp(1000) is infinite."""
    logp = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    loss = o.kl_loss(logp, torch.zeros(2), estimator=estimator)
    loss.sum().backward()
    assert logp.grad is not None
    assert loss.isfinite().all() and logp.grad.isfinite().all()


def test_unknown_estimator_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3"):
        o.kl_loss(torch.zeros(1), torch.zeros(1), estimator="k4")
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3"):
        kl_estimate(torch.zeros(1), "k4")


def test_descent_direction_on_logits() -> None:
    """-∂KL/∂z_i = p_i (log(q_i / p_i) + KL), the reverse-KL dynamics of a softmax."""
    logits, ref = policy_and_reference()
    logp = logits.detach().log_softmax(-1)
    direction = logp.exp() * (ref - logp + exact()[0])
    torch.testing.assert_close(
        -expected_over_tuples(no_baseline, 1)[1], direction, rtol=0, atol=1e-12
    )


def test_small_weight_limit_of_hypo() -> None:
    """With a vanishing weight, reverse KL only decides what DPO leaves open: the mass m on arms
    without data. On covered arms the policy is m̃ = (0.8, 0.2), their reference (0.45, 0.45); the
    uncovered arm has reference p0 = 0.1. The least KL is at odds m/(1 - m) = p0·e^K with
    K = 0.8 ln(0.8/0.45) + 0.2 ln(0.2/0.45) = 0.298107: odds 0.134731. There, the expected gradient
    by the logit of m vanishes."""
    ref = torch.tensor([0.45, 0.45, 0.1], dtype=torch.float64).log()
    covered = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
    odds = torch.tensor(0.1347306, dtype=torch.float64)
    logit = odds.log().requires_grad_()
    logp = torch.cat([covered, logit[None]]).log_softmax(-1)
    loss = (logp.detach().exp() * o.reverse_kl(logp, ref)).sum()
    (gradient,) = torch.autograd.grad(loss, [logit])
    assert abs(gradient.item()) < 1e-6
