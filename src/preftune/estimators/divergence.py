"""How far a policy is from the reference, from its own samples.

Log-ratios l = log π(y | x) − log π_ref(y | x) of samples y ∼ π, drawn at temperature 1 with nothing
cut off: under top-p sampling the ratio is not defined.

The estimator k3 = e^{−l} − 1 + l is not offered. It is unbiased too, but e^{−l} has its mean of 1
from samples that π hardly ever draws: at a KL of 6 nats, 128 samples gave 5.2 ± 1.2 and once
5.9 ± 8.8, where the plain mean gave 6.03 ± .12. And e^{2l} over reference samples gave −17 for a
log C of 6.5: log C is taken over the policy's own samples or not at all.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preftune.estimators.estimate import Estimate, bound, cannot_tell, mean, share
from preftune.figures import interval
from preftune.numerics import masked_sum
from preftune.theory.coverage import profile_bound

LEVELS = tuple(2.0**k for k in range(2, 21))
"""N of the coverage profile."""
MOST_K = 0.7
"""Pareto tail index beyond which a mean of weights has no useful error."""
MOST_SHARE = 0.2
"""Share of the sum that one sample may carry."""
LEAST_SAMPLES = 200
"""That log C takes: of 80, the tail of weights looked light in half of the draws and was not."""


def reverse_kl(
    logp: Float[Tensor, "N K"], ref_logp: Float[Tensor, "N K"], seed: int = 0
) -> Estimate:
    """KL(π ‖ π_ref) by the mean log-ratio (k1).

    KL = E_{y∼π}[log π(y | x) − log π_ref(y | x)], unbiased

    Args:
        logp: [N, K], nats, of the policy's own samples.
        ref_logp: [N, K], nats, of the same under the reference.

    Returns:
        not trusted if the interval is all below 0, where no KL is.
    """
    return _not_negative(mean(_log_ratio(logp, ref_logp), seed))


def reverse_kl_by_tokens(
    token_kl: Float[Tensor, "N K T"], mask: Bool[Tensor, "N K T"], seed: int = 0
) -> Estimate:
    """KL(π ‖ π_ref) by the exact divergence at each token of own samples (Rao–Blackwellised).

    KL = E_{y∼π} Σ_t KL(π(· | x, y_<t) ‖ π_ref(· | x, y_<t))

    Unbiased, and as a rule of less variance than k1. Not always: if π is the reference conditioned
    on an event, l is the same for all samples, and this sum is not.

    Paper: Amini et al. 2025, arXiv 2504.10637.

    Args:
        token_kl: [N, K, T], nats, ≥ 0, as `numerics.token_kl`.
        mask: [N, K, T], true on response tokens, EOS among them.
    """
    return _not_negative(mean(masked_sum(token_kl.double(), mask), seed))


def _not_negative(found: Estimate) -> Estimate:
    if found.high is not None and found.high < 0:
        return cannot_tell(
            f"the interval [{found.low:.3g}, {found.high:.3g}] is below 0, where no KL is: the "
            "samples are not this policy's own, or were not scored as they were drawn"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class CoverageProfile:
    """How much of a policy lies where the reference is N times thinner, for each N."""

    levels: tuple[float, ...]
    shares: tuple[Estimate, ...]
    """Cov_N = P_{y∼π}[log π(y)/ν(y) ≥ log N]."""
    bounds: tuple[float, ...]
    """(KL + 1/e) / log N at the upper end of KL's interval, at most 1; 1 if there is no KL."""


def coverage_profile(
    logp: Float[Tensor, "N K"],
    ref_logp: Float[Tensor, "N K"],
    levels: tuple[float, ...] = LEVELS,
    seed: int = 0,
) -> CoverageProfile:
    """Share of a policy's samples that ν makes N times less likely.

    Cov_N(π ‖ ν) = P_{y∼π}[log π(y)/ν(y) ≥ log N] ≤ (KL(π ‖ ν) + 1/e) / log N

    Usable where weights are not: it needs no e^l.

    Paper: arXiv 2510.15020.

    Args:
        logp: [N, K], nats, of the policy's own samples.
        ref_logp: [N, K], nats, of the same under ν (the reference, a clone of the data); −inf
            counts as not covered at any N.
        levels: N, > 1.
    """
    ratio = _log_ratio(logp, ref_logp)
    kl = reverse_kl(logp, ref_logp, seed)
    most = torch.tensor(math.inf if kl.high is None else kl.high, dtype=torch.float64)
    return CoverageProfile(
        levels=levels,
        shares=tuple(share((ratio >= math.log(n)).double(), seed) for n in levels),
        bounds=tuple(min(1.0, profile_bound(most, n).item()) for n in levels),
    )


@dataclass(frozen=True, kw_only=True)
class Concentrability:
    """Expected density ratio of a policy, and whether the samples carry it."""

    log_c: Estimate
    """log C, nats; where not trusted, a lower bound."""
    k_hat: float
    """Pareto tail index of the weights e^l; inf where there are too few to fit one."""
    largest_share: float
    """Of the sum of weights, in the largest."""


def log_concentrability(
    logp: Float[Tensor, "N K"], ref_logp: Float[Tensor, "N K"], seed: int = 0
) -> Concentrability:
    """Log of the expected density ratio, from the policy's own samples.

    log C = log E_{x, y∼π}[π(y | x) / π_ref(y | x)],  which is D₂(π ‖ π_ref) for one prompt

    Prompts are pooled, as in the definition; the mean of D₂ over prompts is no larger. KL ≤ log C,
    so that the lower end of KL's interval bounds it where the weights cannot be trusted.

    Paper: Huang et al. 2024, arXiv 2407.13399 (C); Vehtari et al. 2015, arXiv 1507.02646 (k̂).

    Args:
        logp: [N, K], nats, of the policy's own samples.
        ref_logp: [N, K], nats, of the same under the reference.

    Returns:
        trusted where there are S ≥ 200 samples, k̂ ≤ min(.7, 1 − 1 / log₁₀ S), and the largest
        weight has at most .2 of the sum.
    """
    ratio = _log_ratio(logp, ref_logp)
    kl, top, size = reverse_kl(logp, ref_logp, seed), float(ratio.max()), ratio.numel()
    if not math.isfinite(top):
        why = bound(low=kl.low, note="a sample has no mass under the reference: log C is infinite")
        return Concentrability(log_c=why, k_hat=math.inf, largest_share=1.0)
    weights = (ratio - top).exp()
    k_hat, largest = pareto_k(ratio.flatten()), float(1 / weights.sum())
    most_k = min(MOST_K, 1 - 1 / math.log10(max(size, 2)))
    figure = interval(weights, seed)
    light = k_hat <= most_k and largest <= MOST_SHARE
    if size < LEAST_SAMPLES or not light or figure["low"] is None:
        note = (
            f"cannot tell with {size} samples (at least {LEAST_SAMPLES}): k-hat {k_hat:.2f} (at "
            f"most {most_k:.2f}), largest weight {largest:.2f} of the sum (at most {MOST_SHARE}); "
            "the lower end of the KL is a lower bound"
        )
        log_c = cannot_tell(note) if kl.low is None else bound(low=max(0.0, kl.low), note=note)
        return Concentrability(log_c=log_c, k_hat=k_hat, largest_share=largest)
    # the log is monotone: the ends of the mean's interval are those of its log
    value, low, high = (top + math.log(figure[k] or 0.0) for k in ("value", "low", "high"))
    log_c = Estimate(value=value, low=low, high=high, trusted=True)
    return Concentrability(log_c=log_c, k_hat=k_hat, largest_share=largest)


def offline_gap(
    logp: Float[Tensor, "N K"],
    ref_logp: Float[Tensor, "N K"],
    chosen_log_ratio: Float[Tensor, " N"],
    rejected_log_ratio: Float[Tensor, " N"],
    seed: int = 0,
) -> Estimate:
    """How much better the policy has learnt to say its own responses than the data's.

    G = E_{y∼π}[l] − ½ E_D[l(y⁺) + l(y⁻)],  l = log π / π_ref

    A rising G at a flat pair accuracy is mass that leaves the data. Early in training its level
    says nothing.

    Args:
        logp, ref_logp: [N, K], nats, of the policy's own samples.
        chosen_log_ratio, rejected_log_ratio: [N], l of the data's responses to the same prompts.
    """
    own = _log_ratio(logp, ref_logp).mean(-1)
    data = (chosen_log_ratio.double() + rejected_log_ratio.double()) / 2
    return mean((own - data)[:, None], seed)


def pareto_k(log_weights: Float[Tensor, " S"]) -> float:
    """Tail index k̂ of importance weights: moments of order 1 / k and above do not exist.

    A generalised Pareto distribution is fitted to what the largest min(S / 5, 3 √S) weights have
    over the next; the fit is drawn to ½ with the weight of ten observations.

    Paper: Vehtari et al. 2015, arXiv 1507.02646; the fit is Zhang and Stephens 2009,
    Technometrics 51(3).

    Args:
        log_weights: [S], nats, finite.

    Returns:
        inf where fewer than five weights stand out, and −inf where the largest are all equal, so
        that no tail is left to be seen.
    """
    x = np.sort(np.exp((log_weights - log_weights.max()).double().cpu().numpy()))
    size = len(x)
    tail = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    if tail < 5:
        return math.inf
    if x[-tail] == x[-1]:
        return -math.inf
    # weights that tie with the threshold are no tail: it goes down until enough stand above it
    below = x[x < x[-tail]]
    threshold = below[-1] if len(below) else x[0]
    excess = (x - threshold)[x > threshold]
    return _pareto_fit(excess) if len(excess) >= 5 else math.inf


def _pareto_fit(excess: np.ndarray) -> float:
    """Zhang and Stephens' estimate of k from ascending, positive excesses."""
    n = len(excess)
    grid = 30 + int(math.sqrt(n))
    b = 1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    b = b / (3 * excess[int(n / 4 + 0.5) - 1]) + 1 / excess[-1]
    k = np.log1p(-b[:, None] * excess).mean(1)
    profile = n * (np.log(-b / k) - k - 1)
    weights = np.exp(profile - profile.max())
    b_mean = float((b * weights).sum() / weights.sum())
    k_mean = float(np.log1p(-b_mean * excess).mean())
    return (n * k_mean + 10 * 0.5) / (n + 10)


def _log_ratio(logp: Float[Tensor, "N K"], ref_logp: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    ratio = logp.double() - ref_logp.double()
    assert not bool(ratio.isnan().any()), "log-probs are NaN, or a sample has none under its policy"
    return ratio
