"""Divergence of the policy from the reference, as a loss on the policy's own samples."""

from jaxtyping import Float
from torch import Tensor


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
