"""Choose the learning rates of language claims (src/preftune/reproduce/rates.yaml).

    python scripts/language_rates.py OUTPUT [--seed-base 9000] [--workers 2]

Every row that a claim uses runs on every problem where one uses it, with all the settings of the
first claim that does, at each rate of one grid, on two seeds that no claim has; the rate with the
highest true reward at the end is taken, and said to be at an edge where the grid may end too soon.
Runs that OUTPUT holds are not made again; those of other source code are refused. Prints the
file's text.

The rates that stand in rates.yaml now were chosen before all settings were taken: with the claim's
problem, method, updates, batch_size and the judge's source, and all else (passes,
prompts_per_round, pairs, weight) as it comes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.errors import UserError
from preftune.progress import Progress, stderr
from preftune.reproduce.claims import load
from preftune.reproduce.language import NOT_OF_RUNS, cell
from preftune.reproduce.places import SMALL
from preftune.reproduce.runner import source_digest
from preftune.reproduce.text_cell import TextCell
from preftune.runs import RunFolder
from preftune.study import Study

GRID = (1e-4, 3e-4, 1e-3)
SEEDS = 2
EVALS = 2
"""Times that a run is judged: its end is what counts."""
Cells = dict[str, dict[str, dict[float, TextCell]]]


def wanted() -> Cells:
    """By problem, row and rate: a run of the first claim that runs the row there."""
    found: Cells = {}
    for claim in load().values():
        runs = claim.settings.get("runs", {}) if claim.group == "language" else {}
        for own in runs.values():
            given = {k: v for k, v in claim.settings.items() if k not in NOT_OF_RUNS} | own
            if "learning_rate" not in given and given.get("model", SMALL) == SMALL:
                by_row = found.setdefault(given["problem"], {})
                by_row.setdefault(given["method"], _at_each_rate(claim.settings, own))
    return found


def _at_each_rate(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[float, TextCell]:
    return {rate: cell(common, {**own, "evals": EVALS, "learning_rate": rate}) for rate in GRID}


def begun(output: Path, workers: int) -> Study:
    """The study of a folder, free or begun.

    Raises:
        UserError: its runs are of other source code.
    """
    folder, source = RunFolder(output), source_digest()
    if not (output / "config.yaml").is_file():
        RunFolder.check_free(output)
        folder.write_config({"command": "language_rates", "source": source})
    if folder.read_config().get("source") != source:
        raise UserError(f"output '{output}': its runs are of other source code. Give another one.")
    return Study(output, workers)


def line(row: str, found: Mapping[float, float]) -> str:
    """A row of the file, with the true reward at each rate."""
    best = max(found, key=lambda rate: found[rate])
    shown = ", ".join(f"{rate:g} {reward:.2f}" for rate, reward in found.items())
    edge = "; edge" if best in (min(found), max(found)) else ""
    return f"    {row}: {best:g}  # {shown}{edge}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed-base", type=int, default=9000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    seeds = range(given.seed_base, given.seed_base + SEEDS)
    cells, made = wanted(), given.output / "made"
    each = [c for rows in cells.values() for grid in rows.values() for c in grid.values()]
    try:
        study = begun(given.output, given.workers)
        with Progress(stderr()) as bar:
            study.run([(c.placed(made), seeds) for c in each], bar.tick("updates"))
    except UserError as error:
        parser.error(str(error))
    print("small:")
    for problem, rows in cells.items():
        print(f"  {problem}:")
        for row, grid in rows.items():
            ends = {r: study.curves(c, seeds).last("gold").mean().item() for r, c in grid.items()}
            print(line(row, ends))


if __name__ == "__main__":
    main()
