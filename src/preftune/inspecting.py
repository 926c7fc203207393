"""Shows what the commands found to a person."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

AXES = ("on_policy", "sample_reuse", "negative_gradient", "mode_seeking")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    shown = Table(title=escape(title) or None)
    for name in columns:
        shown.add_column(name, no_wrap=name == columns[0])
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    console.print(shown)


def figures(title: str, found: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print figures with their intervals."""
    cells = [
        [name, *("" if figure[k] is None else f"{figure[k]:.4g}" for k in ("value", "low", "high"))]
        for name, figure in found.items()
    ]
    table(title, ["figure", "value", "low", "high"], cells)


def estimates(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print estimates: a value with its interval, a bound, or why there is neither."""

    def cells(name: str, x: Mapping[str, Any]) -> list[str]:
        ends = ["" if x[k] is None else f"{x[k]:.4g}" for k in ("low", "high")]
        if x["trusted"]:
            return [name, f"{x['value']:.4g}", *ends, ""]
        why = x.get("note", "").split(":")[0]  # the rest is in --json
        return [name, "bound" if any(ends) else "cannot tell", *ends, why]

    rows = [cells(name, x) for name, x in found.items()]
    table("95 % intervals over prompts", ["figure", "value", "low", "high", "why not"], rows)


def resources(found: Mapping[str, Any], changes: Sequence[str]) -> None:
    """Print a run's memory and time as `estimate` found them.

    Args:
        changes: each of `found`'s, as flags.
    """
    memory, spent, facts = found["memory"], found["time"], found["facts"]
    free = memory["free"]
    rows = [[name, f"{size / 1e9:.2f}", ""] for name, size in memory["parts"].items()]
    fullest = max(memory["stages"], key=lambda name: memory["stages"][name])
    rows.append(["peak", f"{memory['peak'] / 1e9:.2f}", f"while it does: {fullest}"])
    rows.append(["free now", f"{free / 1e9:.2f}", "" if found["fits"] else "it will not fit"])
    table(f"Memory, GB ({facts['device']})", ["part", "GB", ""], rows)
    total = spent["seconds"] or 1.0
    rows = [
        [name, f"{s['seconds']:.1f}", f"{s['seconds'] / total:.0%}", f"{s['tokens'] or ''}"]
        for name, s in spent["stages"].items()
    ]
    rows.append(["in all", f"{total:.0f}", f"{spent['low']:.0f} to {spent['high']:.0f} s", ""])
    how = "by a probe of the model itself" if spent["measured"] else "rough, from a table of rates"
    title = f"Time of {facts['updates']} updates, {how}"
    table(title, ["stage", "seconds", "share", "tokens"], rows)
    answers = facts["responses"]
    if answers is not None:
        by = f"as {answers['of']} real ones were" if answers["of"] else "assumed: half of the limit"
        print(f"sampled responses: {answers['mean']:.0f} tokens in the mean, {by}")
    disk = found["disk"]
    kept = f", {disk['checkpoints']} checkpoints of {disk['checkpoint'] / 1e9:.2f} GB each"
    print(f"on disk: model {disk['model'] / 1e9:.2f} GB{kept if disk['checkpoints'] else ''}")
    if changes:
        cells = [
            [flags, c["costs"], f"{c['peak'] / 1e9:.2f}", "yes" if c["fits"] else "no"]
            for flags, c in zip(changes, found["changes"], strict=True)
        ]
        table("What would help", ["change", "costs", "peak, GB", "fits"], cells)
    elif not found["fits"]:
        print("Nothing that was tried helps. Take a smaller model.")


def methods(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of methods with its axes."""

    def axis(row: Mapping[str, Any], name: str) -> str:
        if row[name]:
            return "yes"
        return "KL only" if name == "on_policy" and row["on_policy_unlabelled"] else "no"

    heads = [name.replace("_", " ") for name in AXES]
    cells = [
        [row["name"], *(axis(row, a) for a in AXES), row["equation"], row["paper"]] for row in rows
    ]
    table("", ["method", *heads, "loss", "source"], cells)


def method(row: Mapping[str, Any]) -> None:
    """Print one row of the table in full: its terms, axes, and settings with their meaning."""
    for key, value in row.items():
        if key == "terms":
            for i, term in enumerate(value):
                print(f"{f'terms.{i}':20} {term}")
        elif key == "defaults":
            for name, default in value.items():
                print(f"{name:20} {default}")
        elif key not in ("settings", "meanings") and value != "":
            print(f"{key:20} {value}")
    cells = [
        [m["path"], "" if m["value"] is None else str(m["value"]), m["meaning"]]
        for m in row["meanings"]
    ]
    table("settings: --set PATH=VALUE, or YAML", ["path", "value", "meaning"], cells)
    print(
        "Terms with an equal source use the same samples, with an equal labeller the same labels: "
        "set both alike,\nor by the flat setting (--passes, --kl, --baseline), which reaches every "
        "term that has it."
    )


def show(facts: Mapping[str, Any]) -> None:
    """Print rows token by token, then counts.

    The prompt is dim, trained tokens are bold, the end token is reversed.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for row in facts["rows"]:
        console.rule(row["where"], align="left")
        for response in row["responses"] or [{"name": "prompt", "tokens": []}]:
            text = Text(f"{response['name']}: ", style="cyan")
            for token in (*row["prompt"], *response["tokens"]):
                style = "reverse" if token["part"] == "end" else "bold" if token["loss"] else "dim"
                text.append(token["text"], style=style)
            console.print(text)
    console.rule("dim: prompt, bold: trained, reversed: end token", align="left")
    for line in _counts(facts):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _counts(facts: Mapping[str, Any]) -> list[str]:
    end, bos, cut = facts["end"], facts["bos"], facts["truncation"]
    leading = ", ".join(f"{n} rows with {k}" for k, n in bos["rows_by_leading_bos"].items())
    lines = [
        f"rows:        {facts['count']} {facts['kind']}, {facts['refused']} refused, "
        f"{cut['dropped']} dropped as too long, {cut['cut']} cut (limit {cut['limit']} tokens, "
        f"longest {cut['longest']})",
        f"template:    {facts['template']}; columns kept: {', '.join(facts['columns']) or 'none'}",
        f"BOS:         id {bos['id']}: {leading}",
        f"end token:   ids {', '.join(map(str, end['ids']))}: in the loss mask of "
        f"{end['in_loss_mask']} of {end['finished']} finished responses (of {end['responses']})",
    ]
    for name, spread in facts["lengths"].items():
        figures = ", ".join(f"{k} {v:.4g}" for k, v in spread.items())
        lines.append(f"{f'{name}:':12} tokens: {figures}")
    rules = dict(facts["rules"])
    known = facts.get("higher_reference_logp")
    if known is not None:
        rules[f"higher reference log-prob (first {known['rows']} rows)"] = known["share"]
    if rules:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in rules.items())
        lines.append(f"preferred:   {shares} (50% is chance)")
    return lines
