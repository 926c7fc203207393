"""From curves to regrets: tuning on other families, the best row, the competitors.

Every choice (settings, best row, the rule) is made on selection seeds; every regret is measured on
fresh ones: regret = (U_best - U) / (U_best - U_ref), U = E true reward - beta KL, at equal cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from preftune.advising.problem import Problem
from preftune.advising.running import at

Points = Sequence[Mapping[str, float]]
"""A run's figures in order of what was spent."""
ArmKey = tuple[int, str, int]
"""Problem, row, place of the setting."""
RANKED_BY = {"human": "win", "true": "win"}
"""What a user can see of a run: humans prefer; otherwise the judge's reward, less beta KL."""
ASKED = 32
"""Preferences bought to see how good a run is, where humans judge."""
HALVING_SAMPLES = 32
"""Samples that the judge scores for it elsewhere."""
OUT = 3.0
"""Problems whose best row gains less than this many standard errors are listed apart."""


@dataclass
class Runs:
    """Curves of arms by seed."""

    problems: Sequence[Problem]
    rows: Sequence[str]
    curves: dict[ArmKey, dict[int, Points]] = field(default_factory=dict)
    stops: Mapping[str, int] = field(default_factory=dict)
    """Rows that stop by themselves, with their patience, in places of a curve."""
    _known: dict[tuple[ArmKey, tuple[int, ...], float], np.ndarray] = field(default_factory=dict)
    """Values that were read."""

    def value(self, arm: ArmKey, seeds: Sequence[int], less: float = 0.0) -> np.ndarray:
        """U of an arm's runs at the problem's budget less what was spent before, [seeds]."""
        key = arm, tuple(seeds), less
        if key not in self._known:
            budget = self.problems[arm[0]].budget - less
            self._known[key] = np.array([self.read(arm, s, "value", budget) for s in seeds])
        return self._known[key]

    def read(self, arm: ArmKey, seed: int, name: str, budget: float) -> float:
        """A figure of a run when so much is spent."""
        points = self.curves[arm][seed]
        if arm[1] in self.stops:
            points = stopped(points, self.problems[arm[0]].beta, self.stops[arm[1]])
        return at(points, name, budget)

    def start(self, problem: int) -> float:
        """U of the reference."""
        arm = next(k for k in self.curves if k[0] == problem)
        return next(iter(self.curves[arm].values()))[0]["value"]

    def gains(self, seeds: Sequence[int]) -> dict[ArmKey, float]:
        """Mean U of every arm above the reference's."""
        ref = [self.start(i) for i in range(len(self.problems))]
        return {
            arm: float(np.mean(self.value(arm, seeds))) - ref[arm[0]]
            for arm, runs in self.curves.items()
            if all(s in runs for s in seeds)
        }


def stopped(points: Points, beta: float, patience: int) -> Points:
    """A curve up to where the judge's reward has not grown for `patience` places."""
    best, since = -math.inf, 0
    for i, point in enumerate(points):
        reward = point["proxy"] + beta * point["reverse_kl"]
        best, since = (reward, 0) if reward > best else (best, since + 1)
        if since >= patience:
            return points[: i + 1]
    return points


Tuned = dict[str, int]
"""The place of each row's setting."""


def tune(runs: Runs, gains: Mapping[ArmKey, float], inside: Sequence[int]) -> Tuned:
    """Each row's setting that is best in the mean over these problems, each on its own scale: 1 is
    what its best arm gains."""
    best = _best_of(gains)
    found: Tuned = {}
    for row in runs.rows:
        places = sorted({k[2] for k in gains if k[1] == row})
        mean = {
            place: np.mean([_scaled(gains[i, row, place], best[i]) for i in inside if best[i] > 0])
            for place in places
        }
        found[row] = max(mean, key=lambda place: mean[place])
    return found


def _best_of(gains: Mapping[ArmKey, float]) -> dict[int, float]:
    best: dict[int, float] = {}
    for arm, gain in gains.items():
        best[arm[0]] = max(best.get(arm[0], -math.inf), gain)
    return best


def _scaled(gain: float, best: float) -> float:
    return max(gain / best, -1.0)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A problem in the end: raw gains over the reference on fresh seeds."""

    problem: int
    best: str
    gain: float
    """Of the row that was best on selection seeds."""
    error: float
    """Its standard error."""
    others: Mapping[str, float]
    """Gains of all rows, and of the competitors by name."""

    @property
    def inside(self) -> bool:
        """Enough is at stake to speak of a regret."""
        return self.gain > OUT * self.error

    def regret(self, name: str) -> float:
        """Of a row or competitor."""
        return (self.gain - self.others[name]) / self.gain


def halving(
    runs: Runs, problem: int, tuned: Tuned, seed: int, rng: np.random.Generator
) -> tuple[str, float]:
    """Successive halving over the rows with what a user can see.

    Rounds of equal cost: every row that is left trains on from where it was, is judged by a few
    fresh samples, and the better half stays. The last one spends what is left.

    Returns:
        the row, and its U when the budget is gone.
    """
    p = runs.problems[problem]
    rounds = math.ceil(math.log2(len(runs.rows)))
    model = 2.0 * len(p.pairs) if p.labels.source == "rm_same" else 0.0  # trained once, for all
    left, share = list(runs.rows), max(0.0, p.budget - model) / rounds
    used = dict.fromkeys(left, 0.0)

    def spent(row: str) -> float:
        judged = runs.curves[problem, row, tuned[row]][seed][-1]["judged"] > 0
        return used[row] + (model if judged else 0.0)

    for _ in range(rounds):
        for row in left:
            used[row] += max(0.0, share / len(left) - _price_of_looking(p))
        seen = {r: _seen(runs, (problem, r, tuned[r]), seed, spent(r), rng) for r in left}
        left = sorted(left, key=lambda r: -seen[r])[: math.ceil(len(left) / 2)]
    row = left[0]
    return row, runs.read((problem, row, tuned[row]), seed, "value", spent(row))


def _price_of_looking(p: Problem) -> float:
    asked = ASKED if p.labels.source in RANKED_BY else HALVING_SAMPLES
    return asked * (p.prices.sample + p.prices.label)


def _seen(runs: Runs, arm: ArmKey, seed: int, spent: float, rng: np.random.Generator) -> float:
    """The user's estimate: a share of won comparisons, or the judge's mean, with its noise."""
    p = runs.problems[arm[0]]
    if p.labels.source in RANKED_BY:
        won = runs.read(arm, seed, "win", spent)
        won = rng.binomial(ASKED, min(max(won, 0.0), 1.0)) / ASKED
        scale = 4.0  # a share of 1/2 + x is about 4 x nats of Bradley-Terry
        return scale * (won - 0.5) - p.beta * runs.read(arm, seed, "reverse_kl", spent)
    spread = np.std(np.array(p.reward))
    noise = rng.normal() * spread / math.sqrt(HALVING_SAMPLES)
    return float(runs.read(arm, seed, "proxy", spent) + noise)


def interval(values: np.ndarray, groups: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % of the mean, by bootstrap over problems within families."""
    rng = np.random.default_rng(seed)
    by = [values[[i for i, g in enumerate(groups) if g == name]] for name in sorted(set(groups))]
    means = np.array([
        np.concatenate([b[rng.integers(0, len(b), len(b))] for b in by]).mean()
        for _ in range(2000)
    ])  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
