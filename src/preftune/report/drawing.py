"""What the charts are drawn with: one style a run, lines, error bars.

Building dictionaries keeps this module free of plotly, which is needed only for its script. Text
colours and grids are left to the page's script, which knows whether the page is light or dark.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from preftune.report.read import Estimate, RunFolder

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is too pale a line."""
NEUTRAL = "#808080"
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_POINTS = 1000

Trace = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How one run is drawn in every chart."""

    colour: str
    dash: str = "solid"
    symbol: str = "circle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A figure with its heading and one sentence on how to read it."""

    name: str
    title: str
    reading: str
    data: list[Trace]
    layout: dict[str, Any]


def styles(runs: Sequence[RunFolder]) -> list[Style]:
    """One style a run: grey for the untrained model, then colours, then dashes."""
    found: list[Style] = []
    trained = 0
    for run in runs:
        if run.is_reference:
            found.append(Style(colour=NEUTRAL, dash="dot", symbol="diamond"))
            continue
        colour, lap = PALETTE[trained % len(PALETTE)], trained // len(PALETTE)
        found.append(Style(colour=colour, dash=DASHES[lap % len(DASHES)]))
        trained += 1
    return found


def reward_unit(runs: Sequence[RunFolder], gold: str | None = None) -> str:
    """`tokens` where every reward (or the gold one) is a length, otherwise unknown to the page."""
    given = {run.settings["reward"] for run in runs if "reward" in run.settings}
    rewards = given if gold is None else {gold}
    is_length = bool(rewards) and all(reward.startswith("length:") for reward in rewards)
    return "tokens" if is_length else "the reward's own unit"


def indexed(runs: Sequence[RunFolder]) -> Iterator[tuple[int, RunFolder, Style]]:
    """(place, run, style) of each run."""
    for index, (run, style) in enumerate(zip(runs, styles(runs), strict=True)):
        yield index, run, style


T = TypeVar("T")


def thin(points: list[T]) -> list[T]:
    """At most `MOST_POINTS` and the last one: an SVG of more is slow and looks the same."""
    if len(points) <= MOST_POINTS:
        return points
    stride = -(-len(points) // MOST_POINTS)
    kept = points[::stride]
    return kept if (len(points) - 1) % stride == 0 else [*kept, points[-1]]


def trace(index: int, run: RunFolder, **more: Any) -> Trace:
    """`meta` is the run's place, by which the page's legend finds its traces in every chart."""
    # plotly.js reads names as a small markup language, so they are escaped as in HTML.
    return {"type": "scatter", "name": html.escape(run.label), "meta": index} | more


def line(
    index: int, run: RunFolder, style: Style, points: list[tuple[float, float | None]]
) -> Trace:
    """A run's line through (x, y) points; a gap where y is None."""
    points = thin(points)
    return trace(
        index,
        run,
        x=[step for step, _ in points],
        y=[value for _, value in points],
        mode="lines+markers" if len(points) <= 60 else "lines",
        line={"color": style.colour, "dash": style.dash, "width": 2},
        marker={"color": style.colour, "size": 5, "symbol": style.symbol},
    )


def error_bar(estimate: Estimate, colour: str) -> dict[str, Any]:
    """An estimate's interval as plotly draws it."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return {"visible": False, "array": []}
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, estimate.high - estimate.value)],
        "arrayminus": [max(0.0, estimate.value - estimate.low)],
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }


def loss_height(rows: int) -> int:
    """Pixels of the chart of losses with so many rows."""
    return min(760, max(360, 90 + 125 * rows))
