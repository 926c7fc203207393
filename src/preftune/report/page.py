"""Puts the page together and writes it in one go."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from preftune import durable
from preftune.errors import UserError
from preftune.report import frame, tables
from preftune.report.alarms import alarms
from preftune.report.drawing import Chart
from preftune.report.figures import charts
from preftune.report.read import RunFolder, read_runs


def write_report(
    folders: Sequence[Path],
    output: Path,
    *,
    title: str = "preftune report",
    note: str = "",
    links: Mapping[str, str] | None = None,
) -> Path:
    """Write one self-contained HTML page about the runs in `folders` to `output`.

    Args:
        folders: run folders; only `config.yaml` is required in each, what else is missing is left
            out of the page. A run whose method is `reference` is the untrained model.
        output: the HTML file. It appears whole or not at all.
        title: the page's heading.
        note: plain text under the heading (how the numbers came about, what they do not show);
            blank lines separate paragraphs.
        links: files beside the page to what they show; they stand under the note.

    Returns:
        `output`.

    Raises:
        UserError: a folder is not a run folder, a file in it cannot be read, or `output` is a
            folder.
    """
    output = Path(output)
    if output.is_dir():
        raise UserError(f"{output} is a folder: name a file for the page, as {output}/report.html.")
    page = render(read_runs(folders), title=title, note=note, links=links)
    output.parent.mkdir(parents=True, exist_ok=True)
    # a lone surrogate (half a character, cut by a token limit) must not cost the whole page
    durable.write_text(output, page, errors="replace")
    return output


def render(
    runs: Sequence[RunFolder],
    *,
    title: str,
    note: str = "",
    links: Mapping[str, str] | None = None,
) -> str:
    """The page about `runs` as a string."""
    figures = charts(runs)
    parts = {
        "title": tables.text(title),
        "facts": tables.header_list(runs),
        "note": _note(note) + _links(links or {}),
        "methods": tables.methods_table(runs) + tables.all_figures(runs),
        "alarms": _section("alarms", "Alarms", alarms(runs)),
        "charts": _charts(runs, figures),
        "answers": _section("answers", "Answers to held-out prompts", tables.answers(runs)),
        "settings": tables.settings(runs),
    }
    return frame.page(
        "preftune.report", title, {c.name: [c.data, c.layout] for c in figures}, parts
    )


def _note(note: str) -> str:
    paragraphs = [part.strip() for part in note.split("\n\n") if part.strip()]
    if not paragraphs:
        return ""
    inside = "".join(f"<p>{tables.text(part)}</p>" for part in paragraphs)
    return f"<aside class=note>{inside}</aside>"


def _links(links: Mapping[str, str]) -> str:
    return "".join(
        f'<p class=caption><a href="{tables.text(quote(name))}">{tables.text(words)}</a></p>'
        for name, words in links.items()
    )


def _section(name: str, heading: str, inside: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2>{inside}</section>' if inside else ""


def _charts(runs: Sequence[RunFolder], figures: Sequence[Chart]) -> str:
    if not figures:
        return ""
    boxes = "".join(
        f"<figure><h3>{tables.text(chart.title)}</h3>"
        f"<figcaption>{tables.text(chart.reading)}</figcaption>"
        f'<div class=chart id="chart-{chart.name}"></div></figure>'
        for chart in figures
    )
    return _section(
        "charts",
        "Charts",
        f'<div class=legend role=group aria-label="Runs shown">{tables.legend(runs)}</div>'
        "<noscript><p>The charts need JavaScript (nothing is loaded from a network).</p></noscript>"
        f"<div class=grid>{boxes}</div>",
    )
