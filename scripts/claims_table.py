"""The verdicts of one or more `preftune reproduce` folders as a Markdown table.

python scripts/claims_table.py runs/reproduce-a runs/reproduce-b
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.reproduce.page import name, needed, shown

VERDICTS = {"holds": "holds", "does_not_hold": "**does not hold**", "not_seen": "*not seen*"}
Row = Mapping[str, Any]


def cell(row: Row | None) -> str:
    """Mean, interval and verdict; or why there is none; "" where the folder has no such row."""
    if row is None:
        return ""
    if row["interval"] is None:
        return f"failed: {row['error']}"
    return f"{shown(row)}: {VERDICTS[row['verdict']]}"


def same(row: Row) -> tuple[str, ...]:
    """What rows of several folders must share to be one line."""
    return f"`{name(row)}`", row["statistic"], needed(row)


def seeds(rows: Sequence[Row]) -> str:
    """How many, of each folder where they differ."""
    return ", ".join(dict.fromkeys(str(row["seeds"] or "exact") for row in rows))


def table(runs: Sequence[Sequence[Row]]) -> list[str]:
    """Its lines, in the order of the first folder that has them."""
    each = [{same(row): row for row in rows} for rows in runs]
    heads = ["claim", "statistic", "needed", "seeds", *(f"run {i + 1}" for i in range(len(runs)))]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for key in dict.fromkeys(key for rows in each for key in rows):
        found = [rows.get(key) for rows in each]
        cells = [*key, seeds([row for row in found if row]), *map(cell, found)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print the table."""
    runs = [json.loads((Path(f) / "results.json").read_text()) for f in sys.argv[1:]]
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
