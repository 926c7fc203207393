"""What the exact experiments are made of: labelled pairs, convex fits, gradient steps, slopes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.numerics import uniform
from preftune.theory.bimodal import discretised_gaussian

CHUNK = 2**16
"""Draws at once and a seed: what is worked on stays in the processor's cache."""


def pair_law(
    probs: Float[Tensor, "... A"], reward: Float[Tensor, "... A"]
) -> Float[Tensor, "... A A"]:
    """Law of (winner, loser) of two independent arms and a Bradley-Terry label.

    P(w, l) = 2 p_w p_l σ(r_w − r_l), and p_w² where both arms are one

    Args:
        probs: [..., A], of each of the two arms, normalised.
        reward: [..., A], in nats of log-odds.

    Returns:
        [..., A, A], sums to 1 over the last two dims.
    """
    lead = reward[..., :, None] - reward[..., None, :]
    return 2 * probs[..., :, None] * probs[..., None, :] * lead.sigmoid()


def draw_pairs(
    keys: Int[Tensor, " S"], law: Float[Tensor, "S A A"], start: int, stop: int
) -> Int[Tensor, "S N"]:
    """Draws start … stop − 1 of each seed's stream, as winner · A + loser.

    A draw is a function of (key, its number): data of 1000 pairs begin as those of 100 do.

    Args:
        keys: [S], of the streams.
        law: [S, A, A], of (winner, loser).
        start: number of the first draw.
        stop: one past the last.

    Returns:
        [S, stop − start].
    """
    cdf = law.flatten(1).cumsum(-1)
    draw = uniform(keys[:, None], torch.arange(start, stop)) * cdf[:, -1:]
    return torch.searchsorted(cdf, draw, right=True).clamp_(max=cdf.shape[-1] - 1)


def count_pairs(
    keys: Int[Tensor, " S"], law: Float[Tensor, "S A A"], sizes: Sequence[int]
) -> Int[Tensor, "S N A A"]:
    """How often each (winner, loser) is among the first of each number of pairs.

    Args:
        keys: [S], of the streams.
        law: [S, A, A], of (winner, loser).
        sizes: N numbers of pairs, ascending; each size's pairs contain the smaller one's.

    Returns:
        [S, N, A, A], counts; entry n sums to sizes[n].
    """
    cells = law[0].numel()
    offset = cells * torch.arange(len(keys))[:, None]
    total, found, done = torch.zeros(len(keys) * cells, dtype=torch.int64), [], 0
    for size in sizes:
        for start in range(done, size, CHUNK):
            drawn = draw_pairs(keys, law, start, min(start + CHUNK, size))
            total = total + torch.bincount((drawn + offset).flatten(), minlength=len(total))
        found.append(total.view_as(law))
        done = size
    return torch.stack(found, 1)


class Fit(NamedTuple):
    """Where a convex fit ended."""

    theta: Tensor
    """[..., D]"""
    gradient: Tensor
    """[...], its norm there, divided by the sum of the weights."""

    def rest(self) -> float:
        """The largest gradient of the batch; a fit that is not at rest is a mistake."""
        largest = float(self.gradient.max())
        assert largest < 1e-9, f"Newton's method stopped at a gradient of {largest:g}"
        return largest


