"""What a diagnosis looks like: plain dictionaries for plotly's script."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from preftune.diagnosis.coverage import by_direction, optimum_coverage
from preftune.diagnosis.measure import Measured, Surveyed, same_prompts
from preftune.diagnosis.reading import BETAS, SIDES, reward_spread
from preftune.estimators import divergence
from preftune.estimators.estimate import Estimate
from preftune.estimators.surprisal import surprisal_excess
from preftune.report.drawing import NEUTRAL, PALETTE, Chart
from preftune.theory.coverage import profile_bound

OWN = "the reference's own"
COLOURS = {OWN: NEUTRAL, "chosen": PALETTE[2], "rejected": PALETTE[1]}
LEGEND: dict[str, Any] = {
    "showlegend": True,
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
}
"""Above the plot, whose width it would take otherwise."""
MOST = 2000
"""Points of a cloud."""


def charts(measured: Measured, figures: Mapping[str, Estimate]) -> list[Chart]:
    """Those that there is something for."""
    found = [
        _reward_map(measured), _reach(figures), _surprisal(measured), _features(measured),
        _coverage(measured, figures), _optimum(figures),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def _reward_map(measured: Measured) -> Chart | None:
    """Where the reward sits against the reference's likelihood."""
    data, drawn = measured.data, measured.drawn
    if drawn is None or drawn.reward is None:
        return None
    logps = drawn.ref_logps()
    x = (logps - logps.mean(1, keepdim=True)).flatten()
    y = drawn.reward.flatten()
    traces: list[dict[str, Any]] = [
        {"type": "histogram2dcontour", "x": _list(x), "y": _list(y), "ncontours": 8,
         "colorscale": [[0, "rgba(128,128,128,0)"], [1, "rgba(128,128,128,.8)"]],
         "showscale": False, "name": OWN, "hoverinfo": "skip",
         "contours": {"coloring": "fill"}, "line": {"width": 0}},
        _cloud(OWN, x, y, opacity=0.35),
    ]  # fmt: skip
    if data is not None and data.reward is not None and data.tokens.shape[1] == 2:
        mine, theirs = same_prompts(data, drawn)
        assert mine.reward is not None, "judged"
        at = mine.ref_logps() - theirs.ref_logps().mean(1, keepdim=True)
        for k, side in enumerate(SIDES):
            traces.append(_cloud(side, at[:, k], mine.reward[:, k], opacity=0.8))
    return Chart(
        name="map", title="Reward against the reference's likelihood",
        reading="Each point is a response. Right: likelier than the reference's average answer to "
        "the prompt; up: better. Good answers far to the left are out of its reach; pairs that "
        "stand where its own answers do not say little about these.",
        data=traces,
        layout={"xaxis": _axis("log p, less the mean of the prompt's answers (nats)"),
                "yaxis": _axis("reward"), **LEGEND, "height": 420},
    )  # fmt: skip


