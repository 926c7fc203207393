"""How well a reference covers other policies, and what coverage bounds."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.theory.closed_form import kl


def global_coverage(log_ref: Float[Tensor, "... A"]) -> Float[Tensor, "..."]:
    """Smallest C with max_y π(y)/π_ref(y) ≤ C for every policy.

    C_glo = sup_π max_y π(y) / π_ref(y) = 1 / min_y π_ref(y)

    Paper: Song et al. 2024, arXiv 2406.01462, assumption 4.1.

    Args:
        log_ref: [..., A], nats, normalised; −inf allowed.

    Returns:
        [...], ≥ A; inf where an arm has no mass.
    """
    return (-log_ref.min(-1).values).exp()


def max_ratio(
    log_p: Float[Tensor, "... A"], log_ref: Float[Tensor, "... A"]
) -> Float[Tensor, "..."]:
    """Largest density ratio; for p = π*, single-policy coverage C_π*.

    C_p = max_{y: p(y) > 0} p(y) / π_ref(y)

    Paper: Song et al. 2024, arXiv 2406.01462, section 4.

    Args:
        log_p: [..., A], nats, normalised; −inf allowed.
        log_ref: [..., A], nats, normalised; −inf allowed.

    Returns:
        [...], ≥ 1; inf where p has mass and the reference none.
    """
    return _log_ratio(log_p, log_ref).max(-1).values.exp()


def chi2_concentrability(
    log_p: Float[Tensor, "... A"], log_ref: Float[Tensor, "... A"]
) -> Float[Tensor, "..."]:
    """Expected density ratio under the policy.

    C = E_{y∼p}[p(y) / π_ref(y)] = 1 + χ²(p ‖ π_ref) = e^{D₂(p ‖ π_ref)}, in [e^KL, max ratio]

    Paper: Huang et al. 2024, arXiv 2407.13399 (χPO), single-policy concentrability.

    Args:
        log_p: [..., A], nats, normalised; −inf allowed.
        log_ref: [..., A], nats, normalised; −inf allowed.

    Returns:
        [...], ≥ 1; inf where p has mass and the reference none.
    """
    return torch.logsumexp(log_p + _log_ratio(log_p, log_ref), -1).exp()


def binary_kl(q: Float[Tensor, "*E"], p: Float[Tensor, "*E"]) -> Float[Tensor, "*E"]:
    """Divergence between two biased coins.

    kl(q ‖ p) = q log(q / p) + (1 − q) log((1 − q) / (1 − p))

    Args:
        q: [*E], in [0, 1].
        p: [*E], in [0, 1].

    Returns:
        [*E], nats, ≥ 0 up to rounding; inf where q has mass and p none.
    """
    inside = torch.xlogy(q, q / p).where(q > 0, 0.0)
    return inside + torch.special.xlog1py(1 - q, -q) - torch.special.xlog1py(1 - q, -p)


def best_event_mass(p: Float[Tensor, "*E"], eps: Float[Tensor, "*E"]) -> Float[Tensor, "*E"]:
    """Largest mass that a policy within KL ≤ ε of the reference puts on an event of mass p.

    q = max{q ≥ p: kl(q ‖ p) ≤ ε};  q = 1 where ε ≥ log(1 / p), and otherwise
    ε / log(1 / p) ≤ q ≤ (ε + log 2) / log(1 / p)

    Exact: for a given mass on the event and off it, the KL is least where the policy is
    proportional to the reference on each side, and is then kl(q ‖ p). By bisection in float64.
    q / p → ∞ as p → 0 at any ε > 0, so the local coverage of a softmax is finite but vacuous.

    Paper: derived, for assumption 4.2 of Song et al. 2024, arXiv 2406.01462.

    Args:
        p: [*E], in [0, 1].
        eps: [*E], ε, nats, ≥ 0. For E_x KL ≤ ε, the whole budget on prompt x is ε / ρ(x).

    Returns:
        [*E], in [p, 1]; 0 where p is 0.
    """
    p, eps = p.to(torch.float64), eps.to(torch.float64)
    low, high = p.clone(), torch.ones_like(p)
    # 64 halvings reach the last digit; the answer is the feasible end.
    for _ in range(64):
        middle = (low + high) / 2
        fits = binary_kl(middle, p) <= eps
        low, high = middle.where(fits, low), high.where(fits, middle)
    return torch.ones_like(p).where((-p.log() <= eps) & (p > 0), low).where(p > 0, 0.0)


def local_coverage(
    log_ref: Float[Tensor, "... A"], eps: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Largest density ratio over all policies within KL ≤ ε of the reference.

    C_ε = max_{π: KL(π ‖ π_ref) ≤ ε} max_y π(y)/π_ref(y) = max_{y: π_ref(y) > 0} q_y / π_ref(y),
    kl(q_y ‖ π_ref(y)) = ε

    Exact; the arm of least positive mass attains it, so that C_ε ≤ 1 / min_supp π_ref < ∞ also
    where the global constant is infinite.

    Paper: Song et al. 2024, arXiv 2406.01462, assumption 4.2; the reduction is derived.

    Args:
        log_ref: [..., A], nats, normalised; −inf allowed.
        eps: [...], ε, nats, ≥ 0.

    Returns:
        [...], ≥ 1.
    """
    ref = log_ref.exp()
    mass = best_event_mass(ref, eps[..., None].expand_as(ref))
    return (mass / ref).where(ref > 0, 1.0).max(-1).values


