"""Contrastive objectives: one response of a pair against the other."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from preftune.objectives._limits import MAX_EXPONENT

_ALPHA_LIMIT = 1e-6

Link = Callable[[Tensor, float | Tensor | None], Tensor]


def _reverse_kl(log_ratio: Tensor, alpha: float | Tensor | None) -> Tensor:
    """f(u) = u log u: f'(u) = log u + 1."""
    return log_ratio


def _forward_kl(log_ratio: Tensor, alpha: float | Tensor | None) -> Tensor:
    """f(u) = −log u: f'(u) = −1/u."""
    return -torch.exp((-log_ratio).clamp(max=MAX_EXPONENT))


def _js(log_ratio: Tensor, alpha: float | Tensor | None) -> Tensor:
    """f(u) = u log u − (u+1) log((u+1)/2): f'(u) = log(2u / (1+u))."""
    return F.logsigmoid(log_ratio)


def _alpha(log_ratio: Tensor, alpha: float | Tensor | None) -> Tensor:
    """f'(u) = (u^(α−1) − 1) / (α−1), with the limit log u at α = 1."""
    if alpha is None:
        raise ValueError("divergence 'alpha' needs `alpha`, a number such as 0.5")
    power = torch.as_tensor(alpha, dtype=log_ratio.dtype, device=log_ratio.device) - 1
    is_limit = power.abs() < _ALPHA_LIMIT
    # The untaken branch of `where` must be finite too: its gradient would be 0 · NaN.
    power = torch.where(is_limit, torch.ones_like(power), power)
    score = torch.expm1((power * log_ratio).clamp(max=MAX_EXPONENT)) / power
    return torch.where(is_limit, log_ratio, score)


# f'(u) of each divergence, at u = exp(log-ratio). Constants are left out: they cancel in a pair.
_LINKS: dict[str, Link] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}


def dpo(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    ref_logp_chosen: Float[Tensor, "*E"],
    ref_logp_rejected: Float[Tensor, "*E"],
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor = 0.0,
    divergence: str = "reverse_kl",
    alpha: float | Tensor | None = None,
) -> Float[Tensor, "*E"]:
    """Direct preference optimization, under any of four divergences from the reference.

    L = −(1−ε) log σ(m) − ε log σ(−m),  m = β [f'(u_w) − f'(u_l)],  u = π(y|x) / π_ref(y|x)

        reverse_kl   f'(u) = log u + 1         (DPO itself)
        forward_kl   f'(u) = −1/u
        js           f'(u) = log(2u / (1+u))
        alpha        f'(u) = (u^(α−1) − 1) / (α−1); α → 1 is reverse_kl, α = 0 forward_kl

    Papers: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; divergences: Wang et al. 2023, arXiv
    2309.16240, theorem 1 and table 1; label smoothing (cDPO): Mitchell 2023, "A note on DPO with
    noisy preferences". `alpha` counts as in TRL (`f_alpha_divergence_coef`); the paper's α is one
    minus this one.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        ref_logp_chosen: [*E], nats, likewise, under the reference; data: receives no gradient.
        ref_logp_rejected: [*E], nats, likewise; data: receives no gradient.
        beta: strength β of the KL penalty, reward units a nat, > 0.
        label_smoothing: ε, probability that a label is flipped, in [0, 0.5); with a tensor, each
            pair has its own.
        divergence: reverse_kl, forward_kl, js or alpha. forward_kl and alpha limit their exponent
            to 80, where float32 would overflow; beyond it a response receives no gradient.
        alpha: α, without unit, needed by `alpha` only and without effect on the others.

    Returns:
        [*E], nats.

    Raises:
        ValueError: unknown `divergence`, or `alpha` missing where it is needed.

    Valid on labelled pairs from any source, offline or on-policy; the reference is the policy that
    the divergence is measured from, and it should give the responses some mass.
    """
    if divergence not in _LINKS:
        raise ValueError(f"unknown divergence {divergence!r}; use one of: {', '.join(_LINKS)}")
    link = _LINKS[divergence]
    score_chosen = link(logp_chosen - ref_logp_chosen.detach(), alpha)
    score_rejected = link(logp_rejected - ref_logp_rejected.detach(), alpha)
    margin = beta * (score_chosen - score_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    ref_logp_chosen: Float[Tensor, "*E"],
    ref_logp_rejected: Float[Tensor, "*E"],
    *,
    tau: float | Tensor,
) -> Float[Tensor, "*E"]:
    """Identity preference optimization: pull the log-ratio gap to a fixed margin.

    L = (h − 1/(2τ))²,  h = log [π(y_w|x) / π_ref(y_w|x)] − log [π(y_l|x) / π_ref(y_l|x)]

    Paper: Azar et al. 2023, arXiv 2310.12036, eq. 17. TRL calls τ `beta` and averages log-probs
    over tokens; the unit here is that of the input.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        ref_logp_chosen: [*E], nats, likewise, under the reference; data: receives no gradient.
        ref_logp_rejected: [*E], nats, likewise; data: receives no gradient.
        tau: strength τ of the KL penalty, 1/nats, > 0.

    Returns:
        [*E], nats squared.

    Valid on labelled pairs from any source, offline or on-policy; the margin is measured from the
    reference, so a fixed reference limits how far repeated rounds can go.
    """
    gap = (logp_chosen - ref_logp_chosen.detach()) - (logp_rejected - ref_logp_rejected.detach())
    return (gap - 1 / (2 * tau)).square()


def bradley_terry(
    score_chosen: Float[Tensor, "*E"],
    score_rejected: Float[Tensor, "*E"],
    *,
    margin: float | Tensor = 0.0,
    label_smoothing: float | Tensor = 0.0,
) -> Float[Tensor, "*E"]:
    """Bradley-Terry likelihood of a preference, the loss of a reward model.

    L = −(1−ε) log σ(z) − ε log σ(−z),  z = r(x, y_w) − r(x, y_l) − m

    Papers: Ouyang et al. 2022, arXiv 2203.02155, eq. 1; the margin: Touvron et al. 2023, arXiv
    2307.09288, eq. 2.

    Args:
        score_chosen: [*E], reward, in nats of log-odds.
        score_rejected: [*E], likewise.
        margin: m, in the same unit, the lead that the chosen response must have.
        label_smoothing: ε, probability that a label is flipped, in [0, 0.5); with a tensor, each
            pair has its own. The least loss is then at z = log [(1−ε) / ε].

    Returns:
        [*E], nats.

    Valid on labelled pairs from any source; scores are learnt up to a constant a prompt, and only
    where the pairs have mass. No reference is involved.
    """
    lead = score_chosen - score_rejected - margin
    return -(1 - label_smoothing) * F.logsigmoid(lead) - label_smoothing * F.logsigmoid(-lead)
