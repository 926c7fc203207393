"""One self-contained page of claims: verdicts, numbers, settings, figures."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.durable import write_text
from preftune.report import frame
from preftune.reproduce.claims import Judged, key_of

VERDICTS = {"holds": "holds", "does_not_hold": "does not hold", "not_seen": "not seen"}


def write_page(path: Path, judged: Sequence[Judged], facts: Mapping[str, str]) -> Path:
    """Write the page; it appears whole or not at all."""
    figures = {
        j.claim.key: _traces(j.measured.figure)
        for j in judged
        if j.measured is not None and j.measured.figure is not None
    }
    rows = [row for j in judged for row in j.rows]
    parts = {
        "facts": frame.facts({"Verdicts": _counts(rows), **facts}),
        "table": _table(rows),
        "claims": "".join(_section(j) for j in judged),
    }
    write_text(path, frame.page("preftune.reproduce", "preftune reproduce", figures, parts))
    return path


def _traces(figure: Any) -> list[Any]:
    """Data and layout; the page has the title and the colours of text and paper."""
    plain = json.loads(figure.to_json())
    layout = {k: v for k, v in plain["layout"].items() if k not in ("template", "title", "height")}
    return [plain["data"], {**layout, "showlegend": True, "height": 400}]


def shown(row: Mapping[str, Any]) -> str:
    """The measured mean with its interval; `wide` where half of it is more than the margin, so
    that more seeds are due before the verdict is a result."""
    if row["interval"] is None:
        return ""
    low, high = row["interval"]
    if low == high == row["measured"] and not row["seeds"]:
        return f"{row['measured']:.4g} (exact)"
    wide = " wide" if row["margin"] and (high - low) / 2 > abs(row["margin"]) else ""
    return f"{row['measured']:.3g} [{low:.3g}, {high:.3g}]{wide}"


def needed(row: Mapping[str, Any]) -> str:
    """What the interval must do for the claim to hold."""
    sign = {"greater": "> ", "less": "< ", "within": "within ±"}[row["direction"]]
    return f"{sign}{row['margin']:g}"


def name(row: Mapping[str, Any]) -> str:
    """The claim, and which part of it."""
    return f"{key_of(row)}: {row['part']}" if row["part"] else key_of(row)


def said(row: Mapping[str, Any]) -> str:
    """The verdict in words; "" where nothing was run."""
    return "failed" if "error" in row else VERDICTS.get(row["verdict"], "")


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = {word: sum(said(r) == word for r in rows) for word in (*VERDICTS.values(), "failed")}
    return ", ".join(f"{n} {word}" for word, n in counts.items() if n or word != "failed")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = "".join(
        f'<tr><th scope="row"><a href="#{key_of(r)}">{html.escape(name(r))}</a></th>'
        f"<td>{html.escape(r['claim'])}</td><td>{shown(r)}</td><td>{needed(r)}</td>"
        f"<td><b>{said(r)}</b></td></tr>"
        for r in rows
    )
    heads = ("claim", "what it says", "measured (95 % interval over seeds)", "needed", "verdict")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f'<div class="scroll verdicts"><table><thead><tr>{head}</tr></thead>{body}</table></div>'


def _section(judged: Judged) -> str:
    claim, measured = judged.claim, judged.measured
    settings = ", ".join(f"{k} {v}" for k, v in claim.settings.items()) or "none"
    numbers = "".join(
        f"<p>{html.escape(r['statistic'])}: <b>{shown(r)}</b>, needed {needed(r)}: "
        f"<b>{said(r)}</b></p>"
        for r in judged.rows
    )
    lines = [f"Failed: {judged.failed}"] if measured is None else measured.notes
    notes = "".join(f"<p>{html.escape(n)}</p>" for n in lines)
    chart = ""
    if measured is not None and measured.figure is not None:
        title = measured.figure.layout.title.text or ""
        chart = (
            f'<figure class="alone"><h3>{html.escape(title)}</h3><figcaption></figcaption>'
            f'<div class="chart" id="chart-{claim.key}"></div></figure>'
        )
    seeds = judged.rows[0]["seeds"]
    return (
        f'<section id="{claim.key}"><h2>{claim.key}</h2><p>{html.escape(claim.claim)}</p>'
        f'<p class="caption">{html.escape(claim.source)}; labels: '
        f"{html.escape(claim.label_source)}; "
        f"{f'{seeds} seeds' if seeds else 'exact'}; settings: {html.escape(settings)}</p>"
        f"{numbers}{chart}{f'<aside class=note>{notes}</aside>' if notes else ''}</section>"
    )
