"""When a run ends by itself: its mean reward has not risen for some windows of updates."""

from dataclasses import dataclass
from typing import Any

WINDOW = 25
"""Updates whose mean reward is compared; that of one is mostly noise."""


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """What a run remembers of its rewards: a few numbers, saved with it."""

    total: float = 0.0
    """Of the window under way."""
    count: int = 0
    best: float | None = None
    """The highest mean of a window so far."""
    since: int = 0
    """Windows that ended since without a higher one."""

    def after(self, reward: Any) -> "Plateau":
        """After one more update; where it has no reward, or one for each run, all stays."""
        if not isinstance(reward, float):
            return self
        total, count = self.total + reward, self.count + 1
        if count < WINDOW:
            return Plateau(total=total, count=count, best=self.best, since=self.since)
        mean = total / count
        if self.best is None or mean > self.best:
            return Plateau(best=mean)
        return Plateau(best=self.best, since=self.since + 1)

    def reached(self, patience: int | None) -> bool:
        """So many windows have passed without a gain; never where there is no patience."""
        return patience is not None and self.since >= patience
