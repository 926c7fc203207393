"""What a labeller is, and what labellers share: shaped rewards and the KL in them.

A labeller is `(samples, state) -> (batch, state)` over the whole round, already scored; its state
is a plain dict of tensors that the checkpoint saves. Statistics over a batch live here, never in an
objective, and each run of a study ([*R]) has its own.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.numerics import masked_sum
from preftune.objectives.divergence import kl_estimate
from preftune.samples import Batch, Samples

State = dict[str, Tensor]
KL_SCALE = "kl_scale"
"""Of a state: what a target_kl multiplies KL coefficients by, [*R]."""
SEED = "seed"
"""Of a state: the run's."""
_EPS = 1e-8

Estimator = Literal["k1", "k2", "k3"]


@runtime_checkable
class Labeller(Protocol):
    """Frozen; sees a whole scored round. One that takes only the first responses of a prompt says
    how many in `most`."""

    @property
    def needs(self) -> frozenset[str]:
        """What the round must be scored with: a subset of logp, ref_logp, value, reward."""
        ...

    @property
    def labelled(self) -> bool:
        """It uses a judgement (False: the samples alone)."""
        ...

    @property
    def given(self) -> int:
        """Responses a prompt that the data must hold for it (0: any source will do)."""
        ...

    @property
    def least(self) -> int:
        """Fewest responses a prompt that it can work with."""
        ...

    def items(self, num_responses: int) -> int:
        """Q: items it makes of a prompt's K responses, known before sampling."""
        ...

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]: ...

    def signals(self) -> dict[str, list[float]]:
        """Admissible values of its data: from them the axes of a row are computed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What is done to rewards before they are used, in this order."""

    no_end_penalty: float = 0.0
    """Taken off a response that was cut before its end token."""
    standardise: Literal["none", "prompt", "running"] = "none"
    """Mean 0 and deviation 1: over a prompt's responses, or by the mean and the deviation of all
    earlier rounds (the current one left out)."""
    limit: float | None = None
    """Clipped to [-limit, limit]."""


def index_of(samples: Samples, places: list[int]) -> Tensor:
    """One item a prompt that points at the given responses: [*R, N, 1, A]."""
    return torch.tensor(places).expand(*samples.row.shape, 1, len(places))


def log_ratio(samples: Samples) -> Float[Tensor, "*R N K"]:
    """log policy - log reference of each response at collection, nats."""
    assert samples.logp is not None and samples.ref_logp is not None, "the round was not scored"
    return masked_sum(samples.logp - samples.ref_logp, samples.mask)


def reward_needs(kl: float) -> frozenset[str]:
    """What a labeller needs that ranks or weighs by a reward with that much KL in it."""
    return frozenset({"reward", "logp", "ref_logp"} if kl else {"reward"})


def kl_tokens(
    samples: Samples, kl: float, estimator: Estimator, state: State
) -> Float[Tensor, "*R N K T"]:
    """kl * estimate of each token's KL, to be taken off its reward (Ziegler et al. 2019)."""
    assert samples.logp is not None and samples.ref_logp is not None, "the round was not scored"
    estimate = kl_estimate(samples.logp - samples.ref_logp, estimator)
    scale = state.get(KL_SCALE, torch.ones(()))
    return kl * scale[..., None, None, None].to(estimate) * torch.where(samples.mask, estimate, 0.0)


def rewards_of(
    samples: Samples, shaping: Shaping, state: State
) -> tuple[Float[Tensor, "*R N K"], State]:
    """The round's rewards, shaped, and the state with them taken in."""
    assert samples.reward is not None, "the round has no rewards"
    reward = samples.reward
    if shaping.no_end_penalty:
        reward = reward - shaping.no_end_penalty * (~samples.finished)
    if shaping.standardise == "prompt":
        spread = reward.var(-1, correction=0, keepdim=True)
        reward = (reward - reward.mean(-1, keepdim=True)) / (spread + _EPS).sqrt()
    elif shaping.standardise == "running":
        mean, deviation, state = _running(reward, state)
        reward = (reward - mean) / deviation
    if shaping.limit is not None:
        reward = reward.clamp(-shaping.limit, shaping.limit)
    return reward, state


def shaped(
    samples: Samples, kl: float, shaping: Shaping, state: State
) -> tuple[Float[Tensor, "*R N K"], State]:
    """reward - kl * log-ratio of each response: what responses are ranked by."""
    reward, state = rewards_of(samples, shaping, state)
    if kl:
        reward = reward - kl_tokens(samples, kl, "k1", state).sum(-1).to(reward)
    return reward, state


def running_mean(reward: Float[Tensor, "*R N K"], state: State) -> tuple[Tensor, State]:
    """Mean [*R] of all earlier rounds (0 before the first), and the state with this one in it."""
    count, total, _ = _totals(reward, state, "baseline")
    return total / count.clamp(min=1), _take_in(reward, state, "baseline")


def _totals(reward: Tensor, state: State, name: str) -> list[Tensor]:
    """Count, sum and sum of squares, [*R] each."""
    zero = torch.zeros(reward.shape[:-2], dtype=torch.float64)
    return [state.get(f"{name}_{n}", zero) for n in ("count", "sum", "square")]


def _take_in(reward: Tensor, state: State, name: str) -> State:
    count, total, square = _totals(reward, state, name)
    x = reward.double()
    return state | {
        f"{name}_count": count + float(x.shape[-2] * x.shape[-1]),
        f"{name}_sum": total + x.sum((-2, -1)),
        f"{name}_square": square + x.square().sum((-2, -1)),
    }


def _running(reward: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
    """Mean and deviation of earlier rounds; 0 and 1 before there are two rewards."""
    count, total, square = _totals(reward, state, "reward")
    mean = total / count.clamp(min=1)
    variance = (square / count.clamp(min=1) - mean.square()).clamp(min=0.0)
    deviation = torch.where(count > 1, (variance + _EPS).sqrt(), torch.ones_like(variance))
    wide = (mean[..., None, None].to(reward), deviation[..., None, None].to(reward))
    return *wide, _take_in(reward, state, "reward")
