"""The bandits of arXiv 2404.14367: one hundred arms, a skewed reference, peaks near and far.

Everything here is exact: the reference is a closed form in place of the authors' histogram of
10,000 draws, and expected rewards, divergences and entropies are sums over the arms.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.numerics import sample_index, stream_key, uniform
from preftune.policies.categorical import Categorical
from preftune.samples import DATA, Samples
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


def reference_policy(states: int = 1, runs: tuple[int, ...] = ()) -> Categorical:
    """The reference in every state."""
    logits = reference_probs().log()
    return Categorical(logits.expand(*runs, states, ARMS))


@dataclass(frozen=True)
class BanditData:
    """Offline pairs: in each row a state and two arms drawn from the reference, ranked by reward.

    Draws are functions of (seed, row). A pair of equal rewards keeps its order.
    """

    reward: Tensor
    """[V] of each arm."""
    probs: Tensor
    """[V] of what draws the arms."""
    rows: int
    states: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return self.rows

    def prompts_only(self, index: Any) -> tuple[Tensor, Tensor]:
        """States [n, 1] and their mask."""
        prompt = (torch.as_tensor(index) % self.states)[:, None]
        return prompt, torch.ones_like(prompt, dtype=torch.bool)

    def samples(self, index: Any, *, responses: list[int] | None = None) -> Samples:
        """The better arm first."""
        rows = torch.as_tensor(index)
        prompt, prompt_mask = self.prompts_only(rows)
        draw = uniform(stream_key(self.seed, "pairs"), rows[:, None], torch.arange(2))
        arms = sample_index(self.probs.expand(*draw.shape, -1).contiguous(), draw)
        rewards = self.reward[arms]
        arms = torch.where((rewards[:, :1] < rewards[:, 1:]), arms.flip(-1), arms)
        tokens = (arms if responses is None else arms[:, responses]).unsqueeze(-1)
        ones = torch.ones_like(tokens, dtype=torch.bool)
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=tokens, mask=ones,
            finished=ones[..., 0], origin=torch.full_like(tokens[..., 0], DATA), row=rows,
        )  # fmt: skip
