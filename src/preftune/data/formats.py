"""Load data of any accepted shape, put aside what cannot be used, and say why.

`canonical` lists the shapes and the rules, `files` the kinds of source.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from preftune.data.canonical import COLUMNS, KINDS, Example, Refused, allowed, canonical, kind_of
from preftune.data.files import Malformed, ending, read_rows
from preftune.durable import write_text
from preftune.errors import BadRows, NoRows, UserError, nearest

_NEEDED = {
    "pairs": "chosen and rejected (with prompt, or as dialogues)",
    "completions": "prompt and completion, messages, or chosen and rejected",
    "prompts": "prompt, messages, or chosen and rejected as dialogues",
    "any": "chosen and rejected, prompt and completion, messages, or prompt",
}


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A row that cannot be used."""

    where: str
    reason: str
    """The rule, then after a colon what is particular to the row."""
    row: Any
    """As it was read."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a source gave."""

    examples: list[Example]
    rejected: list[Rejected]
    kind: str
    """"pairs", "completions" or "prompts": that of every example."""


def load_examples(
    source: Any, *, want: str = "any", max_rows: int | None = None, split: str = "train"
) -> Loaded:
    """Read the first `max_rows` rows of a path, folder, Hub id, list or data set.

    Args:
        want: "pairs", "completions" (pairs are accepted too), "prompts" (any format; responses
            are dropped) or "any". Rows of another kind than most are refused one by one.
        split: of a Hub data set, a saved data set, or a folder whose files are named by split.

    Raises:
        UserError: the source as a whole cannot be used, or no row of it.
    """
    if want not in _NEEDED:
        raise ValueError(f"want: {want!r} is none of {', '.join(_NEEDED)}")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows: {max_rows} leaves no data. Give 1 or more.")
    if isinstance(source, (str, Path)) and ending(Path(source)) == ".txt" and want != "prompts":
        raise UserError(f"data '{source}': plain text holds prompts only. Give {_NEEDED[want]}.")
    found: list[tuple[str, Example, Any]] = []
    rejected: list[Rejected] = []
    columns: dict[str, None] = {}
    for where, row in islice(read_rows(source, split=split), max_rows):
        try:
            if isinstance(row, dict):
                columns.update(dict.fromkeys(map(str, row)))
            found.append((*canonical(row, want, where), row))
        except Refused as error:
            raw = row.text if isinstance(row, Malformed) else row
            rejected.append(Rejected(where=where, reason=str(error), row=raw))
    named = isinstance(source, (str, Path))
    name = str(source if named else getattr(source, "path", "in memory"))
    if not found:
        raise NoRows(f"data '{name}': {_why_nothing(rejected, list(columns), want)}")
    counts = Counter(kind for kind, _, _ in found)
    kind = max(KINDS, key=lambda k: counts[k])
    examples = [example for own, example, _ in found if own == kind]
    rejected += [
        Rejected(where=example.where, reason=f"not of the kind of most rows: {own}", row=row)
        for own, example, row in found
        if own != kind
    ]
    return Loaded(examples=examples, rejected=rejected, kind=kind)


def _why_nothing(rejected: list[Rejected], columns: list[str], want: str) -> str:
    """Why no row could be used: no rows, no columns, or each row for a reason of its own."""
    if not rejected:
        return "holds no row. Give at least one."
    if not columns:
        return f"no row is an object ({rejected[0].where}: {rejected[0].reason})."
    if kind_of(dict.fromkeys(columns, "")) not in allowed(want):
        unknown = [c for c in columns if c not in COLUMNS]
        hints = [f" '{c}' is not known.{hint}" for c in unknown if (hint := nearest(c, COLUMNS))]
        return (
            f"no usable column. Found: {', '.join(columns)}. Wanted: {_NEEDED[want]}."
            f"{''.join(hints)} (A CSV file begins with a line that names its columns.)"
        )
    return f"no row of {len(rejected)} can be used. {summary(rejected)}"


def summary(rejected: Sequence[Rejected], places: int = 3) -> str:
    """Counts by reason, most frequent first, and the first few rows of each."""
    groups: dict[str, list[str]] = {}
    for bad in rejected:
        groups.setdefault(bad.reason.split(":")[0], []).append(bad.where)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return "; ".join(
        f"{reason}: {len(where)} ({', '.join(where[:places])}{', ...' if where[places:] else ''})"
        for reason, where in ordered
    )


def check_bad_rows(loaded: Loaded, bad_rows: float, *, later: Sequence[Rejected] = ()) -> None:
    """Refuse data of which more than the fraction `bad_rows` had to be left out.

    Args:
        later: of the examples, those refused since (`Report.rejected`).

    Raises:
        UserError: with the count of each reason and the first rows it names.
    """
    refused = [*loaded.rejected, *later]
    bad, total = len(refused), len(loaded.rejected) + len(loaded.examples)
    if bad > bad_rows * total:
        raise BadRows(
            f"data: {bad} of {total} rows cannot be used, above bad_rows: {bad_rows:g}. "
            f"{summary(refused)}. Repair or remove them, or raise bad_rows.",
            refused,
        )


def write_rejected(rejected: Iterable[Rejected], path: str | Path) -> None:
    """Write `{"where", "reason", "row"}`, a line each, or leave the file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"where": bad.where, "reason": bad.reason, "row": bad.row} for bad in rejected)
    write_text(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
