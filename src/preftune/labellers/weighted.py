"""Weigh by reward: exponential weights, and advantages with one of seven baselines."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.advantages import gae, leave_one_out, whiten
from preftune.labellers.base import (
    Estimator,
    Shaping,
    State,
    index_of,
    kl_tokens,
    reward_needs,
    rewards_of,
    running_mean,
    shaped,
)
from preftune.samples import Batch, Samples

Baseline = Literal["none", "batch", "prompt", "leave_one_out", "least", "running", "value"]
_MOST = 80.0
"""exp of more overflows float32."""


@dataclass(frozen=True, kw_only=True)
class RewardWeights:
    """w = exp(reward / beta), at most `max_weight`: reward-weighted regression."""

    beta: float = 1.0
    """Temperature, in the unit of the reward; infinite: every weight is 1."""
    max_weight: float | None = 20.0
    """Larger weights are cut to it."""
    kl: float = 0.0
    """Strength of KL in the reward."""
    shaping: Shaping = field(default_factory=Shaping)
    """What is done to rewards first: no_end_penalty, standardise, limit."""
    labelled = True
    given = 0
    least = 1

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return reward_needs(self.kl)

    def items(self, num_responses: int) -> int:
        """One: the group."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        reward, state = shaped(samples, self.kl, self.shaping, state)
        most = _MOST if self.max_weight is None else math.log(self.max_weight)
        weight = (reward / self.beta).clamp(max=most).exp()
        index = index_of(samples, list(range(reward.shape[-1])))
        return Batch(index=index, data={"weight": weight.unsqueeze(-2)}), state

    def signals(self) -> dict[str, list[float]]:
        """A weight is never negative."""
        return {"weight": [0.0, 1.0, 20.0]}


@dataclass(frozen=True, kw_only=True)
class Advantage:
    """reward - KL - baseline of each sample; with the baseline `value`, generalised advantages of
    each token and the target of the value head."""

    baseline: Baseline = "none"
    """none; batch: mean of the round's other samples; prompt: mean of the prompt's samples, itself
    included, which scales the gradient by (K - 1) / K (GRPO); leave_one_out: of the prompt's other
    samples (RLOO); least: the prompt's least reward, so that no advantage is negative; running:
    mean of all earlier rounds, 0 in the first; value: the value head."""
    whiten: Literal["none", "prompt", "round"] = "none"
    """Mean 0 and deviation 1 over a prompt's samples, or over the round's (tokens)."""
    kl: float = 0.0
    """Strength of KL in the reward."""
    kl_estimator: Estimator = "k1"
    """k1 log-ratio, k2 half its square, k3 exp(-k1) - 1 + k1; only k1 has the KL's gradient."""
    gamma: float = 1.0
    """Discount a token (baseline value)."""
    lam: float = 0.95
    """Weight of later values (baseline value)."""
    shaping: Shaping = field(default_factory=Shaping)
    """What is done to rewards first: no_end_penalty, standardise, limit."""
    reward_range: tuple[float, float] | None = None
    """Least and largest reward there can be, where it is known: a method whose advantages cannot be
    negative has no negative gradient."""
    labelled = True
    given = 0

    @property
    def least(self) -> int:
        """See `Labeller.least`."""
        within = self.whiten == "prompt" or self.baseline in ("prompt", "leave_one_out", "least")
        return 2 if within else 1

    @property
    def needs(self) -> frozenset[str]:
        """See `Labeller.needs`."""
        return reward_needs(self.kl) | ({"value"} if self.baseline == "value" else set())

    def items(self, num_responses: int) -> int:
        """One: the group."""
        return 1

    def __call__(self, samples: Samples, state: State) -> tuple[Batch, State]:
        """See `Labeller`."""
        reward, state = rewards_of(samples, self.shaping, state)
        data: dict[str, Tensor] = {}
        if self.baseline == "value":
            advantage, target = self._generalised(samples, reward, state)
            data["target"] = target.unsqueeze(-3)
            mask = samples.mask
        else:
            if self.kl:
                penalty = kl_tokens(samples, self.kl, self.kl_estimator, state).sum(-1)
                reward = reward - penalty.to(reward)
            baseline, state = self._baseline(reward, state)
            advantage, mask = reward - baseline, torch.ones_like(samples.finished)
        data["advantage"] = self._whitened(advantage, mask).unsqueeze(samples.row.ndim)
        index = index_of(samples, list(range(samples.tokens.shape[-2])))
        return Batch(index=index, data=data), state

    def _generalised(self, samples: Samples, reward: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Advantage and target of each token; the response's reward stands at its last one."""
        assert samples.value is not None, "the round was not scored with values"
        last = (samples.lengths() - 1).clamp(min=0).unsqueeze(-1)
        tokens = torch.zeros(samples.mask.shape, dtype=samples.value.dtype)
        tokens = tokens.scatter(-1, last, reward.unsqueeze(-1).to(tokens))
        if self.kl:
            tokens = tokens - kl_tokens(samples, self.kl, self.kl_estimator, state).to(tokens)
        return gae(tokens, samples.value, samples.mask, gamma=self.gamma, lam=self.lam)

    def _baseline(
        self, reward: Float[Tensor, "*R N K"], state: State
    ) -> tuple[Tensor | float, State]:
        if self.baseline == "running":
            mean, state = running_mean(reward, state)
            return mean[..., None, None].to(reward), state
        if self.baseline == "batch":
            flat = reward.flatten(-2)
            others = leave_one_out(flat) if flat.shape[-1] > 1 else torch.zeros_like(flat)
            return others.view(reward.shape), state
        if self.baseline == "prompt":
            return reward.mean(-1, keepdim=True), state
        if self.baseline == "least":
            return reward.amin(-1, keepdim=True), state
        return (leave_one_out(reward) if self.baseline == "leave_one_out" else 0.0), state

    def _whitened(self, advantage: Tensor, mask: Tensor) -> Tensor:
        """[*R, N, K] of responses or [*R, N, K, T] of tokens."""
        if self.whiten == "none":
            return advantage
        runs = advantage.ndim - (3 if self.baseline == "value" else 2)
        per = whiten  # each run, or each prompt of each run, by itself
        for _ in range(runs + (self.whiten == "prompt")):
            per = torch.vmap(per)
        return per(advantage, mask)

    def signals(self) -> dict[str, list[float]]:
        """Either sign, unless rewards are known not to be negative and nothing is taken off."""
        least = self.reward_range[0] if self.reward_range else -math.inf
        moved = self.shaping.standardise != "none" or self.shaping.no_end_penalty > 0 or self.kl
        from_zero = self.baseline == "none" and least >= 0 and not moved
        positive = self.whiten == "none" and (from_zero or self.baseline == "least")
        signs = [0.0, 1.0] if positive else [-1.0, 0.0, 1.0]
        return {"advantage": signs} | ({"target": [0.0]} if self.baseline == "value" else {})
