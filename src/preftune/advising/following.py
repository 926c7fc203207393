"""What comes of following a rule's advice: the diagnosis paid, the first row run, or the first few
tried where they are close."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from preftune.advising.looking import Seen
from preftune.advising.regret import Runs, Tuned
from preftune.advising.rule import Racing
from preftune.advising.signs import model_price
from preftune.advising.trying import race

ALWAYS = 10.0
"""A lead that no row has."""
RACINGS = (
    Racing(rows=1, below=0.0),
    *(Racing(rows=2, below=x) for x in (0.05, 0.1, 0.2, ALWAYS)),
    *(Racing(rows=3, below=x) for x in (0.1, 0.2, ALWAYS)),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of following advice on one problem, over seeds."""

    rows: tuple[str, ...]
    """By seed: what was run to the end."""
    value: float
    """Mean U."""
    raced: bool


@dataclass
class Following:
    """Runs and diagnoses, read as somebody would who follows advice."""

    runs: Runs
    seen: Sequence[Seen]
    _known: dict[object, Outcome] = field(default_factory=dict)

    def outcome(
        self, problem: int, worth: Mapping[str, float], tier: int, racing: Racing, tuned: Tuned,
        seeds: Sequence[int],
    ) -> Outcome:  # fmt: skip
        """What a rule of that tier, which predicts these worths (the best first), leads to."""
        order = list(worth)
        lead = worth[order[0]] - worth[order[1]]
        first = order[: racing.rows if lead < racing.below else 1]
        arms = tuple((problem, r, tuned[r]) for r in first)
        key = arms, tier, racing.share, tuple(seeds)
        if key not in self._known:
            paid = self.seen[problem].price[tier] if tier >= 0 else 0.0
            self._known[key] = self._run(arms, tier, racing.share, paid, seeds)
        return self._known[key]

    def _run(
        self, arms: tuple[tuple[int, str, int], ...], tier: int, share: float, paid: float,
        seeds: Sequence[int],
    ) -> Outcome:  # fmt: skip
        problem, row, _ = arms[0]
        if len(arms) == 1:
            p = self.runs.problems[problem]
            if tier >= 2 and not self.runs.asks(arms[0]):
                # a reward model that the row trains anyway is not paid twice
                paid += model_price(p.labels.source, len(p.pairs))
            value = float(self.runs.value(arms[0], seeds, paid).mean())
            return Outcome(rows=(row,) * len(seeds), value=value, raced=False)
        each = [
            race(self.runs, arms, s, share, paid, np.random.default_rng([13, problem, s]))
            for s in seeds
        ]
        rows = tuple(r for r, _ in each)
        return Outcome(rows=rows, value=float(np.mean([v for _, v in each])), raced=True)
