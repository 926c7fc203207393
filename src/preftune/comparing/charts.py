"""The charts of a comparison: rewards against what was spent, and against KL with best-of-n."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from preftune.comparing import wording
from preftune.report.drawing import (
    DASHES,
    NEUTRAL,
    PALETTE,
    Chart,
    Estimate,
    Style,
    Trace,
    error_bar,
)

AXES = {
    "step": ("steps", "updates"),
    "trained": ("samples", "responses trained on"),
    "seconds": ("seconds", "seconds of training"),
    "kl": ("KL", "KL to the untrained model (nats a response)"),
}
"""What a chart may stand against: its button, its title."""
Found = Mapping[str, Any]


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour a competitor, then dashes."""
    return {
        name: Style(colour=PALETTE[i % len(PALETTE)], dash=DASHES[i // len(PALETTE) % len(DASHES)])
        for i, name in enumerate(names)
    }


def charts(found: Found) -> list[Chart]:
    """Those that the figures allow."""
    able = [m for m in found["methods"] if m["curves"]]
    drawn = styles([m["name"] for m in found["methods"]])
    places = {m["name"]: i for i, m in enumerate(found["methods"])}
    by = found["judged_by"]
    roles = [r for r in ("gold", "reward") if any(r in m["figures"] for m in able)]
    out = [_way(role, able, drawn, places, found) for role in roles]
    if any("kl" in m["figures"] for m in able):
        out.append(_frontier(by, able, drawn, places, found))
    return out


def _title(role: str, found: Found) -> str:
    gold = found["facts"]["gold"] is not None
    return "Gold reward" if role == "gold" else "Reward (proxy)" if gold else "Reward"


def _way(
    role: str, able: Sequence[Found], drawn: Mapping[str, Style], places: Mapping[str, int],
    found: Found,
) -> Chart:  # fmt: skip
    """A reward on the way of all runs: thin lines are seeds, the thick one is their mean."""
    data: list[Trace] = []
    for method in able:
        style, place = drawn[method["name"]], places[method["name"]]
        ways = [curve["points"] for curve in method["curves"]]
        if role not in ways[0][0]:
            continue
        data += [_line(points, role, style, place, method["name"], thin=True) for points in ways]
        data.append(_line(mean_way(ways), role, style, place, method["name"], thin=False))
    few = able[0]["curves"][0]["prompts"] if able else 0
    return Chart(
        name=f"way-{role}",
        title=f"{_title(role, found)} on the way",
        reading=f"Thin lines are seeds, thick ones their means, on {few} held-out prompts: noisier "
        "than the table, which is of all. The learning rate falls over the whole run, so a point "
        "half-way is not what a run of half the length would reach.",
        data=data,
        layout={
            "xaxis": {"title": {"text": AXES["step"][1]}}, "yaxis": _reward_axis(role, found),
            "hovermode": "closest", "height": 420,
        },
    )  # fmt: skip


def _reward_axis(role: str, found: Found) -> dict[str, Any]:
    """Its title, with the unit where that is known."""
    unit = wording.unit(found["facts"][role]) or "the reward's own unit"
    return {"title": {"text": html.escape(f"{_title(role, found)} ({unit})")}}


def mean_way(ways: Sequence[Sequence[Found]]) -> list[dict[str, float]]:
    """The mean over seeds of each point that all of them have."""
    shared = [
        p["step"] for p in ways[0] if all(any(q["step"] == p["step"] for q in w) for w in ways)
    ]
    at = [{p["step"]: p for p in way} for way in ways]
    return [
        {k: sum(a[step][k] for a in at) / len(at) for k in at[0][step]} for step in shared
    ]  # fmt: skip


def _line(
    points: Sequence[Found], role: str, style: Style, place: int, name: str, *, thin: bool
) -> Trace:
    axes = {key: [p.get(key) for p in points] for key in AXES}
    return {
        "type": "scatter", "name": html.escape(name), "meta": place, "axes": axes,
        "x": axes["step"], "y": [p[role] for p in points],
        "mode": "lines" if thin else "lines+markers", "opacity": 0.3 if thin else 1.0,
        "line": {"color": style.colour, "dash": style.dash, "width": 1 if thin else 2.5},
        "marker": {"color": style.colour, "size": 5},
        "hoverinfo": "skip" if thin else "all",
    }  # fmt: skip


def _frontier(
    by: str, able: Sequence[Found], drawn: Mapping[str, Style], places: Mapping[str, int],
    found: Found,
) -> Chart:  # fmt: skip
    """Reward against KL: seeds, means, best-of-n."""
    data: list[Trace] = [*_best_of_n(by, found)]
    for method in able:
        style, place = drawn[method["name"]], places[method["name"]]
        figures = method["figures"]
        if "kl" not in figures:
            continue
        kl, reward = (Estimate(**_ends(figures[f])) for f in ("kl", by))
        base: Trace = {"type": "scatter", "name": html.escape(method["name"]), "meta": place}
        way = mean_way([curve["points"] for curve in method["curves"]])[:-1]
        data.append(base | {
            "x": [p["kl"] for p in way] + [kl.value], "y": [p[by] for p in way] + [reward.value],
            "mode": "lines+markers", "marker": {"color": style.colour, "size": 4}, "opacity": 0.6,
            "line": {"color": style.colour, "dash": style.dash, "width": 1.5}, "hoverinfo": "skip",
        })  # fmt: skip
        data.append(base | {
            "x": [kl.value], "y": [reward.value], "mode": "markers",
            "error_x": error_bar(kl, style.colour), "error_y": error_bar(reward, style.colour),
            "marker": {"color": style.colour, "size": 12, "line": {"color": "white", "width": 1}},
            "hovertemplate": "KL %{x:.3~f} nats<br>reward %{y:.3~f}",
        })  # fmt: skip
    return Chart(
        name="frontier",
        title=f"{_title(by, found)} against KL",
        reading="Large points are the final models with 95 % intervals, small ones the way there. "
        "Up and to the left is better; methods on one curve trade reward for KL at the same rate. "
        "The dashed line trains nothing: the best of n answers of the untrained model, at the "
        "upper bound log n − (n − 1)/n of its KL. Intervals may reach beyond the chart.",
        data=data,
        layout={
            "xaxis": {"title": {"text": AXES["kl"][1]}, "range": _range(data, "x")},
            "yaxis": _reward_axis(by, found) | {"range": _range(data, "y")},
            "hovermode": "closest", "height": 420,
        },
    )  # fmt: skip


def _range(data: Sequence[Trace], axis: str) -> list[float]:
    """Of the points: the long intervals of few seeds would leave them in a corner."""
    values = [v for trace in data for v in trace[axis] if v is not None]
    low, high = min(values), max(values)
    room = 0.15 * (high - low) or 1.0
    return [low - room, high + room]


def _ends(figure: Found) -> dict[str, float | None]:
    return {k: figure[k] for k in ("value", "low", "high")}


def _best_of_n(by: str, found: Found) -> list[Trace]:
    rows = found["reference"]["best_of_n"].get(by, [])
    if not rows:
        return []
    return [{
        "type": "scatter", "name": "best of n", "meta": -1,
        "x": [r["kl"] for r in rows], "y": [r["value"] for r in rows],
        "mode": "lines+markers+text", "text": [f"best of {r['n']}" if r["n"] > 1 else "untrained"
                                               for r in rows],
        "textposition": "bottom right", "textfont": {"size": 11},
        "line": {"color": NEUTRAL, "dash": "dash", "width": 2},
        "marker": {"color": NEUTRAL, "size": 6, "symbol": "diamond"},
        "customdata": [r["n"] for r in rows],
        "hovertemplate": "best of %{customdata}<br>KL at most %{x:.3~f} nats<br>reward %{y:.3~f}",
    }]  # fmt: skip
