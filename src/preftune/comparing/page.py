"""The page of a comparison: one file that loads nothing. Whatever comes from data is escaped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune import durable
from preftune.comparing import wording
from preftune.comparing.charts import AXES, charts, styles
from preftune.report import frame
from preftune.report.drawing import NEUTRAL, Chart, Style
from preftune.report.tables import DASH, LABEL_SOURCES, decimals_for, number, swatch, text

Found = Mapping[str, Any]
STAGES = ("timing", "learning rates", "final runs")


def write_page(path: Path, found: Found) -> Path:
    """Write the page; it appears whole or not at all."""
    durable.write_text(path, render(found), errors="replace")
    return path


def render(found: Found) -> str:
    """The page as text.

    Args:
        found: what compare.json holds.
    """
    drawn = charts(found)
    parts = {
        "facts": frame.facts(_facts(found)),
        "verdict": _paragraphs(found["verdict"]),
        "cuts": _list("What was cut to stay within the budget", found["cuts"]),
        "methods": _methods(found),
        "notes": _list("What limits this", found["notes"]),
        "pairs": _pairs(found),
        "failed": _failed(found["failed"]),
        "legend": _legend(found),
        "axes": _axes(),
        "charts": "".join(map(_chart, drawn)),
        "rates": _rates(found),
        "answers": _answers(found),
        "settings": _settings(found),
    }
    figures = {c.name: [c.data, c.layout] for c in drawn}
    return frame.page("preftune.comparing", "preftune compare", figures, parts)


def _facts(found: Found) -> dict[str, object]:
    settings, facts, plan = found["settings"], found["facts"], found["plan"]
    split, seconds = found["prompts"], found.get("seconds", {})
    source = facts["label_source"] or "unknown"
    data = settings.get("data") or settings.get("prompts")
    out: dict[str, object] = {
        "Model": settings.get("model", "smollm2-135m"),
        "Data": f"{data} ({split['rows']} rows to train on)",
        "Reward": facts["reward"],
    }
    if facts["gold"]:
        out["Gold reward"] = facts["gold"]
    out["Labels from"] = LABEL_SOURCES.get(source, source)
    out["Seeds"] = plan["seeds"]
    judged = found["reference"]["figures"]["reward"]["prompts"]
    out["Held-out prompts"] = f"{judged} to judge, {plan['selection']} to choose rates"
    if seconds:
        parts = ", ".join(f"{k} {_minutes(seconds[k])}" for k in STAGES if k in seconds)
        out["Took"] = f"{_minutes(seconds['whole'])} ({parts})"
        out["Budget"] = _budget(found)
    return out


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _budget(found: Found) -> str:
    asked = found["budgets"]
    if asked["budget"]:
        return f"{_minutes(asked['budget'])} in all, the same training time for each run"
    if asked["per_run"]:
        return f"{_minutes(asked['per_run'])} a run"
    if asked["steps"]:
        return f"{asked['steps']} updates a run"
    return f"{asked['samples']} responses trained on a run"


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{text(line)}</p>" for line in lines)


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    inside = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<div class=cuts><h3>{text(title)}</h3><ul>{inside}</ul></div>"


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "methods") -> str:
    head = "".join(f"<th scope=col>{h}</th>" for h in heads)
    return (
        f'<div class=scroll><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _estimate(figure: Found | None, decimals: int) -> str:
    if figure is None or figure["value"] is None:
        return f"<td>{DASH}</td>"
    shown = f"<b>{number(figure['value'], decimals)}</b>"
    if figure["low"] is not None and figure["high"] is not None:
        ends = (number(figure[k], decimals) for k in ("low", "high"))
        shown += f" <span class=interval>[{', '.join(ends)}]</span>"
    return f"<td>{shown}</td>"


def _head(name: str, small: str = "") -> str:
    return f"{text(name)}<small>{text(small)}</small>" if small else text(name)


def _columns(found: Found) -> list[tuple[str, str, str, str]]:
    """Where a figure stands, its name, its heading, its unit."""
    gold = found["facts"]["gold"]
    by = found["judged_by"]
    unit = {r: wording.unit(found["facts"][r]) for r in ("reward", "gold")}
    out = [("figures", "gold", "Gold reward", unit["gold"])] if gold else []
    return [
        *out,
        ("figures", "reward", "Reward (proxy)" if gold else "Reward", unit["reward"]),
        ("gains", by, "Gain over the untrained", unit[by]),
        ("figures", "kl", "KL to the untrained", "nats a response"),
        ("figures", "length", "Length", "tokens"),
        ("figures", "entropy", "Entropy", "nats a response"),
    ]


SPENT = {"trained": ("Trained on", "responses"), "drawn": ("Drawn", "responses"),
         "judged": ("Judged", "responses"), "seconds": ("Training", "seconds a run")}  # fmt: skip


def _methods(found: Found) -> str:
    """A row a competitor, the highest reward first, the untrained model last."""
    columns, drawn = _columns(found), styles([m["name"] for m in found["methods"]])
    order = wording.ranked(found)
    rest = [m for m in found["methods"] if not m["figures"]]
    reference = {
        "name": "untrained", "figures": found["reference"]["figures"], "gains": {}, "spent": {},
        "rate": None, "runs": [], "asked": 0,
    }  # fmt: skip
    shown = [*order, *rest, reference]
    decimals = {
        (kind, key): decimals_for([m[kind][key]["value"] for m in shown if key in m[kind]])
        for kind, key, *_ in columns
    }
    rows = []
    for method in shown:
        style = drawn.get(method["name"], Style(colour=NEUTRAL, dash="dot"))
        cells = "".join(_estimate(method[k].get(f), decimals[k, f]) for k, f, *_ in columns)
        rate = DASH if method["rate"] is None else f"{method['rate']:.2g}"
        updates = _range(method.get("updates", []))
        spent = "".join(f"<td>{number(method['spent'].get(k), 0)}</td>" for k in SPENT)
        runs = f"{len(method['runs'])} of {method['asked']}" if method["asked"] else DASH
        rows.append(
            f"<tr><th scope=row>{swatch(style)}{text(method['name'])}</th>{cells}"
            f"<td>{rate}</td><td>{updates}</td>{spent}<td>{runs}</td></tr>"
        )
    heads = [
        "Method", *(_head(name, unit) for _, _, name, unit in columns), "Learning rate", "Updates",
        *(_head(*names) for names in SPENT.values()), _head("Runs", "of those begun"),
    ]  # fmt: skip
    return _table(heads, rows)


def _range(values: Sequence[int]) -> str:
    if not values:
        return DASH
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _pairs(found: Found) -> str:
    if not found["pairs"]:
        return "<p>Fewer than two methods have a result.</p>"
    decimals = decimals_for([p["value"] for p in found["pairs"]])
    rows = []
    for p in found["pairs"]:
        verdict = f"<b>{text(p['better'])}</b> is better" if p["better"] else "cannot tell"
        chance = DASH if p["adjusted"] is None else f"{p['adjusted']:.3f}"
        rows.append(
            f"<tr><th scope=row>{text(p['a'])} − {text(p['b'])}</th>{_estimate(p, decimals)}"
            f"<td>{chance}</td><td>{p['seeds']}</td><td>{p['prompts']}</td><td>{verdict}</td></tr>"
        )
    unit = found["unit"] or "the reward's unit"
    what = "gold reward" if found["judged_by"] == "gold" else "reward"
    heads = ["Pair", _head(f"Difference of {what}", unit), _head("p", "Holm, over all pairs"),
             "Seeds", "Prompts", "At 5 %"]  # fmt: skip
    note = (
        "<p class=caption>Paired by seed and by prompt: both methods of a pair had the same seeds, "
        "the same data in the same order, the same prompts and random numbers.</p>"
    )
    return _table(heads, rows) + note


def _failed(rows: Sequence[Found]) -> str:
    if not rows:
        return ""
    cells = [
        f"<tr><th scope=row>{text(r['method'])}</th><td>{text(r['what'])}</td>"
        f"<td>{text(r['message'])}</td></tr>"
        for r in rows
    ]
    table = _table(["Method", "Run", "Message"], cells, "methods failed")
    return f'<section id="failed"><h2>Runs that failed</h2>{table}</section>'


def _legend(found: Found) -> str:
    drawn = styles([m["name"] for m in found["methods"]])
    return "".join(
        f"<button type=button aria-pressed=true data-run={place}>{swatch(drawn[m['name']])}"
        f"{text(m['name'])}</button>"
        for place, m in enumerate(found["methods"]) if m["curves"]
    )  # fmt: skip


def _axes() -> str:
    return "".join(
        f"<button type=button aria-pressed={'true' if key == 'step' else 'false'} "
        f'data-axis={key} data-title="{text(title)}">{text(name)}</button>'
        for key, (name, title) in AXES.items()
    )


def _chart(chart: Chart) -> str:
    return (
        f"<figure><h3>{text(chart.title)}</h3><figcaption>{text(chart.reading)}</figcaption>"
        f'<div class=chart id="chart-{chart.name}"></div></figure>'
    )


def _rates(found: Found) -> str:
    """Each competitor's grid, the chosen rate marked."""
    grids = {m["name"]: m["choice"]["grid"] for m in found["methods"] if m["choice"]}
    width = max((len(grid) for grid in grids.values()), default=0)
    chosen = {m["name"]: m["rate"] for m in found["methods"]}
    rows = []
    for name, grid in grids.items():
        cells = "".join(_rate(row, row["rate"] == chosen[name], found) for row in grid)
        cells += "<td></td>" * (width - len(grid))
        rows.append(f"<tr><th scope=row>{text(name)}</th>{cells}</tr>")
    if width < 2:
        words = "No rate was chosen: each method has one."
    else:
        words = (
            f"The mean reward on {found['plan']['selection']} held-out prompts that are not those "
            "of the comparison, from one run a rate with a seed of its own. The marked one was "
            "taken: the highest, by the reward that is trained on, never by gold."
        )
    heads = ["Method", *(f"Rate {i + 1}" for i in range(width))]
    return f"{_table(heads, rows)}<p class=caption>{text(words)}</p>"


