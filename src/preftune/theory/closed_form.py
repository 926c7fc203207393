"""Closed forms for categorical policies: the optimum under a KL penalty, and KL itself."""

import torch
from jaxtyping import Float
from torch import Tensor


def tilted(
    ref_logits: Float[Tensor, "... A"], reward: Float[Tensor, "... A"], beta: float | Tensor
) -> Float[Tensor, "... A"]:
    """Log-probs of the policy that maximises reward under a KL penalty.

    π* = argmax_π E_π[r] − β KL(π ‖ π_ref) = π_ref · exp(r / β) / Z

    Paper: Rafailov et al. 2023, arXiv 2305.18290, eq. 4 and appendix A.1.

    Args:
        ref_logits: [..., A], nats, of the reference, normalised or not; −inf where it has no mass.
        reward: [..., A], of every arm.
        beta: β, reward units a nat, > 0; a tensor broadcasts against [..., A].

    Returns:
        [..., A], nats, normalised over the last dim.
    """
    return torch.log_softmax(torch.log_softmax(ref_logits, -1) + reward / beta, -1)


def kl(log_p: Float[Tensor, "... A"], log_q: Float[Tensor, "... A"]) -> Float[Tensor, "..."]:
    """Exact divergence of q from p, over the last dim.

    KL(p ‖ q) = Σ_a p_a (log p_a − log q_a)

    Args:
        log_p: [..., A], nats, normalised; −inf allowed.
        log_q: [..., A], nats, normalised; −inf allowed.

    Returns:
        [...], nats, ≥ 0; inf where p has mass and q has none.
    """
    # An arm without mass in p adds nothing, whatever q is; (−inf) − (−inf) would be NaN.
    has_mass = log_p > -torch.inf
    log_p, log_q = log_p.where(has_mass, 0.0), log_q.where(has_mass, 0.0)
    return (log_p.exp() * (log_p - log_q)).where(has_mass, 0.0).sum(-1)
