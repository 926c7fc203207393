"""A population of prompts small enough that every quantity is a sum over all responses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from preftune.estimators.estimate import Estimate

DRAWS = 40
LEAST_RATE = 0.85
"""Of 40 intervals of 95 %: below this by chance less than once in a hundred."""


@dataclass(frozen=True)
class Population:
    """Kinds of prompts, equally likely, with the same number of responses each: [kinds, arms]."""

    log_ref: Tensor
    log_policy: Tensor
    reward: Tensor
    length: Tensor


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g, dtype=torch.float64)


def population(seed: int = 0, kinds: int = 48, arms: int = 60, shift: float = 0.6) -> Population:
    """Policies that differ by a tilt of `shift` and noise; long responses are the less likely."""
    g = gen(seed)
    length = torch.randint(2, 20, (kinds, arms), generator=g)
    log_ref = (normal(g, kinds, arms) - 0.1 * length).log_softmax(-1)
    reward = normal(g, kinds, arms) + 0.3 * log_ref
    noise = normal(g, kinds, arms)
    return Population(log_ref, (log_ref + shift * noise).log_softmax(-1), reward, length)


def prompts(g: torch.Generator, kinds: int, count: int) -> Tensor:
    return torch.randint(0, kinds, (count,), generator=g)


def sample(g: torch.Generator, log_p: Tensor, size: int) -> Tensor:
    """Responses [N, size] to prompts with log-probs [N, arms]."""
    return torch.multinomial(log_p.exp(), size, replacement=True, generator=g)


def holds(
    estimate: Callable[[torch.Generator], Estimate],
    exact: float,
    draws: int = DRAWS,
    least: float = LEAST_RATE,
    trusted: float = 1.0,
) -> float:
    """Checks how often the interval holds the exact value, over repeated draws of everything."""
    found = [estimate(gen(1000 + i)) for i in range(draws)]
    kept = [e for e in found if e.trusted]
    assert len(kept) >= trusted * draws, f"trusted {len(kept)} of {draws}: {found[0]}"
    inside = sum(e.low <= exact <= e.high for e in kept if e.low is not None and e.high is not None)
    rate = inside / len(kept)
    print(f"interval holds {exact:.4g} in {inside} of {len(kept)}, one is {kept[0]}")
    assert rate >= least, f"held {exact:.4g} in {inside} of {len(kept)} draws: {kept[:3]}"
    return rate
