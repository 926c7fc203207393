"""What every page has: one file that loads nothing, its style, its figures, its policy."""

import html
import json
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from string import Template
from typing import Any

OWN = "preftune.report"


def page(package: str, title: str, figures: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    """A self-contained page, as text.

    Args:
        package: has `page.html`, the page's body, and perhaps a `page.css`, which is added.
        title: of the window, plain text.
        figures: by name, data and layout; the body has an element `chart-NAME` for each.
        parts: what stands in the body's places, as HTML.
    """
    from plotly.offline import get_plotlyjs

    own, shared = resources.files(package), resources.files(OWN)
    style = _read(shared, "page.css")
    if package != OWN and own.joinpath("page.css").is_file():
        style += "\n" + _read(own, "page.css")
    return Template(_read(shared, "frame.html")).substitute(
        title=html.escape(title),
        style=style,
        body=Template(_read(own, "page.html")).substitute(parts),
        figures=embed_json(figures),
        plotly=get_plotlyjs() if figures else "",
        script=_read(shared, "page.js"),
    )


def facts(items: Mapping[str, object]) -> str:
    """A list of names and values under a page's heading."""
    inside = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in items.items()
    )
    return f'<dl class="facts">{inside}</dl>'


def embed_json(value: object) -> str:
    """JSON that is safe inside a script element: no text in it can close or open one."""
    encoded = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return encoded.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _read(folder: Traversable, name: str) -> str:
    return folder.joinpath(name).read_text(encoding="utf-8")