def coverage_profile(
    log_target: Float[Tensor, "... A"], log_p: Float[Tensor, "... A"], level: float | Tensor
) -> Float[Tensor, "..."]:
    """Share of the target's mass that a policy covers N times too thinly.

    Cov_N(p) = P_{y∼target}[target(y) / p(y) ≥ N] ≤ (KL(target ‖ p) + 1/e) / log N

    Paper: arXiv 2510.15020; the same profile with (π, π_ref) reads P_{y∼π}[π/π_ref ≥ N].

    Args:
        log_target: [..., A], nats, normalised; −inf allowed.
        log_p: [..., A], nats, normalised; −inf allowed.
        level: N, > 0; a tensor broadcasts against [..., 1].

    Returns:
        [...], in [0, 1].
    """
    threshold = torch.as_tensor(level, dtype=log_p.dtype, device=log_p.device).log()
    thin = _log_ratio(log_target, log_p) >= threshold
    return log_target.exp().where(thin, 0.0).sum(-1)


def profile_bound(divergence: Float[Tensor, "..."], level: float) -> Float[Tensor, "..."]:
    """Bound of the coverage profile by the divergence alone.

    P_{y∼p}[p(y) / ref(y) ≥ N] ≤ (KL(p ‖ ref) + 1/e) / log N

    Markov on the positive part of the log-ratio, whose negative part is at most 1/e in mean.

    Derived.

    Args:
        divergence: [...], KL(p ‖ ref), nats.
        level: N, > 1.

    Returns:
        [...], ≥ 0; above 1 it says nothing.
    """
    return (divergence + math.exp(-1)) / math.log(level)


def tilt_kl_bound(reward_range: Float[Tensor, "..."], beta: float | Tensor) -> Float[Tensor, "..."]:
    """Bound of KL(π ‖ π_ref) for the KL-optimal policy of any reward of a given range.

    KL ≤ min(R / β, R² / (8 β²)),  R = max r − min r;  also max ratio ≤ e^{R / β}

    The second part is Hoeffding's lemma: KL = ∫₀¹ s f''(s) ds with f''(s) ≤ (R / β)² / 4, f the
    log-moment function of r / β.

    Paper: Song et al. 2024, arXiv 2406.01462, has 2 R' / β for |r| ≤ R'; this one is derived.

    Args:
        reward_range: [...], R, reward units, ≥ 0.
        beta: β, reward units a nat, > 0.

    Returns:
        [...], nats.
    """
    scaled = reward_range / beta
    return torch.minimum(scaled, scaled**2 / 8)


def regularised_value(
    log_p: Float[Tensor, "... A"],
    log_ref: Float[Tensor, "... A"],
    reward: Float[Tensor, "... A"],
    beta: float | Tensor,
) -> Float[Tensor, "..."]:
    """Reward less the KL penalty.

    J(p) = E_p[r] − β KL(p ‖ π_ref)

    Args:
        log_p: [..., A], nats, normalised; −inf allowed.
        log_ref: [..., A], nats, normalised; −inf allowed.
        reward: [..., A].
        beta: β, reward units a nat, > 0.

    Returns:
        [...], reward units; −inf where p has mass and the reference none.
    """
    return (log_p.exp() * reward).sum(-1) - beta * kl(log_p, log_ref)


