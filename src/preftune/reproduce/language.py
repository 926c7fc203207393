"""Claims about language models: what runs give, added up as `language.yaml` says.

A claim's settings name its runs, as `runs: {dpo: {method: dpo}, narrow: {method: dpo, width: 32}}`,
each with what it has beside the claim's other settings. `value` adds figures of them up:
`{dpo.gold: 1, pref_ft.gold: -1}` is DPO's true reward less Pref-FT's, seed by seed; `dpo.gold@0.5`
is that at half of its updates. A list of such sums is the least of them: a method less the best of
several others. With parts, `value` has one by the name of each.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from preftune.problems.preferences import Pairs
from preftune.reproduce import charts
from preftune.reproduce.claims import Cells, Claim, Measured, experiment
from preftune.reproduce.places import Judge, Place
from preftune.reproduce.text_cell import TextCell
from preftune.study import Curves

Runs = Mapping[str, Curves]
Sum = Mapping[str, float]
OF_A_CELL = ("method", "updates", "batch_size", "learning_rate", "evals", "answers")
OF_A_PLACE = ("problem", "model", "width")
APART = ("pairs", "judge", "seed_offset")
NOT_OF_RUNS = ("runs", "value", "figure", "sides", "pair", "rates", "of")
GRID = (1 / 3, 1.0, 3.0)
"""Times a run's learning rate: all are run with `--full`."""


def cell(common: Mapping[str, Any], own: Mapping[str, Any]) -> TextCell:
    """A run as a claim's settings have it, what is its own before what is common."""
    given = {k: v for k, v in common.items() if k not in NOT_OF_RUNS} | dict(own)
    both = {name: {**common.get(name, {}), **own.get(name, {})} for name in ("pairs", "judge")}
    place = Place(
        pairs=Pairs(**both["pairs"]), judge=Judge(**both["judge"]),
        **{k: given[k] for k in OF_A_PLACE if k in given},
    )  # fmt: skip
    if "learning_rate" not in given:
        given["learning_rate"] = rate(given["method"], place)
    rest = {k: v for k, v in given.items() if k not in (*OF_A_CELL, *OF_A_PLACE, *APART)}
    return TextCell(
        place=place, settings=tuple(sorted(rest.items())),
        **{k: given[k] for k in OF_A_CELL if k in given},
    )  # fmt: skip


def rate(method: str, place: Place) -> float:
    """The learning rate that `rates.yaml` has for a row there."""
    import yaml

    text = resources.files("preftune.reproduce").joinpath("rates.yaml").read_text("utf-8")
    return float(yaml.safe_load(text)[place.model][place.problem][method])


def _plan(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    wanted = {**s["runs"], **(_grid(s) if full else {})}
    return {
        name: (cell(s, own), [seed + own.get("seed_offset", 0) for seed in seeds])
        for name, own in wanted.items()
    }


def _grid(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each run at every rate."""
    return {
        at(name, times): {**own, "learning_rate": times * cell(settings, own).learning_rate}
        for name, own in settings["runs"].items()
        for times in GRID
    }


def at(name: str, times: float) -> str:
    """A run of the grid."""
    return f"{name}, rate x {times:.2g}"


@experiment("difference", plan=_plan)
def difference(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Sums of what runs gave."""
    s = claim.settings
    of_parts = s["value"] if claim.parts[0].name else {"": s["value"]}
    values = {part.name: value(of_parts[part.name], runs) for part in claim.parts}
    figure = s.get("figure", "gold")
    curves = {n: (c.steps, c.figures[figure]) for n, c in runs.items() if figure in c.figures}
    shown = {name: curve for name, curve in curves.items() if name in s["runs"]}
    return Measured(
        values=values, rows=charts.table("update", figure, seeds, curves),
        figure=charts.lines(f"{claim.key}: {figure}", "updates", figure, shown),
        notes=[*notes(runs), *_at_best_rates(s["runs"], of_parts, runs)],
    )  # fmt: skip


def _at_best_rates(
    names: Iterable[str], of_parts: Mapping[str, Sum | Sequence[Sum]], runs: Runs
) -> list[str]:
    """Of the whole grid, where it was run: the numbers if every run had the rate at which it ends
    with the most true reward, chosen on the very seeds that are shown, so kind to all."""
    grids = {n: [runs[at(n, r)] for r in GRID if at(n, r) in runs] for n in names}
    if not all(grids.values()):
        return []
    best = {n: max(grid, key=lambda c: float(c.last("gold").mean())) for n, grid in grids.items()}
    found = {part: float(value(sums, best).mean()) for part, sums in of_parts.items()}
    listed = ", ".join(f"{part} {mean:+.3f}".strip() for part, mean in found.items())
    return [f"With each run at the best of {len(GRID)} rates: {listed}."]


def value(sums: Sum | Sequence[Sum], runs: Runs) -> Tensor:
    """A sum of figures, or the least of several sums, [S]."""
    if isinstance(sums, Mapping):
        return torch.stack([w * _figure(name, runs) for name, w in sums.items()]).sum(0)
    return torch.stack([value(one, runs) for one in sums]).amin(0)


def _figure(name: str, runs: Runs) -> Tensor:
    """`RUN.FIGURE`, or `RUN.FIGURE@SHARE` of its updates."""
    whole, _, share = name.partition("@")
    run, _, figure = whole.partition(".")
    found = runs[run]
    if not share:
        return found.last(figure)
    wanted = float(share) * found.steps[-1]
    return found.at(figure, min(found.steps, key=lambda t: abs(t - wanted)))


def notes(runs: Runs) -> list[str]:
    """What a reader must know: runs that had to stop."""
    out = []
    for name, found in runs.items():
        if "stopped" in found.figures:
            count = int(found.figures["stopped"].nansum())
            out.append(f"{name}: {count} of the runs diverged and stay as they were judged last.")
    return out
