"""Reverse KL: its numbers, and its expected gradient by exact enumeration of samples."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preftune import objectives as o
from preftune.advantages import leave_one_out
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


def half_square(logp: Tensor, ref: Tensor) -> Tensor:
    """k2 as a loss: the same gradient on-policy, another value."""
    return 0.5 * (logp - ref).square()


def stop_gradient_removed(logp: Tensor, ref: Tensor) -> Tensor:
    """k1 as a loss: its expected gradient is 0."""
    return logp - ref


def product_without_stop_gradient(logp: Tensor, ref: Tensor) -> Tensor:
    return logp * (logp - ref)


def own_sample_in_baseline(logp: Tensor, ref: Tensor) -> Tensor:
    """Shrinks the expected gradient by (k - 1)/k."""
    log_ratio = logp - ref
    return o.reverse_kl(logp, ref, baseline=log_ratio.mean(-1, keepdim=True).expand_as(log_ratio))


def low_variance_estimator_as_loss(logp: Tensor, ref: Tensor) -> Tensor:
    """k3 as a loss: the gradient of another divergence."""
    return torch.expm1(ref - logp) - (ref - logp)


@pytest.mark.parametrize(
    ("loss", "k"),
    [
        (no_baseline, 1),
        (no_baseline, 2),
        (other_samples_as_baseline, 2),
        (other_samples_as_baseline, 3),
        (half_square, 1),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_expected_gradient_is_exact(loss: Loss, k: int) -> None:
    assert is_exact(loss, k)


@pytest.mark.parametrize(
    ("loss", "k"),
    [
        (stop_gradient_removed, 1),
        (stop_gradient_removed, 2),
        (product_without_stop_gradient, 1),
        (own_sample_in_baseline, 2),
        (own_sample_in_baseline, 3),
        (low_variance_estimator_as_loss, 1),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_broken_variants_are_seen(loss: Loss, k: int) -> None:
    """The check above would catch each of these faults."""
    assert not is_exact(loss, k)


def test_what_the_broken_variants_do() -> None:
    """Without stop-gradient nothing is left; a mean that includes the sample keeps (k - 1)/k."""
    _, gradient = exact()
    none_left = expected_over_tuples(stop_gradient_removed, 1)[1]
    torch.testing.assert_close(none_left, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    for k in (2, 3):
        shrunk = expected_over_tuples(own_sample_in_baseline, k)[1]
        torch.testing.assert_close(shrunk, gradient * (k - 1) / k, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_expected_value_is_the_kl(k: int) -> None:
    loss = no_baseline if k == 1 else other_samples_as_baseline
    torch.testing.assert_close(expected_over_tuples(loss, k)[0], exact()[0], rtol=0, atol=1e-12)


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
