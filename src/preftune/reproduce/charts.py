"""Figures of claims: curves with bands over seeds, in the colours of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from preftune.figures import interval
from preftune.report.drawing import PALETTE


def faint(colour: str) -> str:
    """The colour, for a band."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},0.18)"


def lines(
    title: str,
    x: str,
    y: str,
    series: Mapping[str, tuple[Sequence[float], Tensor]],
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Any:
    """A line a series: mean and 95 % interval over seeds.

    Args:
        series: by name, the points [E] and their values [S, E].
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (name, (points, values)) in enumerate(series.items()):
        colour = PALETTE[i % len(PALETTE)]
        found = [interval(values[:, e : e + 1]) for e in range(values.shape[1])]
        mean = [f["value"] for f in found]
        low = [f["value"] if f["low"] is None else f["low"] for f in found]
        high = [f["value"] if f["high"] is None else f["high"] for f in found]
        figure.add_scatter(
            x=[*points, *reversed(list(points))], y=[*high, *reversed(low)], fill="toself",
            fillcolor=faint(colour), line={"width": 0}, hoverinfo="skip", showlegend=False,
            legendgroup=name, mode="lines",
        )  # fmt: skip
        figure.add_scatter(
            x=list(points), y=mean, name=name, mode="lines+markers", legendgroup=name,
            line={"color": colour}, marker={"size": 5},
        )  # fmt: skip
    return styled(figure, title, x, y, log_x, log_y)


def bars(title: str, y: str, series: Mapping[str, Tensor]) -> Any:
    """A bar a name: mean and 95 % interval over seeds of values [S]."""
    import plotly.graph_objects as go

    found = {name: interval(values[:, None]) for name, values in series.items()}
    mean = [f["value"] or 0.0 for f in found.values()]
    up = [(f["high"] or m) - m for f, m in zip(found.values(), mean, strict=True)]
    down = [m - (f["low"] or m) for f, m in zip(found.values(), mean, strict=True)]
    figure = go.Figure()
    figure.add_bar(
        x=list(found), y=mean, marker_color=PALETTE[0], showlegend=False,
        error_y={"type": "data", "array": up, "arrayminus": down, "symmetric": False},
    )  # fmt: skip
    return styled(figure, title, "", y)


def styled(
    figure: Any, title: str, x: str, y: str, log_x: bool = False, log_y: bool = False
) -> Any:
    """With titles and the page's look."""
    figure.update_layout(
        template="plotly_white", title={"text": title, "font": {"size": 15}}, height=420,
        xaxis={"title": x, "type": "log" if log_x else "-"},
        yaxis={"title": y, "type": "log" if log_y else "-"},
        legend={"orientation": "h", "y": -0.22}, margin={"t": 56, "l": 64, "r": 16, "b": 64},
    )  # fmt: skip
    return figure


def table(
    x: str, y: str, seeds: Sequence[int], series: Mapping[str, tuple[Sequence[float], Tensor]]
) -> list[dict[str, Any]]:
    """The same as data: a row a series, seed and point."""
    return [
        {"series": name, "seed": seed, x: point, y: float(values[s, e])}
        for name, (points, values) in series.items()
        for s, seed in enumerate(seeds[: len(values)])
        for e, point in enumerate(points)
    ]
