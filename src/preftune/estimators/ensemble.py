"""Rewards that all explain the same labels: where they disagree, the labels say little.

Heads are linear in frozen features, so that fitting them takes no forward pass. That is also what
they cannot see: where the true reward depends on something that the features do not show, all of
them are wrong alike.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.estimators.estimate import Estimate, cannot_tell, of, share
from preftune.estimators.features import LEAST_PROMPTS, MOST_FEATURES, compressed
from preftune.figures import ratio, wins
from preftune.numerics import stream_key

HEADS = 16
"""Of the same pairs, with 60 prompts and 32 features, 5 heads gave intervals of width .9, 16 of .4,
and a head costs milliseconds."""
LEAST_HEADS = 3
LEAST_PAIRS = 40
SPREAD = 1.0
"""Nats by which the rewards of a pair's two responses differ, before any label is seen."""
CHANCE = 0.5
_CORRELATED = 2**0.5
"""By which the interval of a held-out accuracy is wider than resampling pairs tells: what chance
lets one pair's label say of another's, it lets the other's say of it. Of 200 sets of random labels,
6 % were found to be predicted without it, 2 % with it."""
_STEPS, _LONGEST = 50, 4.0


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Linear rewards of one set of pairs."""

    weight: Float[Tensor, "E d"]
    unseen: Bool[Tensor, "E M"]
    """Pairs that a head was not fitted on."""


def bradley_terry_heads(
    pairs: Float[Tensor, "M d"], heads: int = HEADS, spread: float = SPREAD, seed: int = 0
) -> Heads:
    """Heads that differ by the pairs that they drew and by what they took for granted.

    w_e = argmin Σ_i c_ei log(1 + e^{−w·Δφ_i}) + ‖w − a_e‖² / 2σ²,  Δφ = φ(y⁺) − φ(y⁻),
    c_e: how often each pair is in a resample of M, a_e ∼ N(0, σ² I), σ² = spread² / mean ‖Δφ‖²

    With one a for all, heads would agree, at that a, in every direction that the pairs never
    differ in: just where nothing is known. For linear rewards and Gaussian noise the heads are
    draws from the posterior.

    Paper: Osband et al. 2018, arXiv 1806.03335 (resamples with random priors).

    Args:
        pairs: [M, d], Δφ, not all 0.
        heads: E.
        spread: nats, > 0.
    """
    x = pairs.double()
    count, width = x.shape
    generator = torch.Generator().manual_seed(stream_key(seed, "heads"))  # not the projection's
    drawn = torch.randint(0, count, (heads, count), generator=generator)
    times = torch.zeros(heads, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    precision = float(x.square().sum(-1).mean()) / spread**2
    anchor = torch.randn(heads, width, generator=generator, dtype=torch.float64) / precision**0.5
    fits = [_fitted(x, c, a, precision) for c, a in zip(times, anchor, strict=True)]
    return Heads(weight=torch.stack(fits), unseen=times == 0)


def _fitted(
    x: Float[Tensor, "M d"], times: Float[Tensor, " M"], anchor: Float[Tensor, " d"], pull: float
) -> Float[Tensor, " d"]:
    """By Newton's method, whose steps are shortened while they are long."""
    w, eye = anchor, torch.eye(len(anchor), dtype=x.dtype)
    for _ in range(_STEPS):
        p = torch.sigmoid(-(x @ w))
        gradient = pull * (w - anchor) - x.mT @ (times * p)
        curve = (x * (times * p * (1 - p))[:, None]).mT @ x + pull * eye
        step = torch.linalg.solve(curve, gradient)
        moved = float((x @ step).abs().max())
        w = w - step / max(1.0, moved / _LONGEST)
        if moved < 1e-8:
            break
    return w


def held_out_accuracy(heads: Heads, pairs: Float[Tensor, "M d"], seed: int = 0) -> Estimate:
    """Share of pairs that the mean of the heads that did not see them orders as labelled.

    Pairs that every head saw are left out.
    """
    unseen = heads.unseen.double()
    score = ((heads.weight @ pairs.double().mT) * unseen).sum(0)
    right = wins(score, torch.zeros_like(score))[heads.unseen.any(0)]
    found = share(right[:, None], seed)
    if found.value is None or found.low is None or found.high is None:
        return found
    low = found.value - _CORRELATED * (found.value - found.low)
    high = found.value + _CORRELATED * (found.high - found.value)
    return replace(found, low=max(0.0, low), high=min(1.0, high))