def optimality_gap_bound(
    log_star: Float[Tensor, "... A"],
    log_hat: Float[Tensor, "... A"],
    reward: Float[Tensor, "... A"],
    estimate: Float[Tensor, "... A"],
) -> Float[Tensor, "..."]:
    """What optimising an estimated reward can lose against a comparator.

    J(π*) − J(π̂) ≤ E_{y∼π*, y'∼π̂}[Δr − Δr̂],  Δr = r(y) − r(y'),  for π̂ the optimum of r̂

    The two differ by exactly β KL(π* ‖ π̂), so that it holds for any comparator.

    Paper: derived, for theorem 4.2 of Song et al. 2024, arXiv 2406.01462.

    Args:
        log_star: [..., A], nats, normalised, of the comparator.
        log_hat: [..., A], nats, normalised, of the policy trained on r̂.
        reward: [..., A], r.
        estimate: [..., A], r̂.

    Returns:
        [...], reward units.
    """
    return ((log_star.exp() - log_hat.exp()) * (reward - estimate)).sum(-1)


def pair_error(
    log_mu: Float[Tensor, "... A"],
    reward: Float[Tensor, "... A"],
    estimate: Float[Tensor, "... A"],
) -> Float[Tensor, "..."]:
    """In-distribution error of a reward's differences, what Bradley–Terry data can measure.

    ε = E_{y, y'∼μ}[(Δr − Δr̂)²] = 2 Var_μ(r − r̂)

    With it the gap above is at most √((1 + χ²(π* ‖ μ)) (1 + χ²(π̂ ‖ μ)) ε), and so at most C √ε
    with C the larger max ratio of the two.

    Paper: derived, for assumption 4.3 of Song et al. 2024, arXiv 2406.01462.

    Args:
        log_mu: [..., A], nats, normalised, of either response of a pair.
        reward: [..., A], r.
        estimate: [..., A], r̂.

    Returns:
        [...], squared reward units, ≥ 0.
    """
    mu, error = log_mu.exp(), reward - estimate
    centred = error - (mu * error).sum(-1, keepdim=True)
    return 2 * (mu * centred**2).sum(-1)


def relative_condition_number(
    log_p: Float[Tensor, "... A"],
    log_mu: Float[Tensor, "... A"],
    features: Float[Tensor, "... A D"],
) -> Float[Tensor, "..."]:
    """Coverage by a linear reward class: how much a policy magnifies its pairwise error.

    C_F(p) = sup_w E_{p⊗p}[(w·Δφ)²] / E_{μ⊗μ}[(w·Δφ)²] = λ_max(Σ_μ^{−1/2} Σ_p Σ_μ^{−1/2}),
    Σ = Cov(φ); directions that neither moves are left out

    Finite wherever the data's differences span those of the policy, even if μ misses arms.

    Paper: Song et al. 2024, arXiv 2406.01462, section 6 (function approximation).

    Args:
        log_p: [..., A], nats, normalised, of the policy.
        log_mu: [..., A], nats, normalised, of the data.
        features: [..., A, D], φ.

    Returns:
        [...], ≥ 0; inf where the policy moves in a direction in which the data do not.
    """
    value, basis = torch.linalg.eigh(_covariance(log_mu, features))
    spread = basis.mT @ _covariance(log_p, features) @ basis
    tiny = 1e-12 * torch.maximum(
        value[..., -1:], spread.diagonal(dim1=-2, dim2=-1).max(-1, keepdim=True).values
    )
    seen = value > tiny
    outside = (spread.diagonal(dim1=-2, dim2=-1) > tiny) & ~seen
    scale = value.where(seen, 1.0).rsqrt().where(seen, 0.0)
    inner = scale[..., :, None] * spread * scale[..., None, :]
    return torch.linalg.eigvalsh(inner)[..., -1].where(~outside.any(-1), torch.inf)


def _covariance(
    log_p: Float[Tensor, "... A"], features: Float[Tensor, "... A D"]
) -> Float[Tensor, "... D D"]:
    p = log_p.exp()[..., None]
    centred = features - (p * features).sum(-2, keepdim=True)
    return centred.mT @ (p * centred)


def _log_ratio(
    log_p: Float[Tensor, "... A"], log_ref: Float[Tensor, "... A"]
) -> Float[Tensor, "... A"]:
    """log p − log ref, and −inf where p has no mass, whatever the reference has."""
    has_mass = log_p > -torch.inf
    return (log_p.where(has_mass, 0.0) - log_ref.where(has_mass, 0.0)).where(has_mass, -torch.inf)
