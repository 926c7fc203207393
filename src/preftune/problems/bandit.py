"""The bandits of arXiv 2404.14367: one hundred arms, a skewed reference, peaks near and far.

Everything here is exact: the reference is a closed form in place of the authors' histogram of
10,000 draws, and expected rewards, divergences and entropies are sums over the arms.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.theory.closed_form import kl

ARMS = 100
LOCATION, SCALE = -0.7, 0.4


def reference_probs(
    arms: int = ARMS, location: float = LOCATION, scale: float = SCALE
) -> Float[Tensor, " V"]:
    """Mass of tanh(Cauchy(location, scale)) in equal bins of [-1, 1].

    P(k) = F(atanh e_{k+1}) - F(atanh e_k), F the Cauchy distribution function, e the bins' edges.
    The tails of the Cauchy stand as spikes in the outermost bins.
    """
    edges = torch.linspace(-1, 1, arms + 1, dtype=torch.float64)
    below = 0.5 + torch.atan((torch.atanh(edges) - location) / scale) / math.pi
    return below.diff()  # atanh(-1) and atanh(1) are infinite, where F is 0 and 1


@dataclass(frozen=True)
class Peak:
    """r(a) = exp(-((a - centre) / width)^2), highest at one arm, between 0 and 1."""

    centre: float
    width: float

    def __call__(self, arms: int = ARMS) -> Float[Tensor, " V"]:
        """The reward of each arm."""
        a = torch.arange(arms, dtype=torch.float64)
        return torch.exp(-(((a - self.centre) / self.width) ** 2))


@dataclass(frozen=True)
class Peaks:
    """Several equal modes: the largest of several peaks at each arm."""

    peaks: tuple[Peak, ...]

    def __call__(self, arms: int = ARMS) -> Float[Tensor, " V"]:
        """The reward of each arm."""
        return torch.stack([p(arms) for p in self.peaks]).amax(0)


@dataclass(frozen=True)
class Ball:
    """r(a) = exp(-(|a - centre| / width)^2) of a vector, each coordinate within +-0.99."""

    centre: float
    width: float

    def __call__(self, action: Float[Tensor, "*E D"]) -> Float[Tensor, "*E"]:
        """The reward of each vector."""
        away = action.clamp(-0.99, 0.99) - self.centre
        return torch.exp(-away.square().sum(-1) / self.width**2)


CONTINUOUS: dict[str, Ball] = {
    "r1": Ball(0.7, 0.75),  # wide and far from where the reference has its mass
    "r2": Ball(0.7, 0.25),
    "r3": Ball(-0.7, 0.25),  # where it has it
}
"""The authors' rewards of continuous actions; here the coordinates are tokens, at their bins'
centres in [-1, 1]."""


def coordinates(tokens: Tensor, arms: int = ARMS) -> Float[Tensor, "..."]:
    """The centre of each token's bin of [-1, 1]."""
    return (2.0 * tokens + 1) / arms - 1


REWARDS: dict[str, Peak] = {
    "r4": Peak(70, 10),  # the paper's R1: far from where the reference has its mass
    "r5": Peak(20, 10),  # the paper's R2: where it has it
    "r8": Peak(70, 20),
    "r9": Peak(70, 30),
}
"""Discrete rewards of one token, by the names of the authors' code; r6 and r7 are the means of r4
and r5 over several tokens."""
FAR, NEAR = "r4", "r5"


def anti_aligned(reward: Float[Tensor, " V"], strength: float = 2.0) -> Float[Tensor, " V"]:
    """Log-probs of a reference that prefers what the reward does not: logits -strength r / sd(r).

    A tabular policy trained on pairs from part of the arms then raises the others for a while,
    which from a uniform reference it never does (arXiv 2406.01462 figure 3, see docs).
    """
    return (-strength * reward / reward.std(correction=0)).log_softmax(-1)


@dataclass(frozen=True)
class Exact:
    """What a policy is worth, without sampling: each [*R], means over states."""

    reward: Tensor
    """Expected reward."""
    reverse_kl: Tensor
    """KL(policy || reference), nats."""
    forward_kl: Tensor
    """KL(reference || policy), nats."""
    entropy: Tensor
    """Nats."""
    mass_near: Tensor
    """Mass within one width of the reward's highest arm."""


def exact(
    logp: Float[Tensor, "*R S V"],
    ref_logp: Float[Tensor, "*R2 S V"],
    reward: Float[Tensor, " V"],
    near: Float[Tensor, " V"],
) -> Exact:
    """Exact figures of a policy.

    Args:
        logp, ref_logp: log-probs of every arm in every state, of policy and reference.
        reward: of each arm.
        near: 1 at the arms that count as near the optimum, else 0.
    """
    p = logp.exp()

    def mean(x: Tensor) -> Tensor:
        return x.sum(-1).mean(-1)

    return Exact(
        reward=mean(p * reward), reverse_kl=kl(logp, ref_logp).mean(-1),
        forward_kl=kl(ref_logp, logp).mean(-1),
        entropy=mean(-p * logp), mass_near=mean(p * near),
    )  # fmt: skip


def near(peak: Peak, arms: int = ARMS) -> Float[Tensor, " V"]:
    """1 at the arms within one width of the peak."""
    a = torch.arange(arms, dtype=torch.float64)
    return ((a - peak.centre).abs() <= peak.width).double()


def expected_best(
    probs: Float[Tensor, " V"], reward: Float[Tensor, " V"], n: int
) -> Float[Tensor, ""]:
    """E[max of n rewards of independent draws]: sum over arms in order of r (F^n - F_before^n)."""
    ordered, order = reward.sort()
    at_most = probs[order].cumsum(0).clamp(max=1.0)
    power = at_most**n
    weight = power - torch.cat([power.new_zeros(1), power[:-1]])
    return (weight * ordered).sum()
