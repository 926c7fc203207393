"""Where DPO fails and what HyPO's penalty picks: small constructions that can be solved exactly."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.theory.closed_form import kl


class UnseenArm(NamedTuple):
    """Three arms, of which the data never show the last."""

    log_p: Float[Tensor, " 3"]  # nats, the policy that DPO may end at
    log_ref: Float[Tensor, " 3"]  # nats, the reference
    log_data: Float[Tensor, " 3"]  # nats, the distribution of the data; −inf on the last
    reward: Float[Tensor, " 2"]  # of the arms seen, shifted so that E_data[exp(r / β)] = 1


def unseen_arm(
    log_data: Float[Tensor, " 2"],
    reward: Float[Tensor, " 2"],
    eps: float,
    beta: float,
    unseen: float = 0.0,
) -> UnseenArm:
    """A policy with a small in-distribution error and most of its mass on an arm never seen.

    β log(π(y) / data(y)) = r(y) − √ε on the arms seen, with r shifted so that E_data[e^{r/β}] = 1,
    and so π(3) = 1 − e^{−√ε/β}; the reference is ((1 − η) data, η).

    E_data[(β log(π/data) − r)²] = ε, whatever β, while KL(π ‖ π_ref) = ∞ at η = 0, and J = −∞.
    With η > 0, KL = (1 − m) log((1 − m)/(1 − η)) + m log(m/η) + (1 − m) KL(tilt ‖ data), m = π(3).
    The error of reward differences, which the data can measure, is 0.

    Paper: Song et al. 2024, arXiv 2406.01462, proposition 4.1 (construction from recall).

    Args:
        log_data: [2], nats, normalised, finite.
        reward: [2], of the arms seen.
        eps: ε, squared reward units, ≥ 0.
        beta: β, reward units a nat, > 0.
        unseen: η, the reference's mass on arm 3, in [0, 1).
    """
    shifted = reward - beta * torch.logsumexp(log_data + reward / beta, -1)
    drop = torch.as_tensor(eps, dtype=log_data.dtype).sqrt() / beta
    mass = torch.as_tensor(unseen, dtype=log_data.dtype)
    last = torch.stack([torch.log(-torch.expm1(-drop)), mass.log(), torch.zeros_like(mass).log()])
    seen = log_data + shifted / beta - drop
    parts = torch.stack([seen, log_data + torch.log1p(-mass), log_data])
    log_p, log_ref, log_all = torch.cat([parts, last[:, None]], -1).unbind(0)
    return UnseenArm(log_p, log_ref, log_all, shifted)


def in_distribution_error(
    log_p: Float[Tensor, "... A"],
    log_data: Float[Tensor, "... A"],
    reward: Float[Tensor, "... A"],
    beta: float,
) -> Float[Tensor, "..."]:
    """Squared error of the implicit reward on the data's own distribution.

    E_{y∼data}[(β log(π(y) / data(y)) − r(y))²]

    Paper: Song et al. 2024, arXiv 2406.01462, assumption 4.3, at Z = 1.

    Args:
        log_p: [..., A], nats, normalised.
        log_data: [..., A], nats, normalised, finite.
        reward: [..., A], shifted so that E_data[exp(r / β)] = 1.
        beta: β, reward units a nat, > 0.

    Returns:
        [...], squared reward units.
    """
    return (log_data.exp() * (beta * (log_p - log_data) - reward) ** 2).sum(-1)


def hypo_limit_odds(
    log_seen: Float[Tensor, "... A"], log_ref_seen: Float[Tensor, "... A"]
) -> Float[Tensor, "..."]:
    """Odds of the arms never seen in HyPO's limit λ → 0⁺; DPO alone leaves them free in [0, ∞).

    m / (1 − m) = p₀ e^K,  K = Σ_seen π̃ log(π̃ / π_ref),  p₀ = 1 − Σ_seen π_ref

    m minimises KL((1 − m) π̃ + m π_ref(· | unseen) ‖ π_ref), which is then −log(p₀ + e^{−K}).
    π_ref sums to 1 − p₀ in K: with the reference renormalised on the arms seen it is
    m / (1 − m) = p₀ / (1 − p₀) · e^{KL(π̃ ‖ π_ref(· | seen))}.

    Paper: derived, for Song et al. 2024, arXiv 2406.01462, algorithm 1 (HyPO).

    Args:
        log_seen: [..., A], nats, normalised, π̃, the minimiser of the offline loss on arms seen.
        log_ref_seen: [..., A], nats, of the reference on those arms; its mass is at most 1.

    Returns:
        [...], ≥ 0.
    """
    inside = torch.logsumexp(log_ref_seen, -1)
    return -torch.expm1(inside) * kl(log_seen, log_ref_seen).exp()


class Misspecified(NamedTuple):
    """A one-parameter class over three arms, and data that make DPO leave it worse than it began.

    π_θ ∝ [e^θ, e^{−θ}, 1], uniform reference (θ = 0), r = [1, 2, 0]
    """

    pairs: Int[Tensor, "3 2"]  # indices of two arms, as (1, 2), (1, 3), (2, 3) from 0
    weight: Float[Tensor, " 3"]  # share of the comparisons on each
    reward: Float[Tensor, " 3"]
    direction: Float[Tensor, " 3"]  # logits of π_θ over θ


def auxdpo_example(weight_12: float, weight_13: float, weight_23: float) -> Misspecified:
    """Global coverage (C_glo = 3) without a guarantee, because no π_θ has the true reward.

    DPO's minimiser has θ > 0, so that it prefers arm 1, and E[r] < 1 = E_ref[r], if and only if
    w₁₃ t₁ > 2 w₁₂ t₁ + w₂₃ t₂,  t_k = σ(k) − ½: comparisons of arms 1 and 3 dominate.

    Paper: Gopalan et al. 2025, arXiv 2510.20413 (AuxDPO), from notes; condition derived.

    Args:
        weight_12: w₁₂, comparisons of arms 1 and 2, ≥ 0, in any unit.
        weight_13: w₁₃, of arms 1 and 3, ≥ 0.
        weight_23: w₂₃, of arms 2 and 3, ≥ 0.
    """
    weight = torch.tensor([weight_12, weight_13, weight_23], dtype=torch.float64)
    return Misspecified(
        pairs=torch.tensor([[0, 1], [0, 2], [1, 2]]),
        weight=weight / weight.sum(),
        reward=torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64),
        direction=torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64),
    )


def dpo_population_slope(
    example: Misspecified, theta: Float[Tensor, "*E"], beta: float
) -> Float[Tensor, "*E"]:
    """Derivative by θ of DPO's loss on infinitely many Bradley–Terry labels.

    L'(θ) = β Σ_w w (σ(β θ Δd) − σ(Δr)) Δd,  increasing in θ

    Args:
        example: pairs, their weights, rewards, and logits over θ.
        theta: [*E], nats.
        beta: β of the implicit reward, > 0.

    Returns:
        [*E], nats a nat.
    """
    first, second = example.pairs.unbind(-1)
    gap = example.direction[first] - example.direction[second]
    truth = (example.reward[first] - example.reward[second]).sigmoid()
    miss = (beta * theta[..., None] * gap).sigmoid() - truth
    return beta * (example.weight * miss * gap).sum(-1)


def dpo_population_optimum(example: Misspecified, beta: float) -> Float[Tensor, ""]:
    """θ at which DPO's population loss is least, by bisection on its slope.

    θ* : L'(θ*) = 0, |θ*| ≤ 2 / β (no pair asks for more than its own Δr / Δd)

    Args:
        example: with a positive weight in all.
        beta: β, > 0.

    Returns:
        Scalar, nats.
    """
    high = torch.full((), 4.0 / beta, dtype=torch.float64)
    low = -high
    for _ in range(80):
        middle = (low + high) / 2
        rising = dpo_population_slope(example, middle, beta) > 0
        low, high = low.where(rising, middle), middle.where(rising, high)
    return (low + high) / 2


def expected_reward(example: Misspecified, theta: Float[Tensor, "*E"]) -> Float[Tensor, "*E"]:
    """Mean true reward of π_θ.

    E[r] = Σ_y π_θ(y) r(y); 1 at θ = 0, → 2 as θ → −∞

    Args:
        example: rewards and logits over θ.
        theta: [*E], nats.

    Returns:
        [*E], reward units.
    """
    return ((theta[..., None] * example.direction).softmax(-1) * example.reward).sum(-1)
