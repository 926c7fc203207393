"""Is this text the reference's own? The surprise of its tokens, against what was to be expected."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from preftune.estimators.estimate import Estimate, bootstrap, cannot_tell, columns, mean, of
from preftune.numerics import masked_sum

POSITIONS = 8
"""First tokens that are looked at one by one."""
LEAST_PROMPTS = 10
"""Prompts that must reach a position before its mean says something."""


@dataclass(frozen=True, kw_only=True)
class Surprisal:
    """How far the responses are from the reference's own samples; about (0, 1) for those."""

    z: Float[Tensor, "N K"]
    mean: Estimate
    """Mean z: above 0 the text is stranger than the reference's own, below 0 tamer (low
    temperature, greedy)."""
    sd: Estimate
    """Standard deviation of z over all responses."""
    excess: Estimate
    """mean(Σ_t excess) / √(mean Σ_t Var_t): exactly 0 for own samples. Long ones weigh more."""
    dispersion: Estimate
    """√(mean (Σ_t excess)² / mean Σ_t Var_t): exactly 1 for own samples."""
    by_position: tuple[Estimate, ...]
    """Mean excess at token 0, 1, ... in standard deviations. A chat template, BOS or space that the
    reference was not trained with stands out at token 0."""


def surprisal_excess(
    ref_token_logp: Float[Tensor, "N K T"],
    entropy: Float[Tensor, "N K T"],
    variance: Float[Tensor, "N K T"],
    mask: Bool[Tensor, "N K T"],
) -> Float[Tensor, "N K"]:
    """Excess surprise of whole responses, in standard deviations.

    z = Σ_t (−log π_ref(y_t | x, y_<t) − H_t) / √(Σ_t Var_t)

    H_t and Var_t are mean and variance of −log π_ref over the full next-token distribution. The
    numerator is a martingale with mean 0 and variance E Σ_t Var_t on the reference's own samples,
    however long they are and wherever they were cut. z has mean 0 and sd 1 only nearly, as its
    denominator is random too, and not given the length at which a response ended: where the end
    token is rarer than others, those that ended early are strange. Being (0, 1) is necessary for
    own samples, not sufficient.

    Paper: the statistic of Fast-DetectGPT, Bao et al. 2023, arXiv 2310.05130.

    Args:
        ref_token_logp: [N, K, T], nats.
        entropy: [N, K, T], H_t, nats.
        variance: [N, K, T], Var_t, nats², ≥ 0.
        mask: [N, K, T], true on response tokens, EOS among them; one at least in each response.

    Returns:
        [N, K]; 0 where the reference allows one continuation and it was taken, and inf where it
        was not.
    """
    assert bool(mask.any(-1).all()), "a response without tokens has no surprise"
    excess = masked_sum(-ref_token_logp.double() - entropy.double(), mask)
    spread = masked_sum(variance.double(), mask).sqrt()
    return (excess / spread).where((spread > 0) | (excess.abs() > 1e-6), 0.0)


def surprisal(
    ref_token_logp: Float[Tensor, "N K T"],
    entropy: Float[Tensor, "N K T"],
    variance: Float[Tensor, "N K T"],
    mask: Bool[Tensor, "N K T"],
    positions: int = POSITIONS,
    seed: int = 0,
) -> Surprisal:
    """`surprisal_excess` with its mean, its spread and the first positions one by one.

    The ratios of means beside z's own are exact where z is only nearly (0, 1): for responses of few
    tokens, that end when they like, z's mean was off by .1.

    Args: as `surprisal_excess`;
        positions: how many first tokens are looked at one by one.
    """
    z = surprisal_excess(ref_token_logp, entropy, variance, mask)
    count = len(z)
    excess = (-ref_token_logp.double() - entropy.double()).where(mask, 0.0)
    spread = variance.double().where(mask, 0.0)
    total, expected = excess.sum(-1), spread.sum(-1)
    moments = columns(*(x.mean(-1) for x in (z, z**2, total, total**2, expected)))

    def sd(picked: np.ndarray) -> float:
        first, second = moments[picked, :2].mean(0)
        return float(np.sqrt(max(second - first**2, 0.0)))

    def pooled(column: int, power: float) -> Estimate:
        def statistic(picked: np.ndarray) -> float:
            top, bottom = moments[picked][:, [column, 4]].mean(0)
            return float(top**power / np.sqrt(bottom)) if bottom > 0 else np.nan

        return of(bootstrap(statistic, count, seed))

    shown = range(min(positions, mask.shape[-1]))
    return Surprisal(
        z=z,
        mean=mean(z, seed),
        sd=of(bootstrap(sd, count, seed)) if z.numel() > 1 else cannot_tell("one response"),
        excess=pooled(2, 1.0),
        dispersion=pooled(3, 0.5),
        by_position=tuple(
            _at(excess[..., t], spread[..., t], mask[..., t], t, seed) for t in shown
        ),
    )


def _at(
    excess: Float[Tensor, "N K"],
    spread: Float[Tensor, "N K"],
    there: Bool[Tensor, "N K"],
    position: int,
    seed: int,
) -> Estimate:
    """mean(−log π_ref − H) / √(mean Var) over the responses that have this token.

    The ratio of means, not the mean of ratios: a token that is all but certain has a ratio of
    1 / √Var when it does not come.
    """
    reached = int(there.any(-1).sum())
    if reached < LEAST_PROMPTS:
        return cannot_tell(
            f"cannot tell: token {position} is reached in {reached} prompts, not {LEAST_PROMPTS}"
        )
    sums = columns(excess.sum(-1), spread.sum(-1), there.double().sum(-1))

    def standardised(picked: np.ndarray) -> float:
        x, v, n = sums[picked].sum(0)
        return float(x / np.sqrt(n * v)) if v > 0 else (0.0 if abs(x) < 1e-6 else np.inf)

    return of(bootstrap(standardised, len(sums), seed))
