"""Do the data's differences span those that a policy makes? In features."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.estimators.estimate import Estimate, cannot_tell, of
from preftune.figures import ratio

MOST_FEATURES = 256
"""Dimensions that features are projected to at most."""
PAIRS_A_FEATURE = 4
"""Training pairs for each dimension that is kept, where the number is chosen here."""
LEAST_PAIRS_A_FEATURE = 2
LEAST_PROMPTS = 20


def compressed(
    parts: Sequence[Float[Tensor, "... F"]], width: int, seed: int = 0
) -> list[Float[Tensor, "... d"]]:
    """Features on one scale, in at most `width` random directions, float64.

    Each feature is divided by its root mean square over all parts (one that is 0 everywhere is
    left out of the sum by being 0), then projected by a Gaussian matrix if there are too many.
    One scale before the projection, as a language model's few huge features would fill it.

    Args:
        parts: of the same features; centre them first, by prompt.
        width: directions, ≥ 1.
    """
    wide = [p.detach().double().cpu() for p in parts]
    size = wide[0].shape[-1]
    rows = torch.cat([p.reshape(-1, size) for p in wide])
    scale = rows.square().mean(0).sqrt()
    wide = [p / scale.where(scale > 0, 1.0) for p in wide]
    if size <= width:
        return wide
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, width, generator=generator, dtype=torch.float64) / width**0.5
    return [p @ matrix for p in wide]


def fold_of(count: int, folds: int, seed: int = 0) -> Tensor:
    """The fold of each prompt, [N], as equal in size as can be."""
    generator = torch.Generator().manual_seed(seed)
    return torch.arange(count)[torch.randperm(count, generator=generator)] % folds


def feature_ratio(
    policy: Float[Tensor, "N K F"],
    chosen: Float[Tensor, "N F"],
    rejected: Float[Tensor, "N F"],
    ridge: float = 1e-2,
    folds: int = 2,
    width: int | None = None,
    seed: int = 0,
) -> Estimate:
    """How much larger a policy's differences are than the data's, where the data are thin.

    E_{y, y'∼π}‖Δφ‖²_{Σ⁻¹} / E_D‖Δφ‖²_{Σ⁻¹},  Δφ = φ(y) − φ(y'),
    Σ = mean_D Δφ Δφᵀ + ridge · (mean eigenvalue) I

    Cross-fitted over prompts: Σ is of the other folds' pairs. On the pairs that it was fitted to
    the denominator is too low and the ratio too high. About 1 where the policy's own pairs are the
    data; above, it moves in directions that the labels say little about. The average over
    directions, where `theory.coverage.relative_condition_number` takes the worst. The interval
    takes the fitted Σ and the projection as given.

    Paper: derived from Song et al. 2024, arXiv 2406.01462, section 6 (function approximation).

    Args:
        policy: [N, K, F], φ of K ≥ 2 of the policy's samples a prompt; all their pairs count.
        chosen, rejected: [N, F], of one pair a prompt.
        ridge: share of the mean eigenvalue, > 0.
        folds: ≥ 2.
        width: dimensions kept, random ones; without it, as many as there are four training pairs
            for, at most 256.

    Returns:
        not trusted with under 20 prompts, or under two training pairs a dimension.
    """
    found = _differences([policy], chosen, rejected, ridge, folds, width, seed)
    if isinstance(found, Estimate):
        return found
    (top,), bottom = found
    return of(ratio(top, bottom, seed))


def feature_shift(
    before: Float[Tensor, "N K F"],
    after: Float[Tensor, "N K F"],
    chosen: Float[Tensor, "N F"],
    rejected: Float[Tensor, "N F"],
    ridge: float = 1e-2,
    folds: int = 2,
    width: int | None = None,
    seed: int = 0,
) -> Estimate:
    """How much larger one policy's differences are than another's, as the data's pairs measure.

    E_{y, y'∼π₂}‖Δφ‖²_{Σ⁻¹} / E_{y, y'∼π₁}‖Δφ‖²_{Σ⁻¹}

    The ratio of two `feature_ratio`s without their common denominator, prompts paired: it tells a
    small move of a policy where neither of the two is known well enough. Best with samples of both
    that were drawn with the same random numbers.

    Args:
        before, after: [N, K, F], φ of K ≥ 2 samples a prompt of π₁ and of π₂.
        chosen, rejected: [N, F], of one pair a prompt.
        ridge, folds, width: as in `feature_ratio`.

    Returns:
        not trusted where a `feature_ratio` is not.
    """
    found = _differences([before, after], chosen, rejected, ridge, folds, width, seed)
    if isinstance(found, Estimate):
        return found
    (first, second), _ = found
    if not bool(first.sum() > 0):
        return cannot_tell("all samples of a prompt have the same features")
    return of(ratio(second, first, seed))


def _differences(
    policies: Sequence[Float[Tensor, "N _ F"]],
    chosen: Float[Tensor, "N F"],
    rejected: Float[Tensor, "N F"],
    ridge: float,
    folds: int,
    width: int | None,
    seed: int,
) -> tuple[list[Float[Tensor, " N"]], Float[Tensor, " N"]] | Estimate:
    """Squared norms of the policies' and of the data's differences by prompt; or why there are
    none."""
    assert folds >= 2 and all(p.shape[1] >= 2 for p in policies), "two folds, two samples at least"
    count, features = chosen.shape
    if count < LEAST_PROMPTS:
        return cannot_tell(f"cannot tell with {count} prompts: {LEAST_PROMPTS} are needed")
    train = count - -(-count // folds)
    if width is None:
        width = max(1, min(MOST_FEATURES, train // PAIRS_A_FEATURE))
    kept = min(width, features)
    if train < LEAST_PAIRS_A_FEATURE * kept:
        return cannot_tell(
            f"cannot tell with {train} training pairs for {kept} dimensions: "
            f"{LEAST_PAIRS_A_FEATURE * kept} are needed, or a smaller width"
        )
    inner = [_deviations(p) for p in policies]
    *inner, pairs = compressed([*inner, chosen.double() - rejected.double()], width, seed)
    if not bool((pairs != 0).any()):
        return cannot_tell("the chosen and the rejected responses have the same features")
    fold, tops, bottom = fold_of(count, folds, seed), [], pairs[:, 0]
    for own in inner:
        top, bottom = _crossfitted(own, pairs, fold, ridge)
        tops.append(top)
    if not bool(bottom.sum() > 0):
        return cannot_tell("all pairs but a few have the same features")
    return tops, bottom


def _deviations(policy: Float[Tensor, "N K F"]) -> Float[Tensor, "N K F"]:
    """From the prompt's mean, so scaled that their mean square is that of all pairs' ΔφΔφᵀ, which
    is 2 K / (K - 1) times as large."""
    samples = policy.shape[1]
    inner = policy.double() - policy.double().mean(1, keepdim=True)
    return inner * (2 * samples / (samples - 1)) ** 0.5


def _crossfitted(
    inner: Float[Tensor, "N K d"],
    pairs: Float[Tensor, "N d"],
    fold: Int[Tensor, " N"],
    ridge: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Squared norms of a prompt's two kinds of differences by the other folds' Σ⁻¹."""
    top, bottom = torch.zeros(2, len(pairs), dtype=torch.float64)
    eye = torch.eye(pairs.shape[-1], dtype=torch.float64)
    for held in range(int(fold.max()) + 1):
        own = fold == held
        sigma = pairs[~own].mT @ pairs[~own] / int((~own).sum())
        # a fold without any difference has no scale of its own
        level = sigma.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(sigma + ridge * level * eye))
        top[own] = _norms(inner[own], inverse).mean(-1)
        bottom[own] = _norms(pairs[own], inverse)
    return top, bottom


def _norms(x: Float[Tensor, "*E d"], inverse: Float[Tensor, "d d"]) -> Float[Tensor, "*E"]:
    return ((x @ inverse) * x).sum(-1)
