"""What an estimator returns: a trusted value with its interval, or a bound, or why neither."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from preftune.figures import Figure, interval

RESAMPLES = 400
"""Of a statistic that is computed anew in each resample."""
TAIL = 0.025
"""Left out of a 95 % interval at either end."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % bootstrap interval over prompts, or what can be said without one."""

    value: float | None
    """None where it is not trusted."""
    low: float | None
    """Lower end of the interval; where not trusted, a lower bound, if there is one."""
    high: float | None
    """Upper end of the interval; where not trusted, an upper bound, if there is one."""
    trusted: bool
    note: str = ""
    """Why it is not trusted and what it would take, or how to read it."""

    def as_json(self) -> dict[str, float | bool | str | None]:
        """As plain data; the note is left out where there is none."""
        plain = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "trusted": self.trusted,
        }
        return plain | ({"note": self.note} if self.note else {})


def of(figure: Figure, note: str = "") -> Estimate:
    """A figure as a trusted estimate; not trusted without an interval, or if it is not finite."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None or not math.isfinite(value):
        return cannot_tell(f"the value is not finite ({value})")
    if low is None or high is None:
        return cannot_tell("cannot tell: no interval (one prompt, or resamples without a value)")
    return Estimate(value=value, low=low, high=high, trusted=True, note=note)


def bound(*, low: float | None = None, high: float | None = None, note: str) -> Estimate:
    """No value, but what it is at least or at most."""
    assert low is None or high is None, "a bound has one end"
    return Estimate(value=None, low=low, high=high, trusted=False, note=note)


def cannot_tell(note: str) -> Estimate:
    """No value and no bound; the note says what it would take."""
    return Estimate(value=None, low=None, high=None, trusted=False, note=note)


def mean(values: Float[Tensor, "N K"], seed: int = 0, note: str = "") -> Estimate:
    """Mean over responses and prompts; the N prompts are resampled, the K responses go along."""
    if not bool(values.isfinite().all()):
        return cannot_tell("some values are not finite")
    return of(interval(values, seed), note)


def share(values: Float[Tensor, "N K"], seed: int = 0, note: str = "") -> Estimate:
    """Mean of values in [0, 1], with an interval that holds up where all of them are 0 or all 1.

    A bootstrap never sees what no prompt has shown. A share p passes N prompts unseen with
    probability at most (1 − p)^N, so that the upper end is at least 1 − .025^{1/N} (3.7 / N for
    large N), and the lower end at most one less that.
    """
    found = mean(values, seed, note)
    if not found.trusted or found.low is None or found.high is None:
        return found
    unseen = 1 - TAIL ** (1 / len(values))
    low, high = min(found.low, 1 - unseen), max(found.high, unseen)
    return Estimate(value=found.value, low=low, high=high, trusted=True, note=note)


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, seed: int = 0) -> Figure:
    """Any statistic of prompts, with the middle 95 % of `RESAMPLES` resamples of them.

    Args:
        statistic: of the indices [count] of the prompts that are in, with repeats.
        count: prompts there are.

    Returns:
        ends None where there is one prompt, or a resample has no finite value.
    """
    value = float(statistic(np.arange(count)))
    if count < 2:
        return {"value": value, "low": None, "high": None}
    generator = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = [statistic(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    if not np.isfinite(drawn).all():
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    return {"value": value, "low": float(low), "high": float(high)}


def columns(*parts: Tensor) -> np.ndarray:
    """Vectors of one number a prompt side by side, [N, C], float64."""
    return np.stack([p.detach().double().cpu().numpy() for p in parts], -1)
