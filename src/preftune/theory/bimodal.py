"""One mode fitted to two: forward KL covers both, reverse KL takes the heavier."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.theory.closed_form import kl


def discretised_gaussian(
    mean: Float[Tensor, "*F"], sd: Float[Tensor, "*F"], bins: int = 100
) -> Float[Tensor, "*F {bins}"]:
    """Log-probs of a Gaussian density taken at 0, …, bins − 1 and normalised there.

    log p(k) = −(k − mean)² / (2 sd²) + const

    Args:
        mean: [*F], in bins.
        sd: [*F], in bins, > 0.
        bins: number of arms.

    Returns:
        [*F, bins], nats, normalised over the last dim.
    """
    arm = torch.arange(bins, dtype=mean.dtype, device=mean.device)
    return torch.log_softmax(-0.5 * ((arm - mean[..., None]) / sd[..., None]) ** 2, -1)


def mixture(log_parts: Float[Tensor, "M A"], weight: Float[Tensor, " M"]) -> Float[Tensor, " A"]:
    """Log-probs of a mixture.

    p = Σ_m w_m p_m / Σ_m w_m

    Args:
        log_parts: [M, A], nats, each normalised.
        weight: [M], ≥ 0, normalised or not.

    Returns:
        [A], nats, normalised.
    """
    return torch.logsumexp(log_parts + (weight / weight.sum()).log()[:, None], 0)


def two_modes(bins: int = 100) -> Float[Tensor, " {bins}"]:
    """Target with modes at 25 and 75 of sd 5, weighted 1 : 0.8, in float64.

    A stand-in: the set-up of the paper's figure could not be recovered.

    Paper: Tajwar et al. 2024, arXiv 2404.14367, the bimodal illustration of section 6.

    Args:
        bins: number of arms.

    Returns:
        [bins], nats, normalised.
    """
    means = torch.tensor([25.0, 75.0], dtype=torch.float64)
    parts = discretised_gaussian(means, torch.full_like(means, 5.0), bins)
    return mixture(parts, torch.tensor([1.0, 0.8], dtype=torch.float64))


def unimodal_grid(
    bins: int = 100, sd_from: int = 3, sd_to: int = 40
) -> tuple[Float[Tensor, "F {bins}"], Int[Tensor, "F 2"]]:
    """Every discretised Gaussian of mean 0, …, bins − 1 and whole sd in [sd_from, sd_to].

    Args:
        bins: number of arms.
        sd_from: the least sd, in bins, ≥ 1.
        sd_to: the largest.

    Returns:
        [F, bins], nats, float64; and [F, 2], the (mean, sd) of each.
    """
    grid = torch.cartesian_prod(torch.arange(bins), torch.arange(sd_from, sd_to + 1))
    mean, sd = grid.to(torch.float64).unbind(-1)
    return discretised_gaussian(mean, sd, bins), grid


def fits(
    log_target: Float[Tensor, " A"], log_family: Float[Tensor, "F A"]
) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
    """Both divergences between a target q and every member p of a family.

    forward: KL(q ‖ p);  reverse: KL(p ‖ q)

    The argmin of each is the exact projection on the family.

    Args:
        log_target: [A], nats, normalised.
        log_family: [F, A], nats, normalised.

    Returns:
        Two of [F], nats, ≥ 0: forward, reverse.
    """
    target = log_target.expand_as(log_family)
    return kl(target, log_family), kl(log_family, target)
