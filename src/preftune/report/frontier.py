"""The chart of reward against KL: each run's path, its end, and best-of-n from the untrained model.

Where a gold reward was measured (one that nothing was trained or chosen by) the chart is by it;
otherwise by the training reward, and headed a proxy.
"""

import html
from collections.abc import Sequence

from preftune.report.drawing import (
    NEUTRAL,
    Chart,
    Style,
    Trace,
    error_bar,
    indexed,
    line,
    loss_height,
    reward_unit,
    thin,
    trace,
)
from preftune.report.read import (
    Estimate,
    RunFolder,
    best_of_kl,
    best_of_n,
    gold_of,
    last_evaluation,
    series,
)


def _path(run: RunFolder, key: str) -> list[tuple[float, float, float]]:
    """(KL, reward, step) at each evaluated step that has both."""
    reward = dict(series(run, f"eval_{key}"))
    path: list[tuple[float, float, float]] = []
    for step, kl in series(run, "eval_kl"):
        value = reward.get(step)
        if kl is not None and value is not None:
            path.append((kl, value, step))
    return path


def _final(index: int, run: RunFolder, style: Style, key: str) -> Trace | None:
    kl, reward = last_evaluation(run, "kl"), last_evaluation(run, key)
    if run.is_reference and kl.value is None:
        kl = Estimate(value=0.0)  # its divergence from itself
    if kl.value is None or reward.value is None:
        return None
    return trace(
        index,
        run,
        x=[kl.value],
        y=[reward.value],
        error_x=error_bar(kl, style.colour),
        error_y=error_bar(reward, style.colour),
        mode="markers",
        marker={
            "color": style.colour,
            "size": 12,
            "symbol": style.symbol,
            "line": {"color": "white", "width": 1},
        },
        hovertemplate="final<br>KL %{x:.3~f} nats<br>reward %{y:.3~f}",
    )


def _best_of_n(runs: Sequence[RunFolder], key: str) -> list[Trace]:
    """One curve for each untrained model and reward: that of the run with the most of it."""
    curves: dict[tuple[str, str], dict[int, Estimate]] = {}
    for run in runs:
        model = run.settings.get("reference") or run.settings.get("model", "")
        place = (model, run.settings.get("reward", ""))
        curve = best_of_n(run, key)
        if len(curve) > len(curves.get(place, {})):
            curves[place] = curve
    traces: list[Trace] = []
    for (model, _), curve in curves.items():
        name = f"best of {max(curve)}" if len(curves) == 1 else f"best of {max(curve)}, {model}"
        label = html.escape(name)  # plotly.js reads names as a small markup language
        ends = [e for e in curve.values() if e.low is not None and e.high is not None]
        traces.append({
            "type": "scatter", "name": "best-of-n", "meta": -1,  # no run's: it stays
            "x": [best_of_kl(n) for n in curve],
            "y": [e.value for e in curve.values()],
            "error_y": {
                "type": "data", "symmetric": False, "color": NEUTRAL, "thickness": 1, "width": 2,
                "array": [(e.high or 0.0) - (e.value or 0.0) for e in ends],
                "arrayminus": [(e.value or 0.0) - (e.low or 0.0) for e in ends],
                "visible": len(ends) == len(curve),
            },
            "mode": "lines+markers+text",
            "text": ["" for _ in list(curve)[:-1]] + [label],
            "textposition": "top left",
            "line": {"color": NEUTRAL, "dash": "dash", "width": 2},
            "marker": {"color": NEUTRAL, "size": 5, "symbol": "cross"},
            "customdata": list(curve),
            "hovertemplate": "best of %{customdata}<br>KL at most %{x:.3~f} nats<br>"
            "reward %{y:.3~f}",
        })  # fmt: skip
    return traces


def frontier_chart(runs: Sequence[RunFolder]) -> Chart | None:
    """Reward against KL, where some run has both."""
    gold = gold_of(runs)
    key = gold or "reward"
    traces: list[Trace] = []
    finals: list[Trace] = []
    for index, run, style in indexed(runs):
        path = thin(_path(run, key))
        if path:
            drawn = line(index, run, style, [(kl, reward) for kl, reward, _ in path])
            drawn |= {
                "mode": "lines+markers",
                "customdata": [step for _, _, step in path],
                "hovertemplate": "step %{customdata}<br>KL %{x:.3~f} nats<br>reward %{y:.3~f}",
            }
            traces.append(drawn)
        final = _final(index, run, style, key)
        finals += [final] if final else []
    if not traces and not finals:
        return None
    best = _best_of_n(runs, key)
    reading = (
        "Each small point is an evaluation during training, each large one the final model with "
        "95 % intervals; up and to the left is better, and methods that lie on one curve trade "
        "reward for KL at the same rate."
    )
    if best:
        reading += (
            " The dashed grey line trains nothing: it is the best of n answers of the untrained "
            "model, at the upper bound log n − (n − 1)/n of its KL."
        )
    if gold is None:
        reading += " The reward is a proxy: the one trained on."
    unit = html.escape(reward_unit(runs, gold.removeprefix("reward:") if gold else None))
    return Chart(
        name="frontier",
        title="Gold reward against KL" if gold else "Reward (proxy) against KL",
        reading=reading,
        data=best + traces + finals,
        layout={
            "xaxis": {"title": {"text": "KL to the reference (nats a response)"}},
            "yaxis": {"title": {"text": f"{'Gold' if gold else 'Proxy'} reward ({unit})"}},
            "hovermode": "closest",
            "height": min(465, loss_height(len(runs) - 1)),  # it stands beside the losses
        },
    )
