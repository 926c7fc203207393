"""Paired statistics of runs: seeds crossed with prompts.

Every method is trained with the same seeds and answers the same prompts with the same random
numbers, so a difference d[seed, prompt] is free of what seeds and prompts have in common. Both are
samples: of the seeds that might have been drawn, and of the prompts. With d = mean + seed + prompt
+ rest, independent, the variance of the mean is

    (M_seed + M_prompt - M_rest) / (S P)

with the mean squares of the two-way layout, and Satterthwaite's degrees of freedom. A bootstrap
over two or three seeds gives intervals that are far too short (it draws seeds from the three it
has); this one has about the coverage that it says, at the price of long intervals where seeds
differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and prompts with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    prompts: int
    p: float | None = None
    """Of the hypothesis that the mean is 0, two-sided."""


def crossed(values: np.ndarray) -> Estimate:
    """Mean and interval of values [S, P], both axes drawn at random.

    One seed: over prompts alone. The ends are None where nothing is known of the spread.
    """
    values = np.asarray(values, dtype=float)
    seeds, prompts = values.shape
    mean = float(values.mean())
    variance, freedom = _of_mean(values)
    if variance is None or freedom is None:
        return Estimate(value=mean, low=None, high=None, seeds=seeds, prompts=prompts)
    if variance == 0.0:
        p = 0.0 if mean else 1.0
        return Estimate(value=mean, low=mean, high=mean, seeds=seeds, prompts=prompts, p=p)
    error = math.sqrt(variance)
    half = error * student_quantile(0.5 + LEVEL / 2, freedom)
    p = 2 * (1 - student_cdf(abs(mean) / error, freedom))
    return Estimate(
        value=mean, low=mean - half, high=mean + half, seeds=seeds, prompts=prompts,
        p=min(1.0, max(0.0, p)),
    )  # fmt: skip


def _of_mean(values: np.ndarray) -> tuple[float | None, float | None]:
    """Variance of the mean of [S, P], and its degrees of freedom."""
    seeds, prompts = values.shape
    if seeds < 2 and prompts < 2:
        return None, None
    if seeds < 2 or prompts < 2:
        flat = values.ravel()
        return float(flat.var(ddof=1) / flat.size), float(flat.size - 1)
    by_seed, by_prompt = values.mean(1), values.mean(0)
    rest = values - by_seed[:, None] - by_prompt[None, :] + values.mean()
    of_seed = prompts * float(by_seed.var(ddof=1))
    of_prompt = seeds * float(by_prompt.var(ddof=1))
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
    parts = [of_seed, of_prompt, -of_rest]
    degrees = [seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)]
    if sum(parts) < max(of_seed, of_prompt):  # the rest is at most as large as the smaller of them
        largest = 0 if of_seed > of_prompt else 1
        parts, degrees = [parts[largest]], [degrees[largest]]
    total = sum(parts)
    spread = sum(part**2 / d for part, d in zip(parts, degrees, strict=True))
    freedom = total**2 / spread if spread else float(seeds * prompts - 1)
    return total / (seeds * prompts), max(1.0, freedom)


def holm(values: Mapping[tuple[str, str], float | None]) -> dict[tuple[str, str], float]:
    """Holm's adjusted p-values: the chance of any false one among all of them is at most p."""
    known = sorted((p, pair) for pair, p in values.items() if p is not None)
    out: dict[tuple[str, str], float] = {}
    highest = 0.0
    for place, (p, pair) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - place)))
        out[pair] = highest
    return out


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each two of them, once."""
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def student_cdf(t: float, freedom: float) -> float:
    """P(T <= t) of Student's distribution."""
    x = freedom / (freedom + t * t)
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, x)
    return 1 - tail if t >= 0 else tail


def student_quantile(p: float, freedom: float) -> float:
    """The t with P(T <= t) = p, for p in (0, 1)."""
    low, high = -1.0, 1.0
    while student_cdf(high, freedom) < p:
        high *= 2
    while student_cdf(low, freedom) > p:
        low *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by Lentz's continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        + a * math.log(x) + b * math.log1p(-x)
    )  # fmt: skip
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    total = d
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            total *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return front * total / a