def newton(
    loss: Callable[[Tensor], Tensor],
    design: Float[Tensor, "... P D"],
    weight: Float[Tensor, "... P"],
    ridge: float = 0.0,
    most: int = 200,
) -> Fit:
    """Least Σ_p weight_p loss(design_p · θ) + ridge/2 |θ|², by Newton's method from θ = 0.

    Whole steps: a logistic loss is most curved at 0, and no fit here has needed less. Each problem
    of the batch stops by itself, so that it ends where it would end alone.

    Args:
        loss: elementwise and convex, of pairs' leads; differentiable twice.
        design: [..., P, D], what θ is multiplied by; leading dims broadcast with those of weight.
        weight: [..., P], ≥ 0.
        ridge: of the sum, not of the mean, ≥ 0.
        most: steps.
    """
    theta = weight.new_zeros(*weight.shape[:-1], design.shape[-1])
    active = torch.ones_like(theta[..., :1], dtype=torch.bool)

    def derivatives(at: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient [..., D], and the loss's second derivative by each lead [..., P]."""
        h = (design @ at[..., None])[..., 0].requires_grad_()
        (first,) = torch.autograd.grad(loss(h).sum(), h, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), h)
        gradient = (design.mT @ (weight * first.detach())[..., None])[..., 0] + ridge * at
        return gradient, second

    for _ in range(most):
        gradient, second = derivatives(theta)
        hessian = (design.mT * (weight * second)[..., None, :]) @ design
        hessian = hessian + ridge * torch.eye(theta.shape[-1], dtype=theta.dtype)
        step = -torch.linalg.solve(hessian, gradient[..., None])[..., 0]
        theta = torch.where(active, theta + step, theta)
        size = theta.abs().amax(-1, True) + 1
        active = active & (step.abs().amax(-1, True) > 1e-8 * size)  # the next would be of 1e-16
        if not active.any():
            break
    return Fit(theta, derivatives(theta)[0].norm(dim=-1) / weight.sum(-1))


def descend(
    loss: Callable[[Tensor, int], Tensor],
    features: Float[Tensor, "S A D"],
    watch: Callable[[Tensor], Tensor],
    rate: float,
    steps: int,
) -> Float[Tensor, "T S W"]:
    """Plain gradient descent of π = softmax(φ·θ) from θ = 0.

    Args:
        loss: (log-probs [S, A], number of the step) -> [S].
        features: [S, A, D], φ.
        watch: of log-probs [S, A], what to keep, [S, W].
        rate: of the steps.
        steps: how many.

    Returns:
        [T, S, W], what was watched after 0, 1, … steps.
    """
    theta = features.new_zeros(features.shape[0], features.shape[-1])

    def log_probs(at: Tensor) -> Tensor:
        return (features @ at[..., None])[..., 0].log_softmax(-1)

    found = []
    for step in range(steps):
        theta = theta.requires_grad_()
        log_p = log_probs(theta)
        found.append(watch(log_p.detach()))
        (gradient,) = torch.autograd.grad(loss(log_p, step).sum(), theta)
        theta = theta.detach() - rate * gradient
    return torch.stack([*found, watch(log_probs(theta))])


def restricted_optimum(
    log_ref: Float[Tensor, "S A"],
    features: Float[Tensor, "S A D"],
    reward: Float[Tensor, "S A"],
    beta: float,
) -> tuple[Float[Tensor, "S A"], float]:
    """A policy π ∝ π_ref exp(φ·θ) of locally best regularised value, by natural gradient.

    θ ← ½ θ + ½ Cov_π(φ)⁻¹ Cov_π(φ, r) / β, at rest where the gradient Cov_π(φ, r − β φ·θ) is 0

    Args:
        log_ref: [S, A], nats, normalised.
        features: [S, A, D], φ.
        reward: [S, A].
        beta: β, reward units a nat, > 0.

    Returns:
        [S, A], nats; and how far the last step moved θ at most, relative to its size.
    """
    theta = moved = features.new_zeros(features.shape[0], features.shape[-1])
    one = torch.eye(features.shape[-1], dtype=features.dtype)
    for _ in range(500):
        p = (log_ref + (features @ theta[..., None])[..., 0]).softmax(-1)[..., None]
        centred = features - (p * features).sum(-2, keepdim=True)
        inner, cross = centred.mT @ (p * centred), centred.mT @ (p * reward[..., None])
        # A policy that is nearly one arm has next to no covariance.
        inner = inner + 1e-14 * inner.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] * one
        moved = (torch.linalg.solve(inner, cross)[..., 0] / beta - theta) / 2
        theta = theta + moved
    log_p = (log_ref + (features @ theta[..., None])[..., 0]).log_softmax(-1)
    return log_p, float((moved.norm(dim=-1) / (1 + theta.norm(dim=-1))).max())


