"""From curves to regrets: tuning on other families, the best row, the competitors.

Every choice (settings, best row, the rule) is made on selection seeds; every regret is measured on
fresh ones: regret = (U_best - U) / (U_best - U_ref), U = E true reward - beta KL, at equal cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from preftune.advising.running import Points, at, stopped
from preftune.advising.stated import Stated, effort

ArmKey = tuple[int, str, int]
"""Problem, row, place of the setting."""
OUT = 3.0
"""Problems whose best row gains less than this many standard errors are listed apart."""


@dataclass
class Runs:
    """Curves of arms by seed."""

    problems: Sequence[Stated]
    rows: Sequence[str]
    curves: dict[ArmKey, dict[int, Points]] = field(default_factory=dict)
    stops: Mapping[str, int] = field(default_factory=dict)
    """Rows that stop by themselves, with their patience."""
    _known: dict[tuple[ArmKey, tuple[int, ...], float], np.ndarray] = field(default_factory=dict)
    """Values that were read."""
    _starts: dict[int, float] = field(default_factory=dict)
    _stopped: dict[tuple[ArmKey, int], Points] = field(default_factory=dict)

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
            points = self._ends(arm, seed)
        return at(points, name, budget)

    def _ends(self, arm: ArmKey, seed: int) -> Points:
        if (arm, seed) not in self._stopped:
            p, rng = self.problems[arm[0]], np.random.default_rng([11, arm[0], arm[2], seed])
            points = self.curves[arm][seed]
            if p.labels.source != "human":  # a ranking tells no level that could stand still
                points = stopped(points, p.beta, self.stops[arm[1]], rng)
            self._stopped[arm, seed] = points
        return self._stopped[arm, seed]

    def asks(self, arm: ArmKey) -> bool:
        """Whether its runs have samples judged."""
        return next(iter(self.curves[arm].values()))[-1]["judged"] > 0

    def start(self, problem: int) -> float:
        """U of the reference."""
        if problem not in self._starts:
            arm = next(k for k in self.curves if k[0] == problem)
            self._starts[problem] = next(iter(self.curves[arm].values()))[0]["value"]
        return self._starts[problem]

    def gains(self) -> dict[ArmKey, float]:
        """Mean U of every arm above the reference's, on selection seeds."""
        ref = [self.start(i) for i in range(len(self.problems))]
        seeds = [effort(p).selection for p in self.problems]
        return {
            arm: float(np.mean(self.value(arm, seeds[arm[0]]))) - ref[arm[0]]
            for arm, runs in self.curves.items()
            if all(s in runs for s in seeds[arm[0]])
        }


Tuned = dict[str, int]
"""The place of each row's setting."""


ByKind = Mapping[str, Tuned]
"""The settings of rows on each kind of problem."""


def tune(runs: Runs, gains: Mapping[ArmKey, float], inside: Sequence[int]) -> dict[str, Tuned]:
    """Each row's setting that is best in the mean over these problems, each on its own scale: 1 is
    what its best arm gains. Problems of a kind have settings of their own."""
    kinds = dict.fromkeys(runs.problems[i].kind for i in inside)
    return {
        kind: _tuned(runs, gains, [i for i in inside if runs.problems[i].kind == kind])
        for kind in kinds
    }


def _tuned(runs: Runs, gains: Mapping[ArmKey, float], inside: Sequence[int]) -> Tuned:
    best = _best_of(gains)
    told = [i for i in inside if best[i] > 0]
    found: Tuned = dict.fromkeys(runs.rows, 0)  # the first where nothing is to be gained
    for row in runs.rows if told else ():
        places = sorted({k[2] for k in gains if k[1] == row and k[0] == told[0]})
        mean = {
            place: np.mean([_scaled(gains[i, row, place], best[i]) for i in told])
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
    advised: str = ""
    """The row that advice names first."""
    lead: float = 0.0
    """Of its predicted worth over the second's."""
    raced: bool = False
    """The first few were tried before one was chosen."""

    @property
    def inside(self) -> bool:
        """Enough is at stake to speak of a regret."""
        return self.gain > OUT * self.error

    def regret(self, name: str) -> float:
        """Of a row or competitor."""
        return (self.gain - self.others[name]) / self.gain


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
