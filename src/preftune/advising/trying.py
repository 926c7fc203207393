"""What a user finds out by training for a while, and ways to spend a budget on several rows."""

import math
from collections.abc import Sequence

import numpy as np

from preftune.advising.regret import ArmKey, Runs, Tuned
from preftune.advising.scene import SHARE_TO_NATS
from preftune.advising.signs import model_price
from preftune.advising.stated import Stated

SAMPLES = 32
"""Most that are judged to see how good a run is."""
LOOKS = 0.2
"""Of what trying a row costs, at most so much goes into judging what came out."""


def asked(p: Stated, budget: float) -> int:
    """Samples that looking at a run may have judged where trying it has this budget."""
    return min(SAMPLES, int(LOOKS * budget / max(_unit(p), 1e-9)))


def _unit(p: Stated) -> float:
    return p.prices.sample + p.prices.label


def seen(
    runs: Runs, arm: ArmKey, seed: int, spent: float, samples: int, rng: np.random.Generator
) -> float:
    """The user's estimate of U by so many samples: a share of won comparisons with the reference's
    where humans judge, elsewhere the judge's mean; with no sample, a guess."""
    p = runs.problems[arm[0]]
    if not samples:
        return float(rng.normal())
    if p.labels.source == "human":
        won = rng.binomial(samples, min(max(runs.read(arm, seed, "win", spent), 0.0), 1.0))
        divergence = runs.read(arm, seed, "reverse_kl", spent)
        return SHARE_TO_NATS * (won / samples - 0.5) - p.beta * divergence
    spread = runs.read(arm, seed, "proxy_spread", spent)
    return float(runs.read(arm, seed, "proxy", spent) + rng.normal() * spread / math.sqrt(samples))


def halving(
    runs: Runs, problem: int, tuned: Tuned, seed: int, rng: np.random.Generator
) -> tuple[str, float]:
    """Successive halving over the rows with what a user can see.

    Rounds of equal cost: every row that is left trains on from where it was, is judged by a few
    fresh samples, and the better half stays. One more round is the last row's alone.

    Returns:
        the row, and its U when the budget is gone.
    """
    p, left = runs.problems[problem], list(runs.rows)
    rounds = math.ceil(math.log2(len(left)))
    model = model_price(p.labels.source, len(p.pairs))  # trained once, for all
    share = max(0.0, p.budget - model) / (rounds + 1)
    used = dict.fromkeys(left, 0.0)

    def spent(row: str) -> float:
        return used[row] + (model if runs.asks((problem, row, tuned[row])) else 0.0)

    for _ in range(rounds):
        samples = asked(p, share / len(left))
        for row in left:
            used[row] += share / len(left) - samples * _unit(p)
        looks = {r: seen(runs, (problem, r, tuned[r]), seed, spent(r), samples, rng) for r in left}
        left = sorted(left, key=lambda r: -looks[r])[: math.ceil(len(left) / 2)]
    used[left[0]] += share
    return left[0], runs.read((problem, left[0], tuned[left[0]]), seed, "value", spent(left[0]))


def race(
    runs: Runs, arms: Sequence[ArmKey], seed: int, share: float, paid: float,
    rng: np.random.Generator,
) -> tuple[str, float]:  # fmt: skip
    """Each arm is tried with a share of the budget; the one that looks best goes on with the rest.

    Args:
        paid: spent before.

    Returns:
        the row, and its U when the budget is gone.
    """
    p = runs.problems[arms[0][0]]
    model = model_price(p.labels.source, len(p.pairs))  # looking takes one in any case
    left = max(0.0, p.budget - paid - model)
    each = share * left
    samples = asked(p, each)
    looks = samples * _unit(p)

    def own(arm: ArmKey) -> float:
        return model if runs.asks(arm) else 0.0

    found = [seen(runs, a, seed, each - looks + own(a), samples, rng) for a in arms]
    best = arms[int(np.argmax(found))]
    rest = left - (len(arms) - 1) * each - looks
    return best[1], runs.read(best, seed, "value", rest + own(best))
