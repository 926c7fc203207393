"""The fitted rule: each row's worth as a linear function of the signs, on 0 (the reference) to 1
(the best row of the problem). The advice is the order of the rows by it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Signs = Mapping[str, float | None]
GOAL = 0.1
"""Mean regret: where more is expected, the tool cannot tell."""
WORST = -1.0
"""Worths below it are taken as it: one broken run should not move a fit."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """worth of row r = bias[r] + sum over signs of weight[r][sign] * (x - mean) / spread."""

    rows: tuple[str, ...]
    names: tuple[str, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    bias: tuple[float, ...]
    weight: tuple[tuple[float, ...], ...]
    """[rows][signs]."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """The range of each sign where the rule was fitted."""
    tier: int
    """Of the diagnosis that its signs come from; -1: it needs none."""

    def standard(self, signs: Signs) -> np.ndarray:
        """Signs in standard deviations from the mean, within 3 of them; unknown ones at it."""
        z = (self._known(signs) - np.array(self.mean)) / np.array(self.spread)
        return np.clip(z, -3.0, 3.0)

    def _known(self, signs: Signs) -> np.ndarray:
        """Signs in their own units, unknown ones at the mean."""
        given = [signs.get(n) for n in self.names]
        x = [m if v is None else v for v, m in zip(given, self.mean, strict=True)]
        return np.array(x, dtype=float)

    def worth(self, signs: Signs) -> dict[str, float]:
        """Of every row, the best first."""
        values = np.array(self.bias) + np.array(self.weight) @ self.standard(signs)
        order = np.argsort(-values, kind="stable")
        return {self.rows[i]: float(values[i]) for i in order}

    def between(self, first: str, second: str, signs: Signs) -> dict[str, float]:
        """How much each sign speaks for the one row over the other, the strongest first."""
        i, j = self.rows.index(first), self.rows.index(second)
        gap = (np.array(self.weight[i]) - np.array(self.weight[j])) * self.standard(signs)
        return dict(sorted(zip(self.names, gap.tolist(), strict=True), key=lambda x: -abs(x[1])))

    def turning(
        self, first: str, second: str, signs: Signs, along: Mapping[str, float]
    ) -> float | None:
        """How far signs must move, all else as it is, for the two rows to draw level.

        Args:
            along: how fast each sign moves, in its own unit: several where one quantity is in
                several signs.

        Returns:
            the step; None where it leads out of the range that the rule was fitted on, or farther
            than three standard deviations from the mean, or where one of several begins there.
        """
        i, j = self.rows.index(first), self.rows.index(second)
        gap = np.array(self.weight[i]) - np.array(self.weight[j])
        z = self.standard(signs)
        lead = self.bias[i] - self.bias[j] + float(gap @ z)
        rate = np.array([along.get(n, 0.0) for n in self.names])
        speed = rate / np.array(self.spread)
        slope = float(gap @ speed)
        if slope == 0:
            return None
        step = -lead / slope
        moves = speed != 0
        there = (z + step * speed)[moves]
        x = np.array(self.mean)[moves] + there * np.array(self.spread)[moves]
        low, high = np.array(self.low)[moves], np.array(self.high)[moves]
        held = (np.abs(there) <= 3.0) & (low <= x) & (x <= high)
        steps = (x - self._known(signs)[moves]) / rate[moves]
        return float(steps[0]) if held.all() and np.allclose(steps, steps[0]) else None

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Racing:
    """When rows are tried before one is chosen."""

    rows: int
    """That are tried; 1: the first is run at once."""
    below: float
    """Where the first row's predicted worth leads the second's by less."""
    share: float = 0.08
    """Of the budget, for each that is tried."""


def of_plain(data: Mapping[str, Any]) -> Rule:
    """The rule of plain data."""
    held: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    held["weight"] = tuple(tuple(w) for w in held["weight"])
    return Rule(**held)


def fit(
    signs: Sequence[Signs], worth: np.ndarray, rows: Sequence[str], ridge: float, tier: int
) -> Rule:
    """Ridge regression of every row's worth.

    Args:
        signs: of each of n problems.
        worth: [n, rows]; NaN where a row was not run.
        ridge: added to the second moment of standardised signs (of mean 1 each).
    """
    names = tuple(signs[0])
    raw = np.array([[np.nan if s[n] is None else s[n] for n in names] for s in signs], dtype=float)
    known = ~np.isnan(raw)
    count = known.sum(0)
    mean = np.where(count > 0, np.nansum(raw, 0) / np.maximum(count, 1), 0.0)
    spread = np.sqrt(np.where(known, (raw - mean) ** 2, 0.0).sum(0) / np.maximum(count, 1))
    spread = np.where(spread > 0, spread, 1.0)
    x = np.clip(np.where(known, (raw - mean) / spread, 0.0), -3.0, 3.0)
    y = np.clip(worth, WORST, None)
    bias, weight = y.mean(0), []
    centre = x.mean(0)
    xc = x - centre
    gram = xc.T @ xc / len(x) + ridge * np.eye(len(names))
    for r in range(len(rows)):
        weight.append(np.linalg.solve(gram, xc.T @ (y[:, r] - bias[r]) / len(x)))
    w = np.stack(weight)
    return Rule(
        rows=tuple(rows), names=names, mean=tuple(mean.tolist()), spread=tuple(spread.tolist()),
        bias=tuple((bias - w @ centre).tolist()), weight=tuple(map(tuple, w.tolist())),
        low=_range(raw, np.fmin), high=_range(raw, np.fmax), tier=tier,
    )  # fmt: skip


def _range(raw: np.ndarray, end: np.ufunc) -> tuple[float, ...]:
    """Of the known values of each sign; 0 where there is none."""
    return tuple(np.nan_to_num(end.reduce(raw, axis=0)).tolist())
