"""Does small predict large: the order of rows at one scale against that at another."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.reproduce import charts
from preftune.reproduce.claims import Cells, Claim, Measured, experiment
from preftune.reproduce.language import NOT_OF_RUNS, cell, notes
from preftune.study import Curves

Runs = Mapping[str, Curves]
SCALES = ("small", "large")


def _named(scale: str, problem: str, row: str) -> str:
    return f"{scale}, {problem}, {row}"


def _plan(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s: dict[str, Any] = dict(claim.settings)
    problems, rows = s.pop("problems"), s.pop("runs")
    at = {scale: s.pop(scale) for scale in SCALES}
    common = {k: v for k, v in s.items() if k not in NOT_OF_RUNS}
    return {
        _named(scale, problem, name): (cell(common | own, {**at[scale], "problem": problem}), seeds)
        for scale in SCALES
        for problem in problems
        for name, own in rows.items()
    }


@experiment("transfer", plan=_plan)
def transfer(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Rank correlation of the rows' true rewards at the end, mean over problems."""
    s = claim.settings
    ends = {
        problem: [_ends(scale, problem, s["runs"], runs) for scale in SCALES]
        for problem in s["problems"]
    }
    each = {problem: spearman(*both) for problem, both in ends.items()}
    shown = {problem: (list(range(len(v))), v[None]) for problem, v in each.items()}
    return Measured(
        values={"": torch.stack(list(each.values())).mean(0)},
        rows=charts.table("seed's place", "correlation", [0], shown),
        figure=charts.bars("Rank correlation of eight rows, small against large", "Spearman", each),
        notes=[*notes(runs), *(_told(problem, *both) for problem, both in ends.items())],
    )


def _told(problem: str, small: Tensor, large: Tensor) -> str:
    """Beside the correlation: what chance alone leaves of it, without which it says little."""
    between = float(spearman(small, large).mean())
    means = float(spearman(*(x.mean(0, keepdim=True) for x in (small, large))))
    own = " and ".join(f"{_among(x):.2f}" for x in (small, large))
    return (
        f"{problem}: {between:.2f} between the scales, seed by seed; {means:.2f} of the means over "
        f"seeds; {own} between two seeds at one scale (small, large)."
    )


def _among(ends: Tensor) -> float:
    """Mean rank correlation of two seeds' orders at one scale; NaN of a single seed."""
    first, second = torch.triu_indices(len(ends), len(ends), offset=1)
    return float(spearman(ends[first], ends[second]).mean())


def _ends(scale: str, problem: str, rows: Sequence[str], runs: Runs) -> Tensor:
    """True rewards at the end, [S, rows]."""
    return torch.stack([runs[_named(scale, problem, row)].last("gold") for row in rows], -1)


def spearman(a: Float[Tensor, "S K"], b: Float[Tensor, "S K"]) -> Float[Tensor, " S"]:
    """Rank correlation along the last axis; equal values share the mean of their ranks. 0 where one
    side is all alike."""
    x, y = (r - r.mean(-1, keepdim=True) for r in map(_ranks, (a, b)))
    norm = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return torch.where(norm > 0, (x * y).sum(-1) / norm.clamp_min(1e-12), 0.0)


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, :, None] > values[:, None]).double().sum(-1)
    equal = (values[:, :, None] == values[:, None]).double().sum(-1)
    return below + (equal - 1) / 2
