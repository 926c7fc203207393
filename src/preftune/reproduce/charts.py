"""Figures of claims: curves, bands over seeds and bars, in the colours of the report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from preftune.figures import interval
from preftune.report.drawing import PALETTE, Trace

BLUE, RED, GREEN = PALETTE[:3]


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
        figure.add_traces(mean_line(name, points, values, PALETTE[i % len(PALETTE)]))
    return styled(figure, title, x, y, log_x, log_y)


def bars(title: str, y: str, series: Mapping[str, Tensor]) -> Any:
    """A bar a name: mean and 95 % interval over seeds of values [S]."""
    import plotly.graph_objects as go

    mean, low, high = _intervals(series.values())
    up = [h - m for m, h in zip(mean, high, strict=True)]
    down = [m - w for m, w in zip(mean, low, strict=True)]
    figure = go.Figure()
    figure.add_bar(
        x=list(series), y=mean, marker_color=BLUE, showlegend=False,
        error_y={"type": "data", "array": up, "arrayminus": down, "symmetric": False},
    )  # fmt: skip
    return styled(figure, title, "", y)


def chart(title: str, x: str, y: str, traces: Sequence[Trace], *, log: str = "") -> Any:
    """A figure of traces, with powers of ten on its axes.

    Args:
        title: what is seen.
        x: title of the axis, with its unit.
        y: likewise.
        traces: as `curve` and `mean_line` give them.
        log: which axes are logarithmic: "x", "y" or "xy".
    """
    import plotly.graph_objects as go

    figure = styled(go.Figure(list(traces)), title, x, y, "x" in log, "y" in log)
    powers = {"exponentformat": "power"}  # not 10μ for 1e-5
    return figure.update_layout(xaxis=powers, yaxis=powers)


def styled(
    figure: Any, title: str, x: str, y: str, log_x: bool = False, log_y: bool = False
) -> Any:
    """With titles and the page's look."""
    figure.update_layout(
        template="plotly_white", title={"text": title, "font": {"size": 15}}, height=420,
        xaxis={"title": x, "type": "log" if log_x else "-"},
        yaxis={"title": y, "type": "log" if log_y else "-"},
        legend={"orientation": "h", "y": -0.3, "yanchor": "top"},
        margin={"t": 56, "l": 64, "r": 16, "b": 110},
    )  # fmt: skip
    return figure


def curve(
    name: str,
    x: Sequence[float] | Tensor,
    y: Sequence[float] | Tensor,
    colour: str,
    dash: str = "solid",
    **more: Any,
) -> Trace:
    """A line through points."""
    points = {k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in (("x", x), ("y", y))}
    style = {"color": colour, "dash": dash, "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "line": style} | points | more


def mean_line(
    name: str, x: Sequence[float], values: Float[Tensor, "S E"], colour: str, **more: Any
) -> list[Trace]:
    """A line through the means over seeds, on a band of their 95 % bootstrap intervals."""
    mean, low, high = _intervals(values.unbind(-1))
    band = curve(
        name, [*x, *reversed(x)], [*high, *reversed(low)], colour, fill="toself",
        fillcolor=_faint(colour), line={"width": 0}, hoverinfo="skip", showlegend=False,
        legendgroup=name,
    )  # fmt: skip
    style = {"mode": "lines+markers", "legendgroup": name, "marker": {"size": 5}}
    return [band, curve(name, x, mean, colour, **style | more)]


def by_beta(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Trace]:
    """A line of y over x for each β of the rows."""
    found = []
    for beta, colour in zip(sorted({row["beta"] for row in rows}), PALETTE, strict=False):
        mine = [row for row in rows if row["beta"] == beta]
        found.append(curve(f"β = {beta:g}", [r[x] for r in mine], [r[y] for r in mine], colour))
    return found


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


def _intervals(columns: Iterable[Tensor]) -> tuple[list[float], list[float], list[float]]:
    """Means, low and high ends of columns [S]; the mean thrice where one seed gives no interval."""
    found = []
    for column in columns:
        f = interval(column[:, None])
        mean = f["value"] or 0.0
        found.append((mean, *(mean if f[end] is None else f[end] for end in ("low", "high"))))
    mean, low, high = (list(ends) for ends in zip(*found, strict=True))
    return mean, low, high


def _faint(colour: str) -> str:
    """The colour, for a band."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},0.18)"