def forward_fit(
    log_target: Float[Tensor, "S A"], sd_from: float, sd_to: float
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """The discretised Gaussian of least KL(target ‖ p), by two nested bisections.

    The family is exponential in (a, a²), so that the best member has the target's first two
    moments, as sums over the arms: not the same as taking these for its parameters, because the
    arms end. For each sd the mean is found, and the sd whose second moment fits, or the bound.

    Args:
        log_target: [S, A], nats, normalised.
        sd_from: least sd, arms, > 0.
        sd_to: largest.

    Returns:
        Two of [S], arms: the parameters (mean, sd).
    """
    arms = log_target.shape[-1]
    arm = torch.arange(arms, dtype=log_target.dtype)
    powers = torch.stack([arm, arm**2], -1)
    wanted = log_target.exp() @ powers

    def moments(mean: Tensor, log_sd: Tensor) -> Tensor:
        return discretised_gaussian(mean, log_sd.exp(), arms).exp() @ powers

    def mean_at(log_sd: Tensor) -> Tensor:
        # At a wide sd the mean of a lopsided target may lie far outside the arms.
        ends = (torch.full_like(log_sd, -20.0 * arms), torch.full_like(log_sd, 20.0 * arms))
        return _bisect(lambda mean: moments(mean, log_sd)[:, 0] > wanted[:, 0], *ends)

    bounds = torch.tensor([sd_from, sd_to], dtype=arm.dtype).log()
    low, high = (bound.expand(len(log_target)) for bound in bounds)
    log_sd = _bisect(lambda at: moments(mean_at(at), at)[:, 1] > wanted[:, 1], low, high)
    return mean_at(log_sd), log_sd.exp()


def _bisect(too_high: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where a monotone condition turns true, between low and high, to the last digits."""
    for _ in range(55):
        middle = (low + high) / 2
        above = too_high(middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def steps_to_half(
    step: Callable[..., Tensor],
    log_ref: Float[Tensor, " A"],
    log_target: Float[Tensor, "C A"],
    near: Float[Tensor, "C A"],
    rate: float,
    most: int,
) -> tuple[Float[Tensor, " C"], Float[Tensor, "T C"]]:
    """Gradient steps until a policy has half of each target's mass near its peak.

    Args:
        step: (log_p, log_target, rate) -> change of the logits, of `theory.dynamics`.
        log_ref: [A], nats, normalised, where each run starts.
        log_target: [C, A], nats, normalised, one a run.
        near: [C, A], 1 at the arms near the target's peak, else 0.
        rate: of the steps.
        most: steps; what is not reached by then counts as reached with the last.

    Returns:
        [C], steps; and [T, C], the mass near the peak after 0, 1, … steps.
    """
    log_p = log_ref.expand_as(log_target)
    half = (log_target.exp() * near).sum(-1) / 2
    mass = [(log_p.exp() * near).sum(-1)]
    reached = torch.full_like(half, most)
    for t in range(1, most + 1):
        log_p = (log_p + step(log_p, log_target, rate)).log_softmax(-1)
        mass.append((log_p.exp() * near).sum(-1))
        reached = torch.where(mass[-1] >= half, reached.clamp(max=t), reached)
        if (mass[-1] >= half).all():
            break
    return reached, torch.stack(mass)


def sd_of(log_p: Float[Tensor, "... A"]) -> Float[Tensor, "..."]:
    """Standard deviation over the arms, in arms, of distributions [..., A] in nats."""
    arm = torch.arange(log_p.shape[-1], dtype=log_p.dtype)
    mean = (log_p.exp() * arm).sum(-1, keepdim=True)
    return (log_p.exp() * (arm - mean).square()).sum(-1).sqrt()


def slope(sizes: Sequence[float], values: Float[Tensor, "S E"]) -> Float[Tensor, " S"]:
    """Least-squares slope of the log of each seed's values on the log of the sizes."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x = x - x.mean()
    return (values.log() * x).sum(-1) / x.square().sum()


def single(value: float) -> dict[str, Tensor]:
    """The value of a claim that no seed enters."""
    return {"": torch.tensor([value], dtype=torch.float64)}