def disagreement_ratio(
    policy_reward: Float[Tensor, "E N K"],
    pair_reward: Float[Tensor, "E N"],
    unseen: Bool[Tensor, "E N"] | None = None,
    seed: int = 0,
) -> Estimate:
    """How much more rewards disagree on a policy's pairs than on the data's, to the same prompts.

    E_π[Var_e Δr_e] / E_D[Var_e Δr_e],  Δr = r(y) − r(y'),

    over the heads that did not see the prompt's pair, prompts with more of them counting for more.
    The interval is over prompts, the heads as they are.

    Args:
        policy_reward: [E, N, K], nats, of K ≥ 2 of the policy's samples a prompt; all their pairs
            count.
        pair_reward: [E, N], nats, r(y⁺) − r(y⁻).
        unseen: [E, N]; None: no head saw any. On pairs that it was fitted to a head disagrees too
            little with the others, and the ratio is too high.

    Returns:
        not trusted with under 3 heads, or where the heads agree on all of the data's pairs.
    """
    heads, _, samples = policy_reward.shape
    assert samples >= 2, "two samples a prompt at least"
    if heads < LEAST_HEADS:
        return cannot_tell(f"cannot tell with {heads} heads: {LEAST_HEADS} are needed")
    used = torch.ones_like(pair_reward) if unseen is None else unseen
    own = policy_reward.double() - policy_reward.double().mean(-1, keepdim=True)
    # over all pairs of K samples: twice the variance of what a head says beyond the mean head
    top = _scatter(own, used.double()[..., None]).sum(-1) * 2 / (samples - 1)
    bottom = _scatter(pair_reward.double(), used.double())
    if bottom.sum() <= 0:
        return cannot_tell("the heads agree on all of the data's pairs")
    return of(ratio(top, bottom, seed))


def _scatter(
    reward: Float[Tensor, "E N ..."], used: Float[Tensor, "E N ..."]
) -> Float[Tensor, "N ..."]:
    """Squared deviations from the mean of the heads that are used, summed over these."""
    mean = (reward * used).sum(0) / used.sum(0).clamp(min=1)
    return ((reward - mean).square() * used).sum(0)


@dataclass(frozen=True, kw_only=True)
class EnsembleCoverage:
    """What heads say of a policy, and whether they may be heard."""

    ratio: Estimate
    accuracy: Estimate
    """Of the heads on pairs that they were not fitted on."""


def ensemble_coverage(
    policy: Float[Tensor, "N K F"],
    pairs: Float[Tensor, "M F"],
    place: Int[Tensor, " N"],
    heads: int = HEADS,
    spread: float = SPREAD,
    seed: int = 0,
) -> EnsembleCoverage:
    """`disagreement_ratio` of heads that are fitted to the data's pairs.

    About 1 where the policy's own pairs are the data. Above, it moves in directions that the
    labels leave open: a sample of what `theory.coverage` takes the worst of, since any two heads
    are two rewards that the labels allow.

    Paper: derived from Song et al. 2024, arXiv 2406.01462, section 6 (function approximation).

    Args:
        policy: [N, K, F], φ of K ≥ 2 of the policy's samples a prompt.
        pairs: [M, F], φ(y⁺) − φ(y⁻) of one pair a prompt.
        place: [N], where among the pairs a prompt's own stands.

    Returns:
        nothing is trusted with under 20 prompts or 40 pairs; the ratio neither where the heads
        order held-out pairs no better than chance.
    """
    few = f"{len(policy)} prompts: {LEAST_PROMPTS}" if len(policy) < LEAST_PROMPTS else ""
    few = few or (f"{len(pairs)} pairs: {LEAST_PAIRS}" if len(pairs) < LEAST_PAIRS else "")
    inner = policy.double() - policy.double().mean(1, keepdim=True)
    inner, x = compressed([inner, pairs.double()], MOST_FEATURES, seed)
    if few or not bool((x != 0).any()):
        same = "the chosen and the rejected responses have the same features"
        why = cannot_tell(f"cannot tell with {few} are needed" if few else same)
        return EnsembleCoverage(ratio=why, accuracy=why)
    made = bradley_terry_heads(x, heads, spread, seed)
    accuracy = held_out_accuracy(made, x, seed)
    if accuracy.low is None or accuracy.low <= CHANCE:
        why = cannot_tell(f"heads no better than chance on held-out pairs: {_words(accuracy)}")
        return EnsembleCoverage(ratio=why, accuracy=accuracy)
    own = torch.einsum("ed,nkd->enk", made.weight, inner)
    data = made.weight @ x[place].mT
    found = disagreement_ratio(own, data, made.unseen[:, place], seed)
    return EnsembleCoverage(ratio=found, accuracy=accuracy)


def _words(accuracy: Estimate) -> str:
    if accuracy.value is None:
        return accuracy.note
    return f"they order {accuracy.value:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}] of them"
