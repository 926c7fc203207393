"""Claims about language models: what runs give, added up as `language.yaml` says.

A claim's settings name its runs, as `runs: {dpo: {method: dpo}, narrow: {method: dpo, width: 32}}`,
each with what it has beside the claim's other settings. `value` adds figures of them up:
`{dpo.gold: 1, pref_ft.gold: -1}` is DPO's true reward less Pref-FT's, seed by seed; `dpo.gold@0.5`
is that at half of its updates. A list of such sums is the least of them: a method less the best of
several others. With parts, `value` has one by the name of each.
"""

from collections.abc import Mapping, Sequence
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
NOT_OF_RUNS = ("runs", "value", "figure", "grid", "sides", "pair", "rates", "of")


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
    wanted = {**s["runs"], **(s.get("grid", {}) if full else {})}
    return {
        name: (cell(s, own), [seed + own.get("seed_offset", 0) for seed in seeds])
        for name, own in wanted.items()
    }


@experiment("difference", plan=_plan)
def difference(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Sums of what runs gave."""
    s = claim.settings
    of_parts = s["value"] if claim.parts[0].name else {"": s["value"]}
    values = {part.name: value(of_parts[part.name], runs) for part in claim.parts}
    figure = s.get("figure", "gold")
    shown = {name: (c.steps, c.figures[figure]) for name, c in runs.items() if figure in c.figures}
    return Measured(
        values=values, rows=charts.table("update", figure, seeds, shown),
        figure=charts.lines(f"{claim.id}: {figure}", "updates", figure, shown), notes=notes(runs),
    )  # fmt: skip


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
