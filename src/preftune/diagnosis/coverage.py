"""What the page draws of coverage: of a policy by the reference, of its features by the pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.estimators.features import (
    LEAST_PROMPTS,
    MOST_FEATURES,
    PAIRS_A_FEATURE,
    compressed,
    fold_of,
)  # fmt: skip


def optimum_coverage(
    reward: Float[Tensor, "N m"], beta: float, levels: Sequence[float]
) -> list[float]:
    """Share of the optimum where the reference is N times thinner, from the reference's samples.

    Cov_N = E_x Σ_j w_j 1[m w_j ≥ N],  w_j = e^{r_j/β} / Σ_i e^{r_i/β}

    m w_j stands for π*/π_ref, so that nothing is seen beyond N = m.

    Args:
        beta: β, reward units a nat, > 0, at which the KL can be told (`tilt.target_tilt`).
        levels: N, ≥ 1.
    """
    w = (reward.double() / beta).softmax(-1)
    # equal rewards have m w = 1 up to rounding
    ratio = w * reward.shape[-1] * (1 + 1e-9)
    return [float((w * (ratio >= n)).sum(-1).mean()) for n in levels]


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Mean squared differences along the directions of the pairs, the widest first."""

    own: Float[Tensor, " d"]
    """Between two answers of the policy to a prompt."""
    pairs: Float[Tensor, " d"]
    """Between the chosen and the rejected, of pairs that the directions were not made of."""


def by_direction(
    policy: Float[Tensor, "N K F"],
    chosen: Float[Tensor, "N F"],
    rejected: Float[Tensor, "N F"],
    seed: int = 0,
) -> Directions | None:
    """What `feature_ratio` sums up, direction by direction.

    Directions are the eigenvectors of half of the pairs' differences; the other half and the
    policy's own differences are measured along them, and the two halves averaged by rank. The
    features, their scale and the folds are those of `feature_ratio`.

    Args:
        policy: [N, K, F], φ of K ≥ 2 answers a prompt.
        chosen, rejected: [N, F].

    Returns:
        None with under 20 prompts, or where the pairs do not differ.
    """
    count, answers = policy.shape[:2]
    if count < LEAST_PROMPTS or answers < 2:
        return None
    inner = policy.double() - policy.double().mean(1, keepdim=True)
    inner = inner * (2 * answers / (answers - 1)) ** 0.5
    width = max(1, min(MOST_FEATURES, count // 2 // PAIRS_A_FEATURE))
    inner, pairs = compressed([inner, chosen.double() - rejected.double()], width, seed)
    if not bool((pairs != 0).any()):
        return None
    fold = fold_of(count, 2, seed)
    own, data = torch.zeros(2, pairs.shape[-1], dtype=torch.float64)
    for held in (0, 1):
        inside, outside = pairs[fold != held], fold == held
        vectors = torch.linalg.eigh(inside.mT @ inside).eigenvectors.flip(-1)
        own += (inner[outside] @ vectors).square().mean((0, 1)) / 2
        data += (pairs[outside] @ vectors).square().mean(0) / 2
    return Directions(own=own, pairs=data)