def _cloud(name: str, x: Tensor, y: Tensor, opacity: float) -> dict[str, Any]:
    stride = max(1, -(-len(x) // MOST))
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": _list(x[::stride]),
        "y": _list(y[::stride]),
        "marker": {"color": COLOURS[name], "size": 5, "opacity": opacity},
    }  # fmt: skip


def _surprisal(measured: Measured) -> Chart | None:
    if measured.data is None:
        return None
    traces: list[dict[str, Any]] = []
    z = _z(measured.data)
    sides = SIDES if z.shape[1] == 2 else ("chosen",)
    for k, side in enumerate(sides):
        traces.append(_histogram(side, z[:, k]))
    if measured.drawn is not None:
        traces.insert(0, _histogram(OWN, _z(measured.drawn).flatten()))
    grid = torch.linspace(-4, 4, 81, dtype=torch.float64)
    normal = (-0.5 * grid.square()).exp() / math.sqrt(2 * math.pi)
    traces.append(
        {"type": "scatter", "mode": "lines", "name": "if they were its own", "x": _list(grid),
         "y": _list(normal), "line": {"color": PALETTE[0], "dash": "dot"}}
    )  # fmt: skip
    return Chart(
        name="surprisal", title="How strange the responses are to the reference",
        reading="Surprise beyond what was to be expected, in standard deviations. Around 0: they "
        "could be its own; to the right: written by somebody else; to the left: tamer than its "
        "samples (greedy, low temperature).",
        data=traces,
        layout={"xaxis": _axis("z", range=[-6, 8]), "yaxis": _axis("density"),
                "barmode": "overlay", **LEGEND},
    )  # fmt: skip


def _z(of: Surveyed) -> Tensor:
    return surprisal_excess(of.ref_logp, of.entropy, of.variance, of.mask)


def _histogram(name: str, values: Tensor) -> dict[str, Any]:
    return {
        "type": "histogram", "name": name, "x": _list(values), "histnorm": "probability density",
        "opacity": 0.5, "marker": {"color": COLOURS[name]},
        "xbins": {"start": -12, "end": 24, "size": 0.5},
    }  # fmt: skip


def _reach(figures: Mapping[str, Estimate]) -> Chart | None:
    points = [(n, figures[f"reach_of_{n}"]) for n in (1, 2, 4, 8, 16) if f"reach_of_{n}" in figures]
    points = [(n, x) for n, x in points if x.trusted]
    if not points:
        return None
    return Chart(
        name="reach", title="Reach of best-of-n",
        reading="Share of prompts in which the best of n of the reference's answers is as good as "
        "the chosen response. Low even at 8: the data show what sampling does not find.",
        data=[_with_ends([n for n, _ in points], [x for _, x in points])],
        layout={"xaxis": _axis("n", type="log", tickvals=[1, 2, 4, 8, 16]),
                "yaxis": _axis("share of prompts", range=[0, 1.05])},
    )  # fmt: skip


def _optimum(figures: Mapping[str, Estimate]) -> Chart | None:
    start = "optimum_kl_"
    found = [(float(n.removeprefix(start)), x) for n, x in figures.items() if n.startswith(start)]
    trusted = [(b, x) for b, x in found if x.trusted]
    bounds = [(b, x.low) for b, x in found if not x.trusted and x.low is not None]
    if not found:
        return None
    return Chart(
        name="optimum", title="How far the optimum is",
        reading="KL of the best policy from the reference, by how much a nat of KL costs (beta, in "
        "standard deviations of the reward). Triangles: at least this; the samples cannot tell.",
        data=[
            _with_ends([b for b, _ in trusted], [x for _, x in trusted]),
            {"type": "scatter", "mode": "markers", "name": "at least",
             "x": [b for b, _ in bounds], "y": [low for _, low in bounds],
             "marker": {"symbol": "triangle-up", "size": 11, "color": PALETTE[1]}},
        ],
        layout={"xaxis": _axis("beta", type="log", tickvals=[b for b, _ in found]),
                "yaxis": _axis("KL, nats", rangemode="tozero")},
    )  # fmt: skip


def _coverage(measured: Measured, figures: Mapping[str, Estimate]) -> Chart | None:
    """Of the policy, where there is one; else of the best policy, as far as samples tell."""
    traces = _of_policy(measured) if measured.own is not None else _of_optimum(measured, figures)
    if not traces:
        return None
    whose = "policy" if measured.own is not None else "optimum"
    return Chart(
        name="coverage", title=f"How much of the {whose} the reference does not cover",
        reading=f"Share of the {whose}'s answers that the reference finds at least N times less "
        "likely. High far to the right: answers that no handful of the reference's samples shows. "
        "Dotted: the most that the KL allows.",
        data=traces,
        layout={"xaxis": _axis("N", type="log", exponentformat="power", rangemode="tozero"),
                "yaxis": _axis(f"P[{whose} / reference ≥ N]", range=[0, 1.05]), **LEGEND},
    )  # fmt: skip


def _of_policy(measured: Measured) -> list[dict[str, Any]]:
    assert measured.own is not None, "asked for"
    ref = measured.own.ref_logps()
    ratio = measured.own.log_ratio()
    top = min(max(4.0, float(ratio[ratio.isfinite()].max())), 690.0)  # what a float holds
    at = torch.linspace(0, top, 121, dtype=torch.float64)
    share = (ratio.flatten()[:, None] >= at).double().mean(0)
    kl = divergence.reverse_kl(ratio + ref, ref).high
    return [
        {"type": "scatter", "mode": "lines", "name": "the policy", "x": _list(at.exp()),
         "y": _list(share), "line": {"shape": "hv", "color": PALETTE[0]}},
        *([] if kl is None else [_most(at[1:].exp().tolist(), kl, PALETTE[0])]),
    ]  # fmt: skip


def _of_optimum(measured: Measured, figures: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    if measured.drawn is None or measured.drawn.reward is None:
        return []
    reward, spread = measured.drawn.reward, reward_spread(measured.drawn.reward)
    samples = reward.shape[-1]
    at = [samples ** (i / 60) for i in range(61)]
    known = [b for b in BETAS if (x := figures.get(f"optimum_kl_{b:g}")) and x.trusted]
    traces: list[dict[str, Any]] = []
    for colour, beta in zip(PALETTE, known, strict=False):
        share = optimum_coverage(reward, beta * spread, at)
        traces.append(
            {"type": "scatter", "mode": "lines", "name": f"beta {beta:g}", "x": at, "y": share,
             "line": {"shape": "hv", "color": colour}}
        )  # fmt: skip
        kl = figures[f"optimum_kl_{beta:g}"].high
        if beta == known[-1] and kl is not None:
            beyond = [samples * 10 ** (i / 20) for i in range(61)]
            traces.append(_most(beyond, kl, colour))
    return traces


def _most(at: list[float], kl: float, colour: str) -> dict[str, Any]:
    """The bound by the KL: (KL + 1/e) / log N."""
    divergent = torch.tensor(kl, dtype=torch.float64)
    return {
        "type": "scatter", "mode": "lines", "name": "at most", "x": at,
        "y": [min(1.0, float(profile_bound(divergent, n))) for n in at],
        "line": {"color": colour, "dash": "dot", "width": 1},
    }  # fmt: skip


def _features(measured: Measured) -> Chart | None:
    """Whether the pairs differ in the ways in which the answers do."""
    answers = measured.own or measured.drawn
    if measured.data is None or answers is None or measured.data.tokens.shape[1] != 2:
        return None
    mine, theirs = same_prompts(measured.data, answers)
    pairs = mine.features()
    found = by_direction(theirs.features(), pairs[:, 0], pairs[:, 1])
    if found is None:
        return None
    place = list(range(1, len(found.own) + 1))
    whose = "the policy's own" if measured.own is not None else OWN
    return Chart(
        name="features", title="Feature coverage",
        reading="How far the model's hidden states differ between the two responses of a pair, and "
        "between two of its own answers, along the directions in which pairs differ most to least. "
        "The answers' line well above the pairs', mostly at the right: ways to differ that the "
        "labels say little about.",
        data=[
            {"type": "scatter", "mode": "lines+markers", "name": name, "x": place,
             "y": _list(values), "line": {"color": colour}, "marker": {"size": 4}}
            for name, values, colour in (
                ("the pairs", found.pairs, PALETTE[2]), (whose, found.own, NEUTRAL)
            )
        ],
        layout={"xaxis": _axis("direction"), **LEGEND,
                "yaxis": _axis("mean squared difference", type="log")},
    )  # fmt: skip


def _with_ends(x: list[float], estimates: list[Estimate]) -> dict[str, Any]:
    value = [e.value or 0.0 for e in estimates]
    high = [(e.high or 0.0) - v for e, v in zip(estimates, value, strict=True)]
    low = [v - (e.low or 0.0) for e, v in zip(estimates, value, strict=True)]
    return {
        "type": "scatter", "mode": "lines+markers", "name": "measured", "x": x, "y": value,
        "line": {"color": PALETTE[0]},
        "error_y": {"type": "data", "symmetric": False, "array": high, "arrayminus": low},
    }  # fmt: skip


def _list(values: Tensor) -> list[float | None]:
    return [round(v, 5) if math.isfinite(v) else None for v in values.tolist()]
