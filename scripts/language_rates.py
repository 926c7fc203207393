"""Choose the learning rates of language claims (src/preftune/reproduce/rates.yaml).

    python scripts/language_rates.py OUTPUT [--seed-base 9000] [--workers 2]

Every row that a claim uses runs on every problem where one uses it, at each rate of one grid, on
two seeds that no claim has; the rate with the highest true reward at the end is taken. Runs that
OUTPUT holds are not made again. Prints the file's text.
"""

import argparse
from pathlib import Path
from typing import Any

from preftune.progress import Progress, stderr
from preftune.reproduce.claims import load
from preftune.reproduce.language import NOT_OF_RUNS, cell
from preftune.reproduce.places import SMALL
from preftune.study import Study

GRID = (1e-4, 3e-4, 1e-3)
SEEDS = 2


def wanted() -> dict[str, dict[str, dict[str, Any]]]:
    """By problem and row: the settings of the first claim that runs it there."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for claim in load().values():
        runs = claim.settings.get("runs", {}) if claim.group == "language" else {}
        common = {k: v for k, v in claim.settings.items() if k not in NOT_OF_RUNS}
        for own in runs.values():
            given = common | own
            if "learning_rate" not in own and given.get("model", SMALL) == SMALL:
                plain = {k: given[k] for k in ("problem", "method", "updates", "batch_size")}
                labels = {"judge": {"source": given.get("judge", {}).get("source", "rm_same")}}
                by_row = found.setdefault(given["problem"], {})
                by_row.setdefault(given["method"], plain | labels)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed-base", type=int, default=9000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    seeds = range(given.seed_base, given.seed_base + SEEDS)
    cells = {
        (problem, row, rate): cell(settings | {"evals": 2}, {"learning_rate": rate})
        for problem, by_row in wanted().items()
        for row, settings in by_row.items()
        for rate in GRID
    }
    study = Study(given.output, given.workers)
    with Progress(stderr()) as bar:
        study.run(
            [(c.placed(given.output / "made"), seeds) for c in cells.values()], bar.tick("updates")
        )
    print("small:")
    for problem, by_row in wanted().items():
        ends = {
            row: {rate: study.curves(cells[problem, row, rate], seeds).last("gold").mean().item()
                  for rate in GRID}
            for row in by_row
        }  # fmt: skip
        print(f"  {problem}:")
        for row, found in ends.items():
            best = max(found, key=lambda r: found[r])
            shown = ", ".join(f"{r:g} {v:.2f}" for r, v in found.items())
            print(f"    {row}: {best:g}  # {shown}")


if __name__ == "__main__":
    main()
