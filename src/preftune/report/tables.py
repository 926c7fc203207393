"""The page's tables as HTML. Whatever comes from data passes through `text` before it is markup."""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from preftune.report import frame
from preftune.report.drawing import Style, reward_unit, styles
from preftune.report.read import (
    Estimate,
    Row,
    RunFolder,
    best_of_kl,
    best_of_n,
    finite,
    gold_of,
    last_evaluation,
)

DASH = "–"
"""Stands for a number that is absent or not finite."""
MOST_PROMPTS = 12

HEADER = {
    "model": "Model",
    "data": "Data",
    "reward": "Reward",
    "label_source": "Labels from",
    "seed": "Seed",
    "date": "Date",
}
LABEL_SOURCES = {
    "true": "true (the reward is the task itself)",
    "rm_same": "rm_same (a reward model trained on the same pairs)",
    "rm_other": "rm_other (a given reward model)",
    "judge": "judge (a model judged)",
    "human": "human",
}


def text(value: object) -> str:
    """`value` as HTML text, safe in elements and in quoted attributes."""
    return html.escape(str(value), quote=True)


def number(value: float | None, decimals: int = 2) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    shown = f"{value:,.{decimals}f}"
    if float(shown.replace(",", "")) == 0:
        shown = shown.lstrip("-")
    return shown.replace("-", "−")


def decimals_for(values: Sequence[float | None]) -> int:
    """Decimals that give the largest of a column three digits or so."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest == 0:
        return 2
    return min(6, max(0, 2 - math.floor(math.log10(largest))) if largest < 1 else _few(largest))


def _few(largest: float) -> int:
    return 2 if largest < 100 else 1 if largest < 1000 else 0


def swatch(style: Style) -> str:
    """The run's mark in the charts, for its name in a table."""
    kind = " dashed" if style.dash != "solid" else ""
    return f'<i class="swatch{kind}" style="--run:{style.colour}"></i>'


def header_list(runs: Sequence[RunFolder]) -> str:
    """What was run, where the runs agree."""
    items: dict[str, object] = {}
    for key, name in HEADER.items():
        values = {
            run.settings[key]: None for run in runs if run.settings.get(key, "null") != "null"
        }
        if not values and key == "date":
            name, values = "Settings written", {min(run.written for run in runs): None}
        if not values:
            continue
        shown = [
            LABEL_SOURCES.get(value, value) if key == "label_source" else value for value in values
        ]
        joined = shown[0] if len(shown) == 1 else f"{', '.join(shown[:4])} (differs between runs)"
        items[name] = joined
    return frame.facts(items)


def _percent(estimate: Estimate) -> Estimate:
    value, low, high = (
        None if part is None else 100 * part
        for part in (estimate.value, estimate.low, estimate.high)
    )
    return Estimate(value=value, low=low, high=high)


def _cell(estimate: Estimate, decimals: int, unit: str = "") -> str:
    shown = number(estimate.value, decimals)
    if shown != DASH and estimate.low is not None and estimate.high is not None:
        low, high = number(estimate.low, decimals), number(estimate.high, decimals)
        return f"<td><b>{shown}{unit}</b> <span class=interval>[{low}, {high}]</span></td>"
    return f"<td><b>{shown}{unit if shown != DASH else ''}</b></td>"


Column = tuple[str, str, str, Callable[[Estimate], Estimate] | None]
"""Figure, heading, unit, and what is done to it before it is shown."""


def _columns(runs: Sequence[RunFolder]) -> list[Column]:
    """What the table shows: a gold reward first where there is one, the training reward named so.

    A ranking by the reward that was trained on is a ranking by a proxy.
    """
    names = {name for run in runs for name in run.evaluation}
    gold = sorted(name for name in names if name.startswith("reward:"))
    first = gold_of(runs)
    gold.sort(key=lambda name: name != first)
    share = f"best_of_n_share{(first or 'reward').removeprefix('reward')}"
    judged = [("judge_win_rate", "Win rate by the judge", "v the reference", _percent)]
    against = "of its gain at equal KL"
    return [
        *((name, "Gold reward", name.removeprefix("reward:"), None) for name in gold),
        ("reward", "Reward (proxy)", reward_unit(runs), None),
        ("kl", "KL to the reference", "nats a response", None),
        *([(share, "Share of best-of-n", against, _percent)] if share in names else []),
        ("win_rate", "Win rate v the reference", "" if not gold else "by the proxy", _percent),
        *(judged if "judge_win_rate" in names else []),
        ("length", "Mean length", "tokens", None),
        ("no_end", "Without an end token", "share of answers", _percent),
        ("seconds", "Time", "seconds", None),
    ]


def methods_table(runs: Sequence[RunFolder]) -> str:
    """One row a run, the untrained model first."""
    columns = _columns(runs)
    heads = "".join(
        f"<th scope=col>{text(name)}{f'<small>{text(unit)}</small>' if unit else ''}</th>"
        for _, name, unit, _ in columns
    )
    cells: dict[str, list[str]] = {}
    for key, _, _, change in columns:
        column = [last_evaluation(run, key) for run in runs]
        if change is not None:
            beyond = [_beyond(run) and key.startswith("best_of_n_share") for run in runs]
            cells[key] = [
                _cell(change(estimate), 0, " % †" if at_last else " %")
                for estimate, at_last in zip(column, beyond, strict=True)
            ]
            continue
        decimals = decimals_for([estimate.value for estimate in column])
        if key in ("length", "seconds"):
            decimals = min(decimals, 1 if key == "length" else 0)
        cells[key] = [_cell(estimate, decimals) for estimate in column]
    rows = "".join(
        f"<tr><th scope=row>{swatch(style)}{text(run.label)}</th>"
        f"{''.join(cells[key][at] for key, *_ in columns)}</tr>"
        for at, (run, style) in enumerate(zip(runs, styles(runs), strict=True))
    )
    marked = any("†" in cell for column in cells.values() for cell in column)
    return (
        '<div class=scroll><table class=methods id="methods"><thead><tr><th scope=col>Method</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>{_FOOTNOTE if marked else ''}"
    )


