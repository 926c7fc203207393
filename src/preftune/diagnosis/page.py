"""One self-contained page of a diagnosis: verdict, pictures, figures, data."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.diagnosis.charts import charts
from preftune.diagnosis.measure import Measured
from preftune.diagnosis.reading import DOCUMENTED
from preftune.durable import write_text
from preftune.estimators.estimate import Estimate
from preftune.report import frame

NOTE = "Nobody has measured what this advice is worth."


def write_page(
    path: Path,
    measured: Measured,
    figures: Mapping[str, Estimate],
    facts: Mapping[str, Any],
    data: Mapping[str, Any],
    verdict: Sequence[str],
    *,
    title: str = "Which method fits?",
    heading: str = "Verdict",
    note: str = NOTE,
) -> Path:
    """Write the page; it appears whole or not at all.

    Args:
        data: data health as plain data.
        verdict: lines of text; the first is the headline, indented ones belong to it.
        note: what the advice is worth: up to models of which size it was validated, if it was.
    """
    shown = charts(measured, figures)
    parts = {
        "title": _text(title),
        "heading": _text(heading),
        "note": _text(note),
        "facts": _facts(facts),
        "verdict": _verdict(verdict),
        "charts": "".join(
            f"<figure><h3>{_text(c.title)}</h3><figcaption>{_text(c.reading)}</figcaption>"
            f'<div class=chart id="chart-{c.name}"></div></figure>'
            for c in shown
        ),
        "table": _table(figures),
        "data": _data(data),
    }
    drawn = {c.name: [c.data, c.layout] for c in shown}
    text = frame.page("preftune.diagnosis", f"preftune: {title}", drawn, parts)
    write_text(path, text, errors="replace")
    return path


def meaning(name: str) -> str:
    """What a figure is, by the longest pattern of `DOCUMENTED` that its name has."""
    if name in DOCUMENTED:
        return DOCUMENTED[name]
    stems = {p.split("SIDE")[0].rstrip("QNB"): p for p in DOCUMENTED if p[-1] in "QNBE"}
    return DOCUMENTED[stems[max((s for s in stems if name.startswith(s)), key=len)]]


def _text(value: object) -> str:
    return html.escape(str(value))


def _verdict(lines: Sequence[str]) -> str:
    """The headline large, what is indented under it (runners-up, what would change it) smaller."""

    def shown(place: int, line: str) -> str:
        kind = "headline" if place == 0 else "under" if line.startswith(" ") else "more"
        return f'<p class="{kind}">{_text(line.strip())}</p>'

    return "".join(shown(i, line) for i, line in enumerate(lines))


def _facts(facts: Mapping[str, Any]) -> str:
    shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in facts.items()}
    return frame.facts({k.replace("_", " "): v for k, v in shown.items() if v is not None})


def _table(figures: Mapping[str, Estimate]) -> str:
    def number(x: float | None) -> str:
        return "–" if x is None else f"{x:.4g}"

    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{number(x.value)}</td><td>{number(x.low)}</td>"
        f"<td>{number(x.high)}</td><td>{_text(meaning(name))}"
        f"{'' if x.trusted else f'<br><em>{_text(x.note)}</em>'}</td></tr>"
        for name, x in figures.items()
    )
    return _scrolling("figures", ("figure", "value", "low", "high", "what it is"), rows)


def _scrolling(kind: str, heads: Sequence[str], rows: str) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _data(data: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name.replace('_', ' '))}</th>"
        f"<td>{_count(f)}</td>"
        f"<td>{_text(', '.join(f['where']))}</td><td>{_text(f['meaning'])}</td></tr>"
        for name, f in data["findings"].items()
        if f["count"] or f["count"] is None
    )
    rules = "".join(f"<li>{_text(name)}: {share:.0%}</li>" for name, share in data["rules"].items())
    return (
        f"<p>{data['rows']} rows, {data['distinct_rows']} of them different, "
        f"{data['distinct_prompts']} prompts.</p>"
        "<p>How far rules that read nothing predict the preference (50% is chance):</p>"
        f"<ul>{rules}</ul>"
        + _scrolling("findings", ("finding", "rows", "such as", "what it means"), rows)
    )


def _count(finding: Mapping[str, Any]) -> str:
    known = finding["count"] is not None
    return f"{finding['count']} of {finding['of']}" if known else "cannot tell"
