"""Does the reference already prefer what the reward prefers, beyond what length explains?"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.estimators.estimate import Estimate, bootstrap, cannot_tell, mean, of

LEAST_PROMPTS = 10
"""Prompts whose samples differ in what is compared."""
LEAST_SAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Misalignment:
    """Reference log-prob s against reward r among a prompt's own samples."""

    spearman: Estimate
    """Rank correlation of s and r; negative: the reward points where the reference is thin."""
    partial: Estimate
    """The same at equal length."""
    peak_depth: Estimate
    """(mean s − s(argmax r)) / sd s: how unlikely the best of the m samples is. Grows with m."""


def misalignment(
    logp: Float[Tensor, "N m"],
    reward: Float[Tensor, "N m"],
    length: Int[Tensor, "N m"],
    seed: int = 0,
) -> Misalignment:
    """Rank correlations within prompts, and the depth at which the best sample lies.

    ρ_ab = Σ_x c_ab / √(Σ_x c_aa Σ_x c_bb),
    c_ab = mean over three different samples of sign(a_i − a_j) sign(b_i − b_k),
    partial ρ = (ρ_sr − ρ_sl ρ_rl) / √((1 − ρ_sl²)(1 − ρ_rl²))

    Spearman's ρ with average ties, without its pull to zero in few samples (the mean of the plain
    one is ((m − 2) ρ + 3 τ) / (m + 1)). Sums over prompts come before the quotient, so that a
    prompt whose samples all tie adds nothing and needs no exception.

    Args:
        logp: [N, m], s = log π_ref(y | x), nats, summed over tokens.
        reward: [N, m].
        length: [N, m], tokens.

    Returns:
        not trusted with under 3 samples, or under 10 prompts in which both differ.
    """
    count, m = logp.shape
    differ = int((_vary(logp) & _vary(reward)).sum())
    if m < LEAST_SAMPLES or differ < LEAST_PROMPTS:
        why = cannot_tell(
            f"cannot tell with {m} samples: log-prob and reward differ in {differ} of {count} "
            f"prompts; {LEAST_SAMPLES} samples and {LEAST_PROMPTS} prompts are needed"
        )
        return Misalignment(spearman=why, partial=why, peak_depth=why)
    parts = [x.detach().double().cpu() for x in (logp, reward, length)]
    sums = np.array([grade_covariances(rows).numpy() for rows in torch.stack(parts, 1)])

    def correlation(picked: np.ndarray, a: int, b: int) -> float:
        c = sums[picked].sum(0)
        return c[a, b] / np.sqrt(c[a, a] * c[b, b]) if c[a, a] > 0 and c[b, b] > 0 else 0.0

    def partial(picked: np.ndarray) -> float:
        sr, sl, rl = (correlation(picked, a, b) for a, b in ((0, 1), (0, 2), (1, 2)))
        rest = (1 - sl**2) * (1 - rl**2)
        return (sr - sl * rl) / np.sqrt(rest) if rest > 0 else np.nan

    depth = peak_depth(parts[0], parts[1])
    return Misalignment(
        spearman=of(bootstrap(lambda i: correlation(i, 0, 1), count, seed)),
        partial=of(bootstrap(partial, count, seed)),
        peak_depth=mean(depth[~depth.isnan()][:, None], seed),
    )


def grade_covariances(rows: Float[Tensor, "C m"]) -> Float[Tensor, "C C"]:
    """c_ab of `misalignment` for one prompt, for each two of C statistics of its m ≥ 3 samples.

    The sum over all j and k is that of products of ranks; what has j = k is Kendall's, and goes.
    """
    m = rows.shape[-1]
    signs = torch.sign(rows[:, :, None] - rows[:, None, :])
    ranks = signs.sum(-1)
    same = torch.einsum("aij,bij->ab", signs, signs)
    return (ranks @ ranks.mT - same) / (m * (m - 1) * (m - 2))


def peak_depth(logp: Float[Tensor, "N m"], reward: Float[Tensor, "N m"]) -> Float[Tensor, " N"]:
    """How far below the mean log-prob the best sample is, in standard deviations.

    (mean s − s(argmax r)) / sd s;  samples that tie for the best share their mean

    Returns:
        [N]; NaN where all of a prompt's log-probs are the same.
    """
    best = reward == reward.max(-1, keepdim=True).values
    peak = (logp * best).sum(-1) / best.sum(-1)
    return ((logp.mean(-1) - peak) / logp.std(-1)).where(_vary(logp), torch.nan)


def _vary(x: Float[Tensor, "N m"]) -> Bool[Tensor, " N"]:
    """Not by the standard deviation, which rounding may leave above 0."""
    return x.amax(-1) > x.amin(-1)