_FOOTNOTE = (
    "<p class=caption>† The KL is beyond that of the largest n drawn: the gain is compared with "
    "the gain of that n.</p>"
)


def _beyond(run: RunFolder) -> bool:
    """Whether the run is further from the reference than its best-of-n reaches."""
    kl, sizes = last_evaluation(run, "kl").value, best_of_n(run)
    return kl is not None and bool(sizes) and kl > best_of_kl(max(sizes))


def all_figures(runs: Sequence[RunFolder]) -> str:
    """Every figure of every run with its interval, one row a figure."""
    names = list(dict.fromkeys(name for run in runs for name in run.evaluation))
    if not names:
        return ""
    heads = "".join(f"<th scope=col>{text(run.label)}</th>" for run in runs)
    rows: list[str] = []
    for name in names:
        column = [run.evaluation.get(name, Estimate()) for run in runs]
        decimals = decimals_for([estimate.value for estimate in column])
        cells = "".join(_cell(estimate, max(2, decimals)) for estimate in column)
        rows.append(f"<tr><th scope=row>{text(name)}</th>{cells}</tr>")
    return (
        "<details id=all-figures><summary>All figures</summary><div class=scroll>"
        f"<table class=settings><thead><tr><th scope=col>Figure</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def legend(runs: Sequence[RunFolder]) -> str:
    """Buttons that hide and show a run in every chart at once."""
    return "".join(
        f"<button type=button aria-pressed=true data-run={at}>{swatch(style)}{text(run.label)}"
        "</button>"
        for at, (run, style) in enumerate(zip(runs, styles(runs), strict=True))
    )


def _content(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _prompt(prompt: object) -> str:
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, Mapping)]
        return "".join(
            f"<p><span class=role>{text(turn.get('role', ''))}</span>"
            f"{text(_content(turn.get('content', '')))}</p>"
            for turn in turns
        )
    return f"<p>{text(_content(prompt))}</p>"


def _answer(run: RunFolder, style: Style, row: Row | None) -> str:
    head = f"<header>{swatch(style)}<strong>{text(run.label)}</strong>"
    if row is None:
        return f"<div class=answer>{head}</header><p class=none>{DASH}</p></div>"
    reward, tokens = finite(row.get("reward")), finite(row.get("tokens"))
    facts = [f"reward {number(reward, decimals_for([reward]))}"]
    if tokens is not None:
        facts.append(f"{number(tokens, 0)} tokens")
    cut = ""
    if row.get("finished") is False:
        cut = ' <mark title="reached the token limit without an end token">cut</mark>'
    response = row.get("response")
    shown = f"<p>{text(response)}</p>" if response else "<p class=none>(empty answer)</p>"
    return (
        f"<div class=answer>{head}<span class=facts>{text(', '.join(facts))}{cut}</span></header>"
        f"{shown}</div>"
    )


def answers(runs: Sequence[RunFolder]) -> str:
    """Up to `MOST_PROMPTS` held-out prompts, each with every run's first answer side by side."""
    prompts: dict[str, Any] = {}
    by_run: list[dict[str, Row]] = []
    for run in runs:
        first: dict[str, Row] = {}
        for row in run.answers:
            key = json.dumps(row.get("prompt"), sort_keys=True)
            prompts.setdefault(key, row.get("prompt"))
            first.setdefault(key, row)
        by_run.append(first)
    # Prompts that more runs answered come first; the sort keeps the files' order among equals.
    keys = sorted(prompts, key=lambda key: -sum(key in first for first in by_run))
    articles: list[str] = []
    for key in keys[:MOST_PROMPTS]:
        cells = "".join(
            _answer(run, style, first.get(key))
            for run, style, first in zip(runs, styles(runs), by_run, strict=True)
            if run.answers
        )
        articles.append(
            f"<article><div class=prompt>{_prompt(prompts[key])}</div>"
            f"<div class=answers>{cells}</div></article>"
        )
    return "".join(articles)


def settings(runs: Sequence[RunFolder]) -> str:
    """Every setting of every run, those that differ first; shared ones are written once."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    values = {key: [run.settings.get(key, DASH) for run in runs] for key in keys}
    # The untrained model has few settings; that it lacks one is no difference worth reading.
    compared = {
        key: {
            run.settings.get(key, DASH)
            for run in runs
            if key in run.settings or not run.is_reference
        }
        for key in keys
    }
    differ = [key for key in keys if len(compared[key]) > 1]
    same = [key for key in keys if key not in differ]
    width = len(runs)
    rows: list[str] = []
    if differ:
        rows.append(f"<tr class=group><th colspan={width + 1}>Differs between the runs</th></tr>")
        for key in differ:
            cells = "".join(f"<td>{text(value)}</td>" for value in values[key])
            rows.append(f"<tr><th scope=row>{text(key)}</th>{cells}</tr>")
    if same:
        if width > 1:
            rows.append(
                f"<tr class=group><th colspan={width + 1}>The same in all trained runs</th></tr>"
            )
        for key in same:
            cell = f"<td colspan={width}>{text(*compared[key])}</td>"
            rows.append(f"<tr><th scope=row>{text(key)}</th>{cell}</tr>")
    heads = "".join(f"<th scope=col>{text(run.label)}</th>" for run in runs)
    return (
        "<details><summary>All settings, what differs first</summary><div class=scroll>"
        f"<table class=settings><thead><tr><th scope=col>Setting</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )
