"""Runs every candidate on every problem, as far as each problem's budget goes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from preftune.advising import candidates, costs, scene
from preftune.advising.candidates import Setting
from preftune.advising.problem import Problem
from preftune.advising.scene import Scene
from preftune.study import Cell, Row, advance

POINTS = 24
"""Figures of a run are taken at so many places."""
PROBED = 4
"""Updates by which what an update takes is told."""


@dataclass(frozen=True)
class Arm:
    """A candidate with a setting, on one problem."""

    problem: int
    """Its place in the order of files."""
    setting: Setting


@dataclass(frozen=True)
class Job:
    """Runs of one setting that advance together."""

    setting: Setting
    cell: Cell
    runs: tuple[int, ...]


def jobs(
    folder: str, each: Sequence[Problem], arms: Iterable[Arm], seeds: Sequence[int], base: int = 0
) -> list[Job]:
    """What must be run: arms of one setting, on problems of one shape and budget, together.

    Args:
        base: moves every seed.
    """
    place = Scene(folder=folder, digest=scene.digest(folder))
    together: dict[tuple[object, ...], list[Arm]] = {}
    for arm in arms:
        p = each[arm.problem]
        together.setdefault((arm.setting, p.shape, p.budget), []).append(arm)
    found: list[Job] = []
    for group in together.values():
        setting, those = group[0].setting, [each[a.problem] for a in group]
        runs = tuple(scene.run_number(a.problem, s, base) for a in group for s in seeds)
        found.append(Job(setting, cell(place, setting, those, runs[0]), runs))
    return found


def cell(place: Scene, setting: Setting, those: Sequence[Problem], a_run: int) -> Cell:
    """The runs of one setting on these problems, as long as the longest that one can afford."""
    method = setting.method(those[0].beta)
    least = min(_price(place, setting, p, a_run) for p in those)
    updates = max(2, math.ceil(those[0].budget / least))
    return Cell(
        problem=place, method=method, updates=updates, batch_size=setting.batch_size,
        learning_rate=setting.learning_rate, eval_every=max(1, updates // POINTS),
    )  # fmt: skip


def _price(place: Scene, setting: Setting, problem: Problem, a_run: int) -> float:
    """Of an update."""
    trained, drawn, judged = _taken(place, setting.row, setting.batch_size, setting.flat, a_run)
    return trained + problem.prices.sample * drawn + problem.prices.label * judged


@cache
def _taken(
    place: Scene, row: str, batch_size: int, flat: tuple[tuple[str, object], ...], a_run: int
) -> tuple[float, float, float]:
    """Responses trained, drawn and judged by an update after the first."""
    first = next(s for s in candidates.settings_of(row) if s.flat == flat)
    method = first.method(place.problem(a_run).beta)
    cell = Cell(
        problem=place, method=method, updates=2 * PROBED, batch_size=batch_size,
        learning_rate=0.0, eval_every=PROBED,
    )  # fmt: skip
    rows = advance(cell, (a_run,))
    before, after = rows[-2], rows[-1]
    kept = len(place.problem(a_run).pairs) > PROBED * batch_size  # drawn once: later it is free

    def taken(name: str) -> float:
        return (after[name] - before[name]) / PROBED

    if kept and not any(t.source.on_policy for t in method.terms):
        return taken("trained"), 0.0, 0.0
    return taken("trained"), taken("drawn"), taken("judged")


def curve(problem: Problem, rows: Sequence[Row]) -> list[dict[str, float]]:
    """A run's figures in order, each with what has been spent by then."""
    ordered = sorted(rows, key=lambda r: r["step"])
    return [
        {k: float(v) for k, v in row.items() if isinstance(v, (int, float))}
        | {"spent": costs.spent(problem, *(row[n] for n in costs.COUNTS))}
        for row in ordered
    ]


def at(points: Sequence[Mapping[str, float]], name: str, budget: float) -> float:
    """A figure when so much has been spent, between the places where it was taken; at the start
    where the budget does not reach beyond it, at the end where the run ended before."""
    before = points[0]
    for point in points[1:]:
        if point["spent"] >= budget:
            # what is spent before the first update (a reward model) buys nothing by itself
            start = before["spent"] if before["step"] else _first_price(points)
            share = (budget - start) / max(point["spent"] - start, 1e-9)
            return before[name] + max(0.0, min(1.0, share)) * (point[name] - before[name])
        before = point
    return before[name]


def _first_price(points: Sequence[Mapping[str, float]]) -> float:
    """Spent before the first update: what stands over the line through the first two places."""
    if len(points) < 3:
        return points[0]["spent"]
    first, second = points[1], points[2]
    slope = (second["spent"] - first["spent"]) / max(second["step"] - first["step"], 1)
    return max(0.0, first["spent"] - slope * first["step"])
