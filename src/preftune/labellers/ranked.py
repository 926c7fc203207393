"""Rank by reward: pairs of the better and the worse, the best of N, the worst of N."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.labellers.base import SEED, Shaping, State, log_ratio, reward_needs, shaped
from preftune.numerics import sample_index, stream_keys, uniform
from preftune.samples import Batch, Samples

Ties = Literal["drop", "keep"]


def _couples(num_responses: int) -> Int[Tensor, "Q 2"]:
    """All i < j of K."""
    return torch.combinations(torch.arange(num_responses), 2)


def _pairs(
    reward: Float[Tensor, "*R N K"], couples: Int[Tensor, "*R N Q 2"], threshold: float, ties: Ties
) -> Batch:
    """The better one of each couple first. A gap that is not above the threshold counts as a tie:
    masked, or kept as half a preference either way (label smoothing 1/2)."""
    values = reward.gather(-1, couples.flatten(-2)).unflatten(-1, couples.shape[-2:])
    gap = values[..., 0] - values[..., 1]
    index = torch.where((gap < 0).unsqueeze(-1), couples.flip(-1), couples)
    tied = gap.abs() <= threshold
    if ties == "keep":  # NaN: the others keep the smoothing of the objective's own setting
        smoothing = torch.where(tied, 0.5, torch.nan).to(reward)
        return Batch(index=index, roles=("chosen", "rejected"), data={"label_smoothing": smoothing})
    return Batch(index=index, roles=("chosen", "rejected"), keep=~tied)


@dataclass(frozen=True, kw_only=True)
class BestWorst:
    """The best and the worst of K by reward, as a pair."""

    threshold: float = 0.0
    """A pair counts if its rewards differ by more than this."""
    ties: Ties = "drop"
    """drop: masked and counted. keep: half a preference either way."""
    kl: float = 0.0
    """Strength of KL in the reward (rank by reward - kl * log-ratio)."""
    shaping: Shaping = field(default_factory=Shaping)
    """What is done to rewards first: no_end_penalty, standardise, limit."""
    labelled = True
    given = 0
    least = 2

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return reward_needs(self.kl)

    def items(self, num_responses: int) -> int:
        """One pair."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        reward, state = shaped(samples, self.kl, self.shaping, state)
        best, worst = reward.argmax(-1), reward.argmin(-1)
        if self.ties == "keep":  # of equals the last, for one response is no pair
            worst = torch.where(best == worst, reward.shape[-1] - 1, worst)
        couple = torch.stack([best, worst], -1).unsqueeze(-2)
        return _pairs(reward, couple, self.threshold, self.ties), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class AllPairs:
    """Every couple of the K responses, the better one chosen."""

    threshold: float = 0.0
    """A pair counts if its rewards differ by more than this."""
    ties: Ties = "drop"
    """drop: masked and counted. keep: half a preference either way."""
    kl: float = 0.0
    """Strength of KL in the reward."""
    shaping: Shaping = field(default_factory=Shaping)
    """What is done to rewards first: no_end_penalty, standardise, limit."""
    labelled = True
    given = 0
    least = 2

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return reward_needs(self.kl)

    def items(self, num_responses: int) -> int:
        """K (K - 1) / 2 pairs."""
        return num_responses * (num_responses - 1) // 2

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        reward, state = shaped(samples, self.kl, self.shaping, state)
        couples = _couples(reward.shape[-1]).expand(*samples.row.shape, -1, -1)
        return _pairs(reward, couples, self.threshold, self.ties), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class RandomPair:
    """One couple of the K responses, drawn at random, the better one chosen.

    `mix` draws it with probability in proportion to 1 / (s(d) s(-d)) = 2 + exp(d) + exp(-d), s the
    logistic function: a mixture of a uniform couple and one that is far apart (arXiv 2409.19605,
    Mix-R by the reward and Mix-P by beta times the log-ratio; half and half of the two, as in its
    practice, is close to this law and not the same).
    """

    mix: Literal["none", "reward", "log_ratio"] = "none"
    """What d is a difference of; none: every couple is as likely."""
    mix_scale: float = 1.0
    """d is this times the difference: 1 for a reward in units of log-odds, beta for log-ratios."""
    threshold: float = 0.0
    """A pair counts if its rewards differ by more than this."""
    ties: Ties = "drop"
    """drop: masked and counted. keep: half a preference either way."""
    kl: float = 0.0
    """Strength of KL in the reward."""
    shaping: Shaping = field(default_factory=Shaping)
    """What is done to rewards first: no_end_penalty, standardise, limit."""
    labelled = True
    given = 0
    least = 2

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return reward_needs(self.kl) | ({"logp", "ref_logp"} if self.mix == "log_ratio" else set())

    def items(self, num_responses: int) -> int:
        """One pair."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`. Its draws are counted in the state."""
        reward, state = shaped(samples, self.kl, self.shaping, state)
        couples = _couples(reward.shape[-1])
        round_number = state.get("rounds", torch.zeros((), dtype=torch.long))
        seeds = state.get(SEED, torch.zeros((), dtype=torch.long))
        keys = stream_keys(seeds.reshape(-1).tolist(), "random_pair").reshape(*seeds.shape, 1)
        draw = uniform(keys, round_number, torch.arange(samples.row.shape[-1]))
        draw = draw.expand(samples.row.shape)
        chosen = sample_index(self._weights(samples, reward, couples), draw)
        couple = couples[chosen].unsqueeze(-2)
        state = state | {"rounds": round_number + 1}
        return _pairs(reward, couple, self.threshold, self.ties), state

    def _weights(self, samples: Samples, reward: Tensor, couples: Tensor) -> Tensor:
        """Of each couple, [*R, N, Q], up to a factor."""
        if self.mix == "none":
            return torch.ones(*samples.row.shape, len(couples))
        by = reward if self.mix == "reward" else log_ratio(samples)
        d = self.mix_scale * (by[..., couples[:, 0]] - by[..., couples[:, 1]])
        far = d.abs().amax(-1, keepdim=True)  # a common factor keeps exp finite
        return 2 * torch.exp(-far) + torch.exp(d - far) + torch.exp(-d - far)

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best of N by reward (or the worst); of equals the first."""

    worst: bool = False
    """The worst instead: with a negative weight, Best-of-N with a negative gradient."""
    kl: float = 0.0
    """Strength of KL in the reward (rank by reward - kl * log-ratio)."""
    shaping: Shaping = field(default_factory=Shaping)
    """What is done to rewards first: no_end_penalty, standardise, limit."""
    labelled = True
    given = 0
    least = 2

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return reward_needs(self.kl)

    def items(self, num_responses: int) -> int:
        """One response."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        reward, state = shaped(samples, self.kl, self.shaping, state)
        best = reward.argmin(-1) if self.worst else reward.argmax(-1)
        return Batch(index=best[..., None, None]), state

    def signals(self) -> dict[str, list[float]]:
        """No data."""
        return {}
