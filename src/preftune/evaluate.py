"""What a policy does on held-out prompts: reward, KL to the reference, win rate, length.

Samples of different policies use the same random numbers, so their differences are paired.
Intervals are bootstrapped over prompts; from one training run they say nothing about another seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from preftune.numerics import stream_key, uniform
from preftune.policies.base import Policy
from preftune.policies.scoring import micro_batches
from preftune.samples import Samples
from preftune.sources import Data, join

Figures = dict[str, dict[str, float | None]]
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A policy's samples on held-out prompts, judged."""

    samples: Samples
    rewards: Mapping[str, Tensor]
    """[N, K] by name; the first is the one that counts for the win rate."""
    kl: Tensor | None
    """[N, K], nats: KL to the reference summed over the steps of each sample."""

    def lengths(self) -> Tensor:
        """Response tokens, the end token not counted, [N, K]."""
        return self.samples.lengths() - self.samples.finished.long()

    def first(self, count: int) -> "Answers":
        """Those to the first `count` prompts."""
        return Answers(
            samples=self.samples.take(torch.arange(min(count, len(self.samples.row)))),
            rewards={name: values[:count] for name, values in self.rewards.items()},
            kl=None if self.kl is None else self.kl[:count],
        )


def answer(
    policy: Policy,
    reference: Policy | None,
    prompts: Data,
    judges: Mapping[str, Callable[[Samples], Tensor]],
    *,
    samples_per_prompt: int,
    seed: int,
    micro_batch_tokens: int | None = None,
    num_prompts: int | None = None,
    batch_prompts: int = 48,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Sample, judge and measure. `reference` None leaves the KL out."""
    total = min(num_prompts or len(prompts), len(prompts))
    key = stream_key(seed, "evaluate")
    parts: list[Samples] = []
    kls: list[Tensor] = []
    for start in range(0, total, batch_prompts):
        rows = torch.arange(start, min(start + batch_prompts, total))

        def stream(t: int, shape: tuple[int, ...], rows: Tensor = rows) -> Tensor:
            return uniform(key, t, rows[:, None], torch.arange(shape[-1]))

        drawn = policy.sample(*prompts.prompts_only(rows), samples_per_prompt, stream, 0)
        parts.append(replace(drawn, row=rows))
        if reference is not None:
            kls.append(_sequence_kl(policy, reference, parts[-1], micro_batch_tokens))
        progress(int(rows[-1]) + 1, total)
    samples = join(parts)
    return Answers(
        samples=samples,
        rewards={name: judge(samples) for name, judge in judges.items()},
        kl=torch.cat(kls) if kls else None,
    )


def _sequence_kl(policy: Policy, reference: Policy, samples: Samples, budget: int | None) -> Tensor:
    out = torch.zeros(samples.finished.shape, dtype=torch.float64)
    for index in micro_batches(samples, budget):
        part = samples.take(index)
        out[index] = policy.step_kl(reference, part).sum(-1).double()
    return out


def figures(answers: Answers, against: Answers | None = None, seed: int = 0) -> Figures:
    """Means with 95 % intervals: reward, kl, length, no_end, and the win rate against others."""
    out: Figures = {}
    names = list(answers.rewards)
    for i, name in enumerate(names):
        out["reward" if i == 0 else f"reward:{name}"] = interval(answers.rewards[name], seed)
    if answers.kl is not None:
        out["kl"] = interval(answers.kl, seed)
    if against is not None and names:
        mine, other = answers.rewards[names[0]], against.rewards[names[0]]
        out["win_rate"] = interval(0.5 * (1 + torch.sign(mine - other)), seed)
    out["length"] = interval(answers.lengths(), seed)
    out["no_end"] = interval(~answers.samples.finished, seed)
    return out


def interval(values: Tensor, seed: int = 0) -> dict[str, float | None]:
    """Mean of [N, K] and its 95 % bootstrap interval over the N prompts (None for one prompt)."""
    by_prompt = values.double().mean(-1).numpy()
    mean = float(by_prompt.mean())
    if len(by_prompt) < 2:
        return {"value": mean, "low": None, "high": None}
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(by_prompt), (RESAMPLES, len(by_prompt)))
    low, high = np.quantile(by_prompt[picks].mean(1), [0.025, 0.975])
    return {"value": mean, "low": float(low), "high": float(high)}
