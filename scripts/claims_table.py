"""The verdicts of one or more `preftune reproduce` folders as a Markdown table.

python scripts/claims_table.py runs/reproduce-a runs/reproduce-b
"""

import json
import sys
from pathlib import Path

VERDICTS = {"holds": "holds", "does_not_hold": "**does not hold**", "not_seen": "*not seen*"}


def cell(row: dict) -> str:
    """Mean, interval and verdict; or why there is none."""
    if row["interval"] is None:
        return f"failed: {row['error']}"
    low, high = row["interval"]
    if low == high:
        return f"{row['measured']:.4g}: {VERDICTS[row['verdict']]}"
    wide = " (wide)" if row["margin"] and (high - low) / 2 > abs(row["margin"]) else ""
    return f"{row['measured']:.3g} [{low:.3g}, {high:.3g}]{wide}: {VERDICTS[row['verdict']]}"


def needed(row: dict) -> str:
    """The margin in words."""
    sign = {"greater": ">", "less": "<", "within": "±"}[row["direction"]]
    return f"{sign} {row['margin']:g}"


def main() -> None:
    """Print the table."""
    runs = [json.loads((Path(f) / "results.json").read_text()) for f in sys.argv[1:]]
    heads = ["claim", "statistic", "needed", "seeds", *(f"run {i + 1}" for i in range(len(runs)))]
    print("| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), sep="\n")
    for same in zip(*runs, strict=True):
        row = same[0]
        name = f"`{row['id']}`" + (f" {row['part']}" if row["part"] else "")
        seeds = str(row["seeds"]) if row["seeds"] else "exact"
        cells = [name, row["statistic"], needed(row), seeds, *(cell(r) for r in same)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
