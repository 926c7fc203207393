"""Other settings of claims that did not come out: in which regime would they? Markdown tables.

    python scripts/bandit_regimes.py

Not claims: nothing here was fixed beforehand, and no verdict follows from it. Eight seeds from 500.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from preftune.cells import Cell
from preftune.figures import interval
from preftune.problems.arms import States
from preftune.problems.words import Words
from preftune.reproduce import rows
from preftune.study import Study

SEEDS = range(500, 508)


def reinforce() -> dict[str, Cell]:
    """`m2-isolated` at other rates, and on fresh samples."""
    found = {}
    for rate in (1e-4, 3e-4, 1e-3, 3e-3):
        for name, centred in (("centred", True), ("r - min r", False)):
            base = Cell(
                problem=States(states=100, responses=10), updates=200, batch_size=100,
                method=rows.reinforce(rows.kept(10), centred), learning_rate=rate, eval_every=10,
            )  # fmt: skip
            found[f"offline, rate {rate:g}, {name}"] = base
            found[f"fresh samples, rate {rate:g}, {name}"] = replace(
                base, problem=States(states=1000), batch_size=5,
                method=rows.reinforce(rows.fresh(5), centred),
            )  # fmt: skip
    return found


def overtrained() -> dict[str, Cell]:
    """`c4-global-needed`, `c6-hypo-local` and `c8-hypo-kl` with four times the updates."""
    found = {}
    methods = {"DPO": rows.given_pairs(0.1), "HyPO": rows.hypo(0.1, 0.01, 4)}
    for pairs in (300, 1000, 30000):
        for name, method in methods.items():
            if name == "HyPO" and pairs == 30000:
                continue
            found[f"{name}, {pairs} pairs"] = Cell(
                problem=Words(data="covered", pairs=pairs), method=method, updates=6000,
                batch_size=64, learning_rate=1e-3, eval_every=300,
            )  # fmt: skip
    return found


def table(study: Study, cells: Mapping[str, Cell], names: Sequence[str], best: str) -> None:
    """Means and intervals at the end, and the best checkpoint of one figure."""
    study.run([(cell, SEEDS) for cell in cells.values()])
    heads = ["setting", *(f"{n}, end" for n in names), f"{best}, best checkpoint"]
    print("| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), sep="\n")
    for label, cell in cells.items():
        c = study.curves(cell, SEEDS)
        found = [c.last(n) for n in names] + [c.figures[best].amax(-1)]
        shown = [interval(v[:, None]) for v in found]
        texts = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in shown]
        print("| " + " | ".join([label, *texts]) + " |")
    print()


def main() -> None:
    """Both tables."""
    study = Study(None)
    table(study, reinforce(), ["reward", "entropy"], "reward")
    table(study, overtrained(), ["value", "reverse_kl", "mass_rare"], "value")


if __name__ == "__main__":
    main()
