"""One self-contained page of a study of advice."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.durable import write_text
from preftune.report import frame

WORST = 25
"""Problems that are listed."""
SHOWN = ("advice", "best fixed", "half_and_half", "successive halving")


def write_page(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the page; it appears whole or not at all."""
    figures = {"families": _families(result), "rows": _rows(result)}
    parts = {
        "facts": _facts(result),
        "how": html.escape(result["how"]),
        "competitors": _competitors(result),
        "families": _groups("family", result["by_family"]),
        "sources": _groups("who labels", result["by_source"]),
        "kinds": _groups("kind of problem", result["by_kind"]),
        "worst": _worst(result),
        "apart": _apart(result),
    }
    write_text(path, frame.page("preftune.advising", "preftune advise-study", figures, parts))
    return path


def _facts(result: Mapping[str, Any]) -> str:
    facts = {
        "Mean regret of the advice": f"{result['mean_regret']:.3f}",
        f"Best fixed row ({result['best_fixed']})": f"{result['best_fixed_regret']:.3f}",
        "Successive halving": f"{result['halving_regret']:.3f}",
        "Problems": f"{result['problems']} ({len(result['apart'])} apart)",
    }
    return frame.facts(facts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{body}</table></div>'


def _between(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def _competitors(result: Mapping[str, Any]) -> str:
    return _table(
        ("", "mean regret", "95 % interval", "advice less this", "95 % interval, paired",
         "median regret", "mean gain over the reference"),
        (
            (
                name if name != "best fixed" else f"best fixed row ({result['best_fixed']})",
                f"{x['regret']:.3f}", _between(x["interval"]),
                *(("", "") if name == "advice" else
                  (f"{x['advice_less_this']:+.3f}", _between(x["paired"]))),
                f"{x['median']:.3f}", f"{x['gain']:.3f}",
            )
            for name, x in result["competitors"].items()
        ),
    )  # fmt: skip


def _groups(name: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    return _table(
        (name, "problems", *SHOWN),
        (
            (group, str(x["problems"]), *(f"{x[column]:.3f}" for column in SHOWN))
            for group, x in groups.items()
        ),
    )


def _worst(result: Mapping[str, Any]) -> str:
    inside = [x for x in result["each"] if x["inside"]]
    ordered = sorted(inside, key=lambda x: -(1 - x["advice_gain"] / x["gain"]))[:WORST]
    return _table(
        ("problem", "regret", "advised", "best row", "gain of the best", "gain of the advice"),
        (
            (
                x["problem"], f"{1 - x['advice_gain'] / x['gain']:.2f}", x["advised"], x["best"],
                f"{x['gain']:.3f}", f"{x['advice_gain']:.3f}",
            )
            for x in ordered
        ),
    )  # fmt: skip


def _apart(result: Mapping[str, Any]) -> str:
    names = ", ".join(map(html.escape, result["apart"])) or "none"
    return f"Nothing to be gained beyond three standard errors, so no regret: {names}."


def _families(result: Mapping[str, Any]) -> list[Any]:
    families = list(result["by_family"])
    traces = [
        {"type": "bar", "name": name, "x": families,
         "y": [result["by_family"][f][name] for f in families]}
        for name in SHOWN
    ]  # fmt: skip
    return [traces, _layout("mean regret", "group")]


def _rows(result: Mapping[str, Any]) -> list[Any]:
    ordered = sorted(result["rows"].items(), key=lambda x: x[1])
    trace = {"type": "bar", "x": [n for n, _ in ordered], "y": [v for _, v in ordered]}
    line = {
        "type": "scatter", "mode": "lines", "name": "advice", "x": [n for n, _ in ordered],
        "y": [result["mean_regret"]] * len(ordered),
    }  # fmt: skip
    return [[{**trace, "name": "always this row"}, line], _layout("mean regret", "group")]


def _layout(y: str, barmode: str) -> dict[str, Any]:
    return {
        "yaxis": {"title": {"text": y}}, "xaxis": {"tickangle": -40, "automargin": True},
        "margin": {"b": 120, "t": 20, "l": 60, "r": 20}, "barmode": barmode,
        "showlegend": True, "height": 440,
    }  # fmt: skip
