"""Divergence of the policy from the reference on the policy's own samples: losses, estimates."""

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.objectives._limits import MAX_EXPONENT


def reverse_kl(
    logp: Float[Tensor, "*E"],
    ref_logp: Float[Tensor, "*E"],
    *,
    baseline: float | Tensor = 0.0,
) -> Float[Tensor, "*E"]:
    """Reverse KL by the score function: the online, unlabelled term of HyPO.

    value     log π(y|x) − log π_ref(y|x)
    gradient  (log π(y|x) − log π_ref(y|x) − b) · ∇ log π(y|x)

    In the mean over samples of the policy these are the value and the gradient of
    KL(π ‖ π_ref): ∇KL = E[(ℓ + 1) ∇log π] with ℓ the log-ratio, and E[∇log π] = 0. The log-ratio
    as a plain loss has that zero for its gradient, which is why value and gradient are written
    apart here.

    Paper: Song et al. 2024, arXiv 2406.01462, algorithm 1.

    Args:
        logp: [*E], nats, summed over response tokens.
        ref_logp: [*E], nats, likewise, under the reference; data: receives no gradient.
        baseline: [*E] or a number, nats; data: receives no gradient. Must not depend on the sample
            itself (`leave_one_out` of the prompt's log-ratios does not); one that does biases the
            gradient.

    Returns:
        [*E], nats.

    Valid only on whole responses drawn from the policy as it is now, at temperature 1 without
    truncation, and used once; the reference is the one that the KL is measured from. At token
    level the gradient would leave out what a token does to later ones.
    """
    log_ratio = (logp - ref_logp).detach()
    baseline = baseline.detach() if isinstance(baseline, Tensor) else baseline
    # The second factor is 0 in value and carries the gradient of logp.
    return log_ratio + (log_ratio - baseline) * (logp - logp.detach())


def kl_estimate(log_ratio: Float[Tensor, "*E"], estimator: str) -> Float[Tensor, "*E"]:
    """Estimate of KL(π ‖ π_ref) from one sample y of π each, by ℓ = log [π(y|x) / π_ref(y|x)].

    k1  ℓ               no bias
    k2  ½ ℓ²            biased, little so near the reference; never negative
    k3  e^−ℓ − 1 + ℓ    no bias where π covers π_ref; never negative

    At language-model KLs k3's error is many times k1's: e^−ℓ has its mean from samples that are
    hardly ever drawn.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    Args:
        log_ratio: [*E], nats, of tokens or of responses.
        estimator: k1, k2 or k3. k3 limits its exponent to 80, where float32 would overflow.

    Returns:
        [*E], nats (k2: nats squared).

    Raises:
        ValueError: unknown `estimator`.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1((-log_ratio).clamp(max=MAX_EXPONENT)) + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}; use one of: k1, k2, k3")


def kl_loss(
    logp: Float[Tensor, "*E"],
    ref_logp: Float[Tensor, "*E"],
    *,
    estimator: str = "k2",
) -> Float[Tensor, "*E"]:
    """An estimate of the KL from the reference, taken as a plain loss.

    k1  L = ℓ               gradient zero in the mean over samples: no KL term at all
    k2  L = ½ ℓ²            the gradient of `reverse_kl`: ∇KL(π ‖ π_ref) in the mean
    k3  L = e^−ℓ − 1 + ℓ    in the mean the gradient of KL(π_ref ‖ π) instead, GRPO's choice

    with ℓ = log π − log π_ref. An estimate of the KL does not have its gradient: the samples too
    move with the policy, and that part is missing.

    Papers: k3 in GRPO: Shao et al. 2024, arXiv 2402.03300, eq. 4; the comparison as losses: arXiv
    2510.01555.

    Args:
        logp: [*E], nats, summed over response tokens (or one token each).
        ref_logp: [*E], nats, likewise, under the reference; data: receives no gradient.
        estimator: k1, k2 or k3, as in `kl_estimate`.

    Returns:
        [*E], nats (k2: nats squared). As a figure of the KL, only k1's and k3's mean is one.

    Raises:
        ValueError: unknown `estimator`.

    Valid only on samples drawn from the policy as it is now, at temperature 1 without truncation.
    On whole responses k2 is exact; at token level it leaves out what a token does to later ones.
    """
    return kl_estimate(logp - ref_logp.detach(), estimator)
