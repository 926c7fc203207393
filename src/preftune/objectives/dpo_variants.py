"""Variants of DPO on the same log-ratios: DPOP, robust DPO, χPO and WPO."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from preftune.objectives._limits import MAX_EXPONENT, clamp
from preftune.objectives.contrastive import dpo

# exp(20) · β is far beyond any useful clip of χPO.
_MAX_CHI_EXPONENT = 20.0


def dpop(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    ref_logp_chosen: Float[Tensor, "*E"],
    ref_logp_rejected: Float[Tensor, "*E"],
    *,
    beta: float | Tensor,
    penalty: float | Tensor,
) -> Float[Tensor, "*E"]:
    """DPO-positive: DPO that pays for lowering the chosen response below the reference.

    L = −log σ(β [h_w − h_l − λ max(0, −h_w)]),  h = log [π(y|x) / π_ref(y|x)]

    Paper: Pal et al. 2024 (Smaug), arXiv 2402.13228, the DPOP loss of section 4.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        ref_logp_chosen: [*E], nats, likewise, under the reference; data: receives no gradient.
        ref_logp_rejected: [*E], nats, likewise; data: receives no gradient.
        beta: strength β of the KL penalty, reward units a nat, > 0.
        penalty: λ, without unit, ≥ 0; the paper's is 50. Exactly at the reference its gradient is
            0.

    Returns:
        [*E], nats.

    Valid where DPO is; meant for pairs that differ in few tokens, whose chosen response plain DPO
    lowers together with the rejected one.
    """
    log_ratio_chosen = logp_chosen - ref_logp_chosen.detach()
    log_ratio_rejected = logp_rejected - ref_logp_rejected.detach()
    gap = log_ratio_chosen - log_ratio_rejected - penalty * F.relu(-log_ratio_chosen)
    return -F.logsigmoid(beta * gap)


def robust_dpo(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    ref_logp_chosen: Float[Tensor, "*E"],
    ref_logp_rejected: Float[Tensor, "*E"],
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor,
) -> Float[Tensor, "*E"]:
    """DPO whose mean over labels flipped with probability ε is the DPO loss of the true labels.

    L = [−(1−ε) log σ(m) + ε log σ(−m)] / (1 − 2ε),  m = β (h_w − h_l)

    which is −log σ(m) − m ε / (1 − 2ε): without a lower bound as m grows.

    Paper: Chowdhury et al. 2024, arXiv 2403.00409, the rDPO loss of section 3; cDPO (`dpo` with
    `label_smoothing`) has the other sign and is biased.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        ref_logp_chosen: [*E], nats, likewise, under the reference; data: receives no gradient.
        ref_logp_rejected: [*E], nats, likewise; data: receives no gradient.
        beta: strength β of the KL penalty, reward units a nat, > 0.
        label_smoothing: ε, probability that a label is flipped, in [0, 0.5); with a tensor, each
            pair has its own, and one of 0.5, whose label says nothing, has loss and gradient 0.

    Returns:
        [*E], nats; negative where the margin is large.

    Valid where DPO is, with labels flipped independently of the pair and a known ε; only the mean
    over many pairs is bounded from below, so it needs more data and fewer epochs than DPO.
    """
    log_ratio_chosen = logp_chosen - ref_logp_chosen.detach()
    log_ratio_rejected = logp_rejected - ref_logp_rejected.detach()
    margin = beta * (log_ratio_chosen - log_ratio_rejected)
    as_labelled = -(1 - label_smoothing) * F.logsigmoid(margin)
    flipped = -label_smoothing * F.logsigmoid(-margin)
    kept = 1 - 2 * label_smoothing
    if not isinstance(kept, Tensor):
        return (as_labelled - flipped) / kept
    # The untaken branch of `where` must be finite too: its gradient would be 0 · NaN.
    nothing = kept == 0
    loss = (as_labelled - flipped) / torch.where(nothing, torch.ones_like(kept), kept)
    return torch.where(nothing, torch.zeros_like(loss), loss)


def chi_po(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    ref_logp_chosen: Float[Tensor, "*E"],
    ref_logp_rejected: Float[Tensor, "*E"],
    *,
    beta: float | Tensor,
    clip: float | Tensor,
) -> Float[Tensor, "*E"]:
    """χ²-preference optimization: DPO under a mixture of χ² and KL divergence.

    L = −log σ(clip(β [φ(ρ_w) − φ(ρ_l)], −c, c)),  φ(z) = z + log z,  ρ = π(y|x) / π_ref(y|x)

    Paper: Huang et al. 2024, arXiv 2407.13399, algorithm 1; c is its 2 R_max. Near the reference
    φ has slope 2: small steps are those of `dpo` with 2β.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        ref_logp_chosen: [*E], nats, likewise, under the reference; data: receives no gradient.
        ref_logp_rejected: [*E], nats, likewise; data: receives no gradient.
        beta: strength β of the penalty, reward units a nat, > 0.
        clip: c, reward units, twice the largest reward, > 0; a pair whose margin is beyond it
            receives no gradient.

    Returns:
        [*E], nats.

    Valid on labelled pairs, made for offline data that cover the responses of a good policy but
    not those of every policy. The log-ratio is limited to 20 nats before exp.
    """

    def link(logp: Tensor, ref_logp: Tensor) -> Tensor:
        log_ratio = logp - ref_logp.detach()
        return log_ratio.clamp(max=_MAX_CHI_EXPONENT).exp() + log_ratio

    score_chosen = link(logp_chosen, ref_logp_chosen)
    score_rejected = link(logp_rejected, ref_logp_rejected)
    return -F.logsigmoid(clamp(beta * (score_chosen - score_rejected), -clip, clip))


def wpo(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    ref_logp_chosen: Float[Tensor, "*E"],
    ref_logp_rejected: Float[Tensor, "*E"],
    collision_chosen: Float[Tensor, "*E"],
    collision_rejected: Float[Tensor, "*E"],
    len_chosen: Num[Tensor, "*E"],
    len_rejected: Num[Tensor, "*E"],
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor = 0.0,
) -> Float[Tensor, "*E"]:
    """Weighted preference optimization: DPO, each pair weighted by how likely the policy writes it.

    L = w(y_w) w(y_l) · L_DPO,  w(y) = exp(1/|y| Σ_t [log π(y_t) − log Σ_v π(v)²])

    The weights are data: the gradient is w(y_w) w(y_l) times that of `dpo`. Σ_v π(v)² is the mean
    probability of a token drawn from the policy, so w is about 1 on the policy's own samples.

    Paper: Zhou et al. 2024, arXiv 2406.11827, eq. 2 with its sampled alignment of weights. As in
    TRL 1.16 the product is not capped at 1 (earlier TRL did that); its log is limited to 80.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        ref_logp_chosen: [*E], nats, likewise, under the reference; data: receives no gradient.
        ref_logp_rejected: [*E], nats, likewise; data: receives no gradient.
        collision_chosen: [*E], nats, Σ_t log Σ_v π(v)² over the same response tokens, under the
            policy; data: receives no gradient.
        collision_rejected: [*E], nats, likewise; data: receives no gradient.
        len_chosen: [*E], response tokens, counted as they were summed; data: receives no gradient.
        len_rejected: [*E], likewise; data: receives no gradient.
        beta: strength β of the KL penalty, reward units a nat, > 0.
        label_smoothing: ε, as in `dpo`.

    Returns:
        [*E], nats.

    Valid on labelled pairs, made for offline ones: pairs far from the policy count little.
    On-policy pairs need no weights.
    """

    def log_weight(logp: Tensor, collision: Tensor, length: Tensor) -> Tensor:
        return (logp - collision).detach() / length.detach().clamp(min=1)

    log_weights = log_weight(logp_chosen, collision_chosen, len_chosen) + log_weight(
        logp_rejected, collision_rejected, len_rejected
    )
    loss = dpo(
        logp_chosen,
        logp_rejected,
        ref_logp_chosen,
        ref_logp_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    return log_weights.clamp(max=MAX_EXPONENT).exp() * loss