def _rate(row: Found, chosen: bool, found: Found) -> str:
    shown = f"{row['rate']:.2g}"
    shown = f"<mark>{shown}</mark>" if chosen else shown
    if "failed" in row:
        return f"<td>{shown} failed</td>"
    if "reward" not in row:
        return f"<td>{shown}</td>"
    return f"<td>{shown} <b>{number(row['reward'])}</b></td>"


def _answers(found: Found) -> str:
    drawn = styles([m["name"] for m in found["methods"]])
    out = []
    for row in found["texts"]:
        cells = "".join(_answer(a, drawn.get(a["method"])) for a in row["answers"])
        out.append(
            f"<article><div class=prompt>{_prompt(row['prompt'])}</div>"
            f"<div class=answers>{cells}</div></article>"
        )
    return "".join(out) + "<p class=caption>Each method's first seed; the first prompts.</p>"


def _answer(answer: Found, style: Style | None) -> str:
    facts = [] if answer["reward"] is None else [f"reward {number(answer['reward'])}"]
    facts.append(f"{answer['tokens']} tokens" + ("" if answer["finished"] else ", cut"))
    mark = swatch(style or Style(colour=NEUTRAL, dash="dot"))
    said = answer["response"]
    shown = f"<p>{text(said)}</p>" if said else "<p class=none>(empty answer)</p>"
    return (
        f"<div class=answer><header>{mark}<b>{text(answer['method'])}</b>"
        f"<span class=facts>{text(', '.join(facts))}</span></header>{shown}</div>"
    )


def _prompt(prompt: object) -> str:
    if not isinstance(prompt, list):
        return f"<p>{text(prompt)}</p>"
    return "".join(
        f"<p><span class=role>{text(turn['role'])}</span>{text(turn['content'])}</p>"
        for turn in prompt
    )


def _settings(found: Found) -> str:
    """Of all, then those that each competitor has of its own."""
    shared = {k: v for k, v in found["settings"].items() if v is not None}
    rows = [_setting(key, value) for key, value in shared.items()]
    for entry in found["entries"]:
        own = {**entry["settings"], **entry["overrides"]}
        rows += [_setting(f"{entry['name']}: {key}", value) for key, value in own.items()]
    rows += [_setting(f"updates: {m}", n) for m, n in found["plan"]["updates"].items()]
    table = _table(["Setting", "Value"], rows, "settings")
    return f"<details><summary>All settings</summary>{table}</details>"


def _setting(name: str, value: object) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"<tr><th scope=row>{text(name)}</th><td>{text(shown)}</td></tr>"
