"""The charts as plain plotly.js figures (dictionaries of data and layout)."""

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from preftune.report.drawing import (
    Chart,
    Style,
    Trace,
    indexed,
    line,
    loss_height,
    reward_unit,
    thin,
    trace,
)
from preftune.report.frontier import frontier_chart
from preftune.report.read import RunFolder, gold_of, last_evaluation, series


def charts(runs: Sequence[RunFolder]) -> list[Chart]:
    """Every chart for which some run has data; a gold reward comes before the training reward."""
    gold = gold_of(runs)
    found = [
        None if gold is None else _gold_chart(runs, gold),
        _evaluation_chart(
            runs,
            key="reward",
            title="Held-out reward (proxy)",
            axis=f"Proxy reward ({reward_unit(runs)})",
            reading="Mean reward of sampled answers to held-out prompts; the band is the 95 % "
            "interval and the dotted line the untrained model. Higher is better by this reward, "
            "which is the one trained on: it says nothing of what it does not reward.",
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
        frontier_chart(runs),
    ]
    return [chart for chart in found if chart is not None]


def _band(index: int, run: RunFolder, style: Style, key: str) -> Trace | None:
    low, high = dict(series(run, f"{key}_low")), dict(series(run, f"{key}_high"))
    ends = [(step, low[step], high[step]) for step in low if step in high]
    ends = thin([end for end in ends if None not in end])
    if len(ends) < 2:
        return None
    red, green, blue = (int(style.colour[at : at + 2], 16) for at in (1, 3, 5))
    return trace(
        index,
        run,
        x=[end[0] for end in ends] + [end[0] for end in reversed(ends)],
        y=[end[2] for end in ends] + [end[1] for end in reversed(ends)],
        mode="lines",
        line={"width": 0, "color": style.colour},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.14)",
        hoverinfo="skip",
    )


def _gold_chart(runs: Sequence[RunFolder], gold: str) -> Chart | None:
    name = gold.removeprefix("reward:")
    chart = _evaluation_chart(
        runs,
        key=gold,
        title="Held-out gold reward",
        axis=f"Gold reward ({reward_unit(runs, name)})",
        reading=f"Mean reward by {name}, which nothing was trained, tuned or chosen by. Where it "
        "falls while the proxy rises, the proxy is being exploited.",
    )
    return None if chart is None else replace(chart, name="eval-gold")


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
    for index, run, style in indexed(runs):
        points = series(run, f"eval_{key}")
        if any(value is not None for _, value in points):
            band = _band(index, run, style, f"eval_{key}")
            bands += [band] if band else []
            lines.append(line(index, run, style, points))
    if not lines:
        return None
    last = max(max(line["x"]) for line in lines)
    for index, run, style in indexed(runs):
        value = last_evaluation(run, key).value
        if run.is_reference and value is not None and key != "kl":
            flat = line(index, run, style, [(0.0, value), (last, value)])
            lines.append(flat | {"mode": "lines"})
    return Chart(
        name=f"eval-{key}", title=title, reading=reading, data=bands + lines,
        layout=_step_layout(axis),
    )  # fmt: skip


def _log_ratio_chart(runs: Sequence[RunFolder], role: str, reading: str) -> Chart | None:
    lines: list[Trace] = []
    ends = [0.0]  # 0 is where training starts and what the reader compares with
    for index, run, style in indexed(runs):
        # Both panels span the same range, so that the gap between them can be seen.
        for key in ("log_ratio_chosen", "log_ratio_rejected"):
            ends += [value for _, value in series(run, key) if value is not None]
        points = series(run, f"log_ratio_{role}")
        if any(value is not None for _, value in points):
            lines.append(line(index, run, style, points))
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


def _loss_chart(runs: Sequence[RunFolder]) -> Chart | None:
    """One row a run, each with a scale of its own: losses of different methods share no unit."""
    shown = [
        (index, run, style, series(run, "loss"))
        for index, run, style in indexed(runs)
        if any(value is not None for _, value in series(run, "loss"))
    ]
    if not shown:
        return None
    layout: dict[str, Any] = {"height": loss_height(len(shown)), "hovermode": "x unified"}
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
        lines.append(line(index, run, style, points) | {"yaxis": f"y{number}", "mode": "lines"})
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
