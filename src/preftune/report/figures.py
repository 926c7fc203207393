"""The charts as plain plotly.js figures (dictionaries of data and layout).

Building dictionaries keeps this module free of plotly, which is needed only for its script. Text
colours and grids are left to the page's script, which knows whether the page is light or dark.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from preftune.report.read import Estimate, RunFolder, last_evaluation, series

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


def reward_unit(runs: Sequence[RunFolder]) -> str:
    """`tokens` where every reward is a length, otherwise unknown to the page."""
    rewards = {run.settings["reward"] for run in runs if "reward" in run.settings}
    is_length = bool(rewards) and all(reward.startswith("length:") for reward in rewards)
    return "tokens" if is_length else "the reward's own unit"


def charts(runs: Sequence[RunFolder]) -> list[Chart]:
    """Every chart for which some run has data."""
    found = [
        _evaluation_chart(
            runs,
            key="reward",
            title="Held-out reward",
            axis=f"Reward ({reward_unit(runs)})",
            reading="Mean reward of sampled answers to held-out prompts; the band is the 95 % "
            "interval and the dotted line the untrained model. Higher is better.",
        ),
        _evaluation_chart(
            runs,
            key="kl",
            title="Held-out KL to the reference",
            axis="KL (nats a response)",
            reading="How far the model has moved from the untrained one on held-out prompts; at "
            "equal reward, lower is better.",
        ),
        _log_ratio_chart(
            runs,
            "chosen",
            "Above 0 the model gives the preferred responses more probability than the untrained "
            "model does; offline contrastive methods often push this below 0.",
        ),
        _log_ratio_chart(
            runs,
            "rejected",
            "The same for the responses that were not preferred; what a contrastive method trains "
            "is the gap between this chart and the one for chosen responses.",
        ),
        _loss_chart(runs),
        _frontier_chart(runs),
    ]
    return [chart for chart in found if chart is not None]


def _indexed(runs: Sequence[RunFolder]) -> Iterator[tuple[int, RunFolder, Style]]:
    for index, (run, style) in enumerate(zip(runs, styles(runs), strict=True)):
        yield index, run, style


T = TypeVar("T")


def _thin(points: list[T]) -> list[T]:
    """At most `MOST_POINTS` and the last one: an SVG of more is slow and looks the same."""
    if len(points) <= MOST_POINTS:
        return points
    stride = -(-len(points) // MOST_POINTS)
    kept = points[::stride]
    return kept if (len(points) - 1) % stride == 0 else [*kept, points[-1]]


def _trace(index: int, run: RunFolder, style: Style, **more: Any) -> Trace:
    """`meta` is the run's place, by which the page's legend finds its traces in every chart."""
    # plotly.js reads names as a small markup language, so they are escaped as in HTML.
    return {"type": "scatter", "name": html.escape(run.label), "meta": index} | more


def _line(
    index: int, run: RunFolder, style: Style, points: list[tuple[float, float | None]]
) -> Trace:
    points = _thin(points)
    return _trace(
        index,
        run,
        style,
        x=[step for step, _ in points],
        y=[value for _, value in points],
        mode="lines+markers" if len(points) <= 60 else "lines",
        line={"color": style.colour, "dash": style.dash, "width": 2},
        marker={"color": style.colour, "size": 5, "symbol": style.symbol},
    )


def _band(index: int, run: RunFolder, style: Style, key: str) -> Trace | None:
    low, high = dict(series(run, f"{key}_low")), dict(series(run, f"{key}_high"))
    ends = [(step, low[step], high[step]) for step in low if step in high]
    ends = _thin([end for end in ends if None not in end])
    if len(ends) < 2:
        return None
    red, green, blue = (int(style.colour[at : at + 2], 16) for at in (1, 3, 5))
    return _trace(
        index,
        run,
        style,
        x=[end[0] for end in ends] + [end[0] for end in reversed(ends)],
        y=[end[2] for end in ends] + [end[1] for end in reversed(ends)],
        mode="lines",
        line={"width": 0, "color": style.colour},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.14)",
        hoverinfo="skip",
    )


def _step_layout(axis: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": "Steps (updates)"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": html.escape(axis)}, "hoverformat": ".3~f"},
        "hovermode": "x unified",
    }


def _evaluation_chart(
    runs: Sequence[RunFolder], *, key: str, title: str, axis: str, reading: str
) -> Chart | None:
    bands: list[Trace] = []
    lines: list[Trace] = []
    for index, run, style in _indexed(runs):
        points = series(run, f"eval_{key}")
        if any(value is not None for _, value in points):
            band = _band(index, run, style, f"eval_{key}")
            bands += [band] if band else []
            lines.append(_line(index, run, style, points))
    if not lines:
        return None
    last = max(max(line["x"]) for line in lines)
    for index, run, style in _indexed(runs):
        value = last_evaluation(run, key).value
        if run.is_reference and value is not None and key == "reward":
            flat = _line(index, run, style, [(0.0, value), (last, value)])
            lines.append(flat | {"mode": "lines"})
    return Chart(
        name=f"eval-{key}", title=title, reading=reading, data=bands + lines,
        layout=_step_layout(axis),
    )  # fmt: skip


def _log_ratio_chart(runs: Sequence[RunFolder], role: str, reading: str) -> Chart | None:
    lines: list[Trace] = []
    ends = [0.0]  # 0 is where training starts and what the reader compares with
    for index, run, style in _indexed(runs):
        # Both panels span the same range, so that the gap between them can be seen.
        for key in ("log_ratio_chosen", "log_ratio_rejected"):
            ends += [value for _, value in series(run, key) if value is not None]
        points = series(run, f"log_ratio_{role}")
        if any(value is not None for _, value in points):
            lines.append(_line(index, run, style, points))
    if not lines:
        return None
    layout = _step_layout("Log-ratio (nats a response)")
    margin = 0.05 * (max(ends) - min(ends)) or 1.0
    layout["yaxis"] |= {"range": [min(ends) - margin, max(ends) + margin]}
    return Chart(
        name=f"log-ratio-{role}",
        title=f"Log-prob of {role} relative to the reference",
        reading=reading,
        data=lines,
        layout=layout,
    )


def _loss_height(rows: int) -> int:
    return min(760, max(360, 90 + 125 * rows))


def _loss_chart(runs: Sequence[RunFolder]) -> Chart | None:
    """One row a run, each with a scale of its own: losses of different methods share no unit."""
    shown = [
        (index, run, style, series(run, "loss"))
        for index, run, style in _indexed(runs)
        if any(value is not None for _, value in series(run, "loss"))
    ]
    if not shown:
        return None
    layout: dict[str, Any] = {"height": _loss_height(len(shown)), "hovermode": "x unified"}
    lines: list[Trace] = []
    rows = len(shown)
    gap = 0.12 / rows if rows > 1 else 0.0
    for row, (index, run, style, points) in enumerate(shown):
        number = "" if row == 0 else str(row + 1)
        top = 1 - row / rows
        layout[f"yaxis{number}"] = {
            "domain": [top - 1 / rows + (gap if row < rows - 1 else 0.0), top],
            "title": {"text": "Loss"},
            "nticks": 5,
            "hoverformat": ".3~f",
        }
        lines.append(_line(index, run, style, points) | {"yaxis": f"y{number}", "mode": "lines"})
    layout["xaxis"] = {
        "title": {"text": "Steps (updates)"},
        "rangemode": "tozero",
        "anchor": f"y{rows}" if rows > 1 else "y",
    }
    return Chart(
        name="loss",
        title="Training loss",
        reading="Each method's own loss on its training batches, each row on its own scale: the "
        "shape says whether training is stable, the levels cannot be compared across methods.",
        data=lines,
        layout=layout,
    )


def _error(estimate: Estimate, style: Style) -> dict[str, Any]:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return {"visible": False, "array": []}
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, estimate.high - estimate.value)],
        "arrayminus": [max(0.0, estimate.value - estimate.low)],
        "color": style.colour,
        "thickness": 1.5,
        "width": 4,
    }


def _path(run: RunFolder) -> list[tuple[float, float, float]]:
    """(KL, reward, step) at each evaluated step that has both."""
    reward = dict(series(run, "eval_reward"))
    path: list[tuple[float, float, float]] = []
    for step, kl in series(run, "eval_kl"):
        value = reward.get(step)
        if kl is not None and value is not None:
            path.append((kl, value, step))
    return path


def _final(index: int, run: RunFolder, style: Style) -> Trace | None:
    kl, reward = last_evaluation(run, "kl"), last_evaluation(run, "reward")
    if run.is_reference and kl.value is None:
        kl = Estimate(value=0.0)  # its divergence from itself
    if kl.value is None or reward.value is None:
        return None
    return _trace(
        index,
        run,
        style,
        x=[kl.value],
        y=[reward.value],
        error_x=_error(kl, style),
        error_y=_error(reward, style),
        mode="markers",
        marker={
            "color": style.colour,
            "size": 12,
            "symbol": style.symbol,
            "line": {"color": "white", "width": 1},
        },
        hovertemplate="final<br>KL %{x:.3~f} nats<br>reward %{y:.3~f}",
    )


def _frontier_chart(runs: Sequence[RunFolder]) -> Chart | None:
    traces: list[Trace] = []
    finals: list[Trace] = []
    for index, run, style in _indexed(runs):
        path = _thin(_path(run))
        if path:
            line = _line(index, run, style, [(kl, reward) for kl, reward, _ in path])
            line |= {
                "mode": "lines+markers",
                "customdata": [step for _, _, step in path],
                "hovertemplate": "step %{customdata}<br>KL %{x:.3~f} nats<br>reward %{y:.3~f}",
            }
            traces.append(line)
        final = _final(index, run, style)
        finals += [final] if final else []
    if not traces and not finals:
        return None
    return Chart(
        name="frontier",
        title="Reward against KL",
        reading="Each small point is an evaluation during training, each large one the final model "
        "with 95 % intervals; up and to the left is better, and methods that lie on one curve "
        "trade reward for KL at the same rate.",
        data=traces + finals,
        layout={
            "xaxis": {"title": {"text": "KL to the reference (nats a response)"}},
            "yaxis": {"title": {"text": f"Reward ({html.escape(reward_unit(runs))})"}},
            "hovermode": "closest",
            "height": min(465, _loss_height(len(runs) - 1)),  # it stands beside the losses
        },
    )
