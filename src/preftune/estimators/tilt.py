"""How far the optimum for a reward and a β is from the reference, from reference samples alone.

The optimum is π* ∝ π_ref e^{r/β}. The reward is least valid where the reference is thin, so that
all of this is optimistic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.estimators.estimate import Estimate, bound, cannot_tell, mean

LEAST_ESS = 5.0
"""Effective samples, in the median over prompts, that an estimate needs."""
MOST_THIN = 0.25
"""Share of the KL that prompts with fewer may carry."""
CHUNK = 2**22
"""Numbers held at once."""


@dataclass(frozen=True, kw_only=True)
class Tilt:
    """The optimum at one β."""

    beta: float
    kl: Estimate
    """E_x KL(π* ‖ π_ref), nats; where not trusted, a lower bound."""
    log_c: Estimate
    """E_x log E_{y∼π*}[π*/π_ref] = E_x D₂(π* ‖ π_ref), nats; where not trusted, a lower bound."""
    ess: float
    """Effective samples of m, the median over prompts."""
    needed: int | None
    """Samples a prompt that the KL would take at least; None where m were enough."""


def target_tilt(reward: Float[Tensor, "N m"], beta: float, seed: int = 0) -> Tilt:
    """KL and D₂ of the KL-optimal policy from m reference samples a prompt.

    w_j = e^{r_j/β} / Σ_i e^{r_i/β},  KL̂ = log m + Σ_j w_j log w_j,  ESS = 1 / Σ_j w_j²,
    log Ĉ = log(m / ESS),  in each prompt, then averaged over prompts

    Values are jackknifed over the m samples, which removes the bias of order 1 / m; its sign
    depends on the reward. Half of what that moves is added at either end of the interval, as what
    is left is of this order. KL̂ cannot exceed log m, and importance sampling takes about e^KL
    samples: beyond that KL̂ is far too low, and what is given is the lower of the two lower ends.

    Paper: Chatterjee and Diaconis 2015, arXiv 1511.01437 (e^KL samples).

    Args:
        reward: [N, m], finite, of reference samples.
        beta: β, reward units a nat, > 0.

    Returns:
        kl trusted where the median ESS is 5 or more, KL̂ ≤ log m − 1, and prompts of ESS under 5
        carry at most a quarter of it: where good samples are rare, most prompts show none and
        have ESS m, and the few that show one carry it all. log_c trusted where this holds at
        β / 2 as well, as its second moment is the normaliser of that tilt.
    """
    assert beta > 0, f"beta must be above 0, not {beta}"
    assert bool(reward.isfinite().all()), "rewards must be finite"
    m, z = reward.shape[-1], reward.double() / beta
    found, effective = _divergences(z)
    corrected, ess = _jackknifed(z), float(effective.median())
    kl, thin = float(found[:, 0].mean()), _thin(z)
    resolved = _resolved(z)
    needed = None if resolved else _needed(kl, ess, m)
    more = "" if needed is None else f"; at least {needed} are needed"
    note = (
        f"cannot tell with {m} samples at beta {beta:g}: {ess:.1f} effective samples (at least "
        f"{LEAST_ESS:g}), KL {kl:.2f} (at most log m - 1 = {math.log(m) - 1:.2f}), {thin:.2f} of "
        f"it in prompts with fewer (at most {MOST_THIN}){more}"
    )
    both = resolved and _resolved(2 * z)
    return Tilt(
        beta=beta,
        kl=_estimate(found[:, 0], corrected[:, 0], resolved, note, seed),
        log_c=_estimate(found[:, 1], corrected[:, 1], both, _harder(note, resolved, beta), seed),
        ess=ess,
        needed=needed,
    )


def tilt_curve(
    reward: Float[Tensor, "N m"], betas: Sequence[float], seed: int = 0
) -> tuple[Tilt, ...]:
    """`target_tilt` at each of several β."""
    return tuple(target_tilt(reward, beta, seed) for beta in betas)


def smallest_resolvable(curve: Sequence[Tilt]) -> float | None:
    """The smallest β down to which, from the largest, every KL on a curve is trusted."""
    found = None
    for tilt in sorted(curve, key=lambda t: -t.beta):
        if not tilt.kl.trusted:
            break
        found = tilt.beta
    return found


def _resolved(z: Tensor) -> bool:
    found, effective = _divergences(z)
    kl, most = float(found[:, 0].mean()), math.log(z.shape[-1]) - 1
    return float(effective.median()) >= LEAST_ESS and kl <= most and _thin(z) <= MOST_THIN


def _thin(z: Tensor) -> float:
    """Share of the KL in prompts with too few effective samples; 1 where there is no KL at all."""
    found, effective = _divergences(z)
    kl = found[:, 0].clamp(min=0)
    # equal rewards give KL 0 up to rounding, and say nothing of the rewards not seen
    return float(kl[effective < LEAST_ESS].sum() / kl.sum()) if kl.sum() > 1e-12 else 1.0


def _harder(note: str, resolved: bool, beta: float) -> str:
    why = f"cannot tell: the second moment of the weights is not resolved (beta {beta / 2:g})"
    return why if resolved else note


def _needed(kl: float, ess: float, m: int) -> int:
    """At least e^{KL̂ + 1}, what ESS / m samples asks for, and one more than there were."""
    return max(m + 1, math.ceil(math.exp(kl + 1)), math.ceil(LEAST_ESS * m / ess))


def _divergences(z: Float[Tensor, "*E m"]) -> tuple[Float[Tensor, "*E 2"], Float[Tensor, "*E"]]:
    """KL̂ and log Ĉ side by side, and the effective samples."""
    logw = z.log_softmax(-1)
    size = math.log(z.shape[-1])
    square = (2 * logw).logsumexp(-1)
    return torch.stack([size + (logw.exp() * logw).sum(-1), size + square], -1), (-square).exp()


def _jackknifed(z: Float[Tensor, "N m"]) -> Float[Tensor, "N 2"]:
    """m T − (m − 1) mean_j T without sample j."""
    m = z.shape[-1]
    if m < 2:
        return _divergences(z)[0]
    rest = torch.arange(m - 1).expand(m, -1)
    rest = (rest + (rest >= torch.arange(m)[:, None])).to(z.device)
    out = []
    for part in z.split(max(1, CHUNK // (m * m))):
        without = _divergences(part[:, rest])[0].mean(1)
        out.append(m * _divergences(part)[0] - (m - 1) * without)
    return torch.cat(out)


def _estimate(plain: Tensor, corrected: Tensor, trusted: bool, note: str, seed: int) -> Estimate:
    raw, better = mean(plain[:, None], seed), mean(corrected[:, None], seed)
    if raw.low is None or better.low is None or better.high is None or better.value is None:
        return cannot_tell(note if not trusted else better.note)
    if not trusted:
        return bound(low=max(0.0, min(raw.low, better.low)), note=note)
    slack = float((corrected - plain).mean().abs()) / 2
    low, high = max(0.0, better.low - slack), better.high + slack
    return Estimate(value=better.value, low=low, high=high, trusted=True)
