"""Contrastive objectives without a reference: SimPO, ORPO and CPO."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

# ORPO's odds p / (1 - p) are infinite at p = 1; up to here log-odds reach 16 nats.
_MAX_MEAN_LOGP = -1e-7


def _token_mean(logp: Tensor, length: Tensor) -> Tensor:
    """Mean log-prob a token; an empty response has log-prob 0 and counts as one token."""
    return logp / length.detach().clamp(min=1)


def _log_odds(logp: Tensor) -> Tensor:
    """log [p / (1 − p)] of p = exp(logp); the branches of log(1 − p) avoid cancellation."""
    logp = logp.clamp(max=_MAX_MEAN_LOGP)
    half = -math.log(2)
    # The untaken branch of `where` must be finite too: its gradient would be 0 · NaN.
    small = torch.log1p(-logp.clamp(max=half).exp())
    large = torch.log(-torch.expm1(logp))
    return logp - torch.where(logp < half, small, large)


def simpo(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    len_chosen: Num[Tensor, "*E"],
    len_rejected: Num[Tensor, "*E"],
    *,
    beta: float | Tensor,
    gamma: float | Tensor,
) -> Float[Tensor, "*E"]:
    """Simple preference optimization: the reward is the mean log-prob a token.

    L = −log σ(β log π(y_w|x) / |y_w| − β log π(y_l|x) / |y_l| − γ)

    Paper: Meng et al. 2024, arXiv 2405.14734, eq. 6. γ is subtracted as it is; the paper reports
    the ratio γ/β, and TRL (`simpo_gamma`) takes γ.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        len_chosen: [*E], response tokens, counted as they were summed; data: receives no gradient.
        len_rejected: [*E], likewise; data: receives no gradient.
        beta: scale β of the reward, without unit, > 0; about 2, as it multiplies means and not
            sums.
        gamma: γ, nats of log-odds, the lead that the chosen response must have, ≥ 0.

    Returns:
        [*E], nats.

    Valid on labelled pairs from any source, offline or on-policy. Nothing holds the policy near
    where it started: small learning rates, few epochs.
    """
    gap = _token_mean(logp_chosen, len_chosen) - _token_mean(logp_rejected, len_rejected)
    return -F.logsigmoid(beta * gap - gamma)


def orpo(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    len_chosen: Num[Tensor, "*E"],
    len_rejected: Num[Tensor, "*E"],
    *,
    odds_weight: float | Tensor,
) -> Float[Tensor, "*E"]:
    """Odds-ratio preference optimization: SFT on the chosen response, plus an odds-ratio term.

    L = −log p_w − λ log σ(log [p_w / (1 − p_w)] − log [p_l / (1 − p_l)]),
    p = exp(log π(y|x) / |y|)

    Paper: Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7. TRL calls λ `beta` and takes the
    likelihood term over prompt and response; here it is the response's.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        len_chosen: [*E], response tokens, counted as they were summed; data: receives no gradient.
        len_rejected: [*E], likewise; data: receives no gradient.
        odds_weight: λ, without unit, ≥ 0, about 0.1.

    Returns:
        [*E], nats.

    Valid on labelled pairs whose chosen responses are worth imitating; it stands for SFT and
    preference tuning at once and starts from a base model. Mean log-probs are limited to −1e-7,
    where odds would become infinite; beyond it a response receives no gradient from the odds.
    """
    mean_chosen = _token_mean(logp_chosen, len_chosen)
    mean_rejected = _token_mean(logp_rejected, len_rejected)
    log_odds_ratio = _log_odds(mean_chosen) - _log_odds(mean_rejected)
    return -mean_chosen - odds_weight * F.logsigmoid(log_odds_ratio)


def cpo(
    logp_chosen: Float[Tensor, "*E"],
    logp_rejected: Float[Tensor, "*E"],
    *,
    beta: float | Tensor,
    nll_weight: float | Tensor,
) -> Float[Tensor, "*E"]:
    """Contrastive preference optimization: DPO under a uniform reference, plus SFT on the chosen.

    L = −log σ(β [log π(y_w|x) − log π(y_l|x)]) − λ log π(y_w|x)

    Paper: Xu et al. 2024, arXiv 2401.08417, eq. 3 and the section's behaviour-cloning term (λ = 1).
    TRL calls λ `cpo_alpha` and averages its term over the tokens of the batch; here it is summed
    over the response, the unit of its input.

    Args:
        logp_chosen: [*E], nats, summed over response tokens.
        logp_rejected: [*E], nats, likewise.
        beta: scale β of the log-odds, without unit, > 0.
        nll_weight: λ, without unit, ≥ 0.

    Returns:
        [*E], nats.

    Valid on labelled pairs from any source whose chosen responses are worth imitating; the
    likelihood term alone holds the policy, towards the data and not the reference.
    """
    return -F.logsigmoid(beta * (logp_chosen - logp_rejected)) - nll_weight * logp_chosen
