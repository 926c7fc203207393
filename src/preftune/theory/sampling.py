"""Which pairs a sampler draws: the joint law of the mixed sampler for online DPO."""

import torch
from jaxtyping import Float
from torch import Tensor


def mix_joint_law(score: Float[Tensor, "... A"]) -> Float[Tensor, "... A A"]:
    """Law of unordered-in-effect pairs that the mixed sampler aims at, as a joint over (y, y').

    p(y, y') ∝ 1 / (σ(Δ) σ(−Δ)) = 2 + e^Δ + e^(−Δ),  Δ = s(y) − s(y')

    Paper: Shi et al. 2024, arXiv 2409.19605 (Mix-R with s the reward, Mix-P with s = β log-ratio).

    Args:
        score: [..., A], nats.

    Returns:
        [..., A, A], symmetric, sums to 1 over the last two dims.
    """
    delta = score[..., :, None] - score[..., None, :]
    weight = -torch.nn.functional.logsigmoid(delta) - torch.nn.functional.logsigmoid(-delta)
    return weight.flatten(-2).softmax(-1).unflatten(-1, delta.shape[-2:])


def mix_uniform_share(score: Float[Tensor, "... A"]) -> Float[Tensor, "..."]:
    """Share of uniform pairs with which the two-part sampler has exactly the mixed law.

    w = A² / (A² + S₊ S₋),  S± = Σ_y e^(±s(y)),
    p = w · uniform ⊗ uniform + (1 − w) · sym(softmax(s) ⊗ softmax(−s))

    S₊ S₋ ≥ A² by Cauchy–Schwarz, so w ≤ ½, with equality only where s is constant: a sampler that
    flips a fair coin between its two parts does not draw the law of `mix_joint_law`.

    Paper: Shi et al. 2024, arXiv 2409.19605, the mixed sampler; share derived.

    Args:
        score: [..., A], nats.

    Returns:
        [...], in (0, ½].
    """
    arms = torch.as_tensor(score.shape[-1], dtype=score.dtype).log()
    tilted = torch.logsumexp(score, -1) + torch.logsumexp(-score, -1)
    return torch.sigmoid(2 * arms - tilted)


def two_part_law(
    score: Float[Tensor, "... A"], uniform_share: Float[Tensor, "..."] | float
) -> Float[Tensor, "... A A"]:
    """Symmetrised law of the two-part sampler at any share of uniform pairs.

    p = w / A² + (1 − w) ½ (a bᵀ + b aᵀ),  a = softmax(s), b = softmax(−s)

    Paper: Shi et al. 2024, arXiv 2409.19605.

    Args:
        score: [..., A], nats.
        uniform_share: [...] or a number, w in [0, 1].

    Returns:
        [..., A, A], symmetric, sums to 1 over the last two dims.
    """
    w = torch.as_tensor(uniform_share, dtype=score.dtype, device=score.device)[..., None, None]
    up, down = score.softmax(-1), (-score).softmax(-1)
    outer = up[..., :, None] * down[..., None, :]
    return w / score.shape[-1] ** 2 + (1 - w) * (outer + outer.transpose(-1, -2)) / 2
