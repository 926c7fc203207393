"""Objectives of single responses that are labelled good or bad."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def kto(
    logp: Float[Tensor, "*E"],
    ref_logp: Float[Tensor, "*E"],
    label: Shaped[Tensor, "*E"],
    kl: float | Tensor,
    *,
    beta: float | Tensor,
    weight_good: float | Tensor,
    weight_bad: float | Tensor,
) -> Float[Tensor, "*E"]:
    """Kahneman-Tversky optimization: gains and losses against a reference point.

    good  L = λ_good [1 − σ(β (h − z))]
    bad   L = λ_bad [1 − σ(β (z − h))],  h = log [π(y|x) / π_ref(y|x)]

    Paper: Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 as TRL counts. The
    paper's loss is the mean of λ − v(x, y), as here.

    Args:
        logp: [*E], nats, summed over response tokens.
        ref_logp: [*E], nats, likewise, under the reference; data: receives no gradient.
        label: [*E], 1 or true where the response is good, 0 or false where it is bad; data:
            receives no gradient.
        kl: z, [*E] or a number, nats, the KL from the reference that the labeller estimated on
            mismatched prompts and responses, already clamped at 0; data: receives no gradient.
        beta: β, 1/nats, > 0, how soon value saturates.
        weight_good: λ_good, unit of the loss, > 0. The paper keeps λ_good n_good / (λ_bad n_bad)
            between 1 and 4/3.
        weight_bad: λ_bad, likewise.

    Returns:
        [*E], unit of the weights.

    Valid on responses labelled one by one, from any source, in unequal numbers too; the gradient
    vanishes on either side far from the reference point, so a response far off is left alone.
    """
    kl = kl.detach() if isinstance(kl, Tensor) else kl
    value = beta * (logp - ref_logp.detach() - kl)
    good = weight_good * torch.sigmoid(-value)  # 1 − σ(v) without cancellation
    bad = weight_bad * torch.sigmoid(value)
    return torch.where(label.detach() > 0.5, good, bad)
