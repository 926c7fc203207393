"""What the negative gradient does (arXiv 2404.14367 section 5.2): offline, on fixed samples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from preftune.cells import Cell
from preftune.method import Method
from preftune.problems.arms import States
from preftune.reproduce import charts, rows
from preftune.reproduce.claims import Cells, Claim, Measured, experiment
from preftune.study import Curves

Runs = Mapping[str, Curves]
E3_GRID = (5, 10, 20, 50, 200)
E4_GRID = (5, 10, 20, 50, 100, 200, 500)


def _cell(s: Mapping[str, Any], method: Method, rate: float, states: int, every: int = 20) -> Cell:
    """Full-batch updates on fixed samples of the reference."""
    n = s["samples_per_prompt"]
    return Cell(
        problem=States(reward=s["reward"], states=states, responses=n,
                       similar=s.get("similar", 5)),
        method=method, updates=s["updates"], learning_rate=rate, eval_every=every,
        batch_size=states * method.terms[0].labeller.items(n),
    )  # fmt: skip


def _best_of_n(s: Mapping[str, Any]) -> Method:
    return rows.best_of_n(rows.kept(s["samples_per_prompt"]))


def _ipo(s: Mapping[str, Any]) -> Method:
    return rows.ipo(rows.kept(s["samples_per_prompt"]), s["tau"], s["threshold"])


def _plan_e3(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    found = {
        "best-of-n": _cell(s, _best_of_n(s), s["best_of_n_rate"], s["states"], every=10),
        "IPO": _cell(s, _ipo(s), s["ipo_rate"], s["states"], every=10),
    }
    for states in E3_GRID if full else ():
        found[f"best-of-n, {states} states"] = _cell(s, _best_of_n(s), s["best_of_n_rate"], states)
        found[f"IPO, {states} states"] = _cell(s, _ipo(s), s["ipo_rate"], states)
    return {name: (cell, seeds) for name, cell in found.items()}


@experiment("e3-r1", "e3-r2", "control-reversed-e3", plan=_plan_e3)
def e3(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """IPO less best-of-n at the end (the control: the other way round)."""
    gap = runs["IPO"].last("reward") - runs["best-of-n"].last("reward")
    gap = -gap if claim.id == "control-reversed-e3" else gap
    return _curves(claim, seeds, runs, gap)


@experiment("e3-speed", plan=_plan_e3)
def e3_speed(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Updates to half and to nine tenths of the reachable reward, 1."""
    budget = claim.settings["updates"]
    notes, halves = [], {}
    for level in (0.5, 0.9):
        for name in ("best-of-n", "IPO"):
            steps, reached = _steps_to(runs[name], level, budget)
            halves[name, level] = steps
            notes.append(
                f"{name}: reward {level} after {float(steps.mean()):.0f} updates on average; "
                f"{int(reached.sum())} of {len(steps)} runs get there within {budget}."
            )
    ratio = torch.log2(halves["best-of-n", 0.5] / halves["IPO", 0.5])
    return _curves(claim, seeds, runs, ratio, notes)


def _steps_to(curves: Curves, level: float, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First logged step at which each run has that reward, and whether it has one."""
    reached = curves.figures["reward"] >= level
    first = reached.double().argmax(-1)
    steps = torch.tensor(curves.steps, dtype=torch.float64)[first].clamp(min=1)
    some = reached.any(-1)
    return torch.where(some, steps, float(budget)), some


def _curves(
    claim: Claim, seeds: Sequence[int], runs: Runs, values: torch.Tensor, notes: Sequence[str] = ()
) -> Measured:
    s = claim.settings
    series = {name: (c.steps, c.figures["reward"]) for name, c in runs.items()}
    title = f"Offline, peak {s['reward']}: reward on held-out states, with and without pushing down"
    return Measured(
        values={"": values}, rows=charts.table("update", "reward", seeds, series), notes=notes,
        figure=charts.lines(title, "updates", "expected reward (0 to 1)", series),
    )  # fmt: skip


def _plan_e4(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    own = s["states"] if isinstance(s["states"], list) else [s["states"]]
    counts = sorted({*own, *(E4_GRID if full else ())})
    found = {f"IPO, {n} prompts": _cell(s, _ipo(s), s["ipo_rate"], n) for n in counts}
    return {name: (cell, seeds) for name, cell in found.items()}


@experiment("e4-few", "e4-many", "e4-margin", plan=_plan_e4)
def e4(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Log-ratios of the best sample and of the others, by number of prompts."""
    s = claim.settings
    if claim.id == "e4-margin":
        cells = [runs[f"IPO, {n} prompts"] for n in s["states"]]
        margins = [c.last("h_best") - c.last("h_others") for c in cells]
        values = torch.stack(margins).amin(0)
    else:
        values = runs[f"IPO, {s['states']} prompts"].last("h_best")
    series = {}
    for name, c in runs.items():
        series[f"{name}: best sample"] = (c.steps, c.figures["h_best"])
        series[f"{name}: the others"] = (c.steps, c.figures["h_others"])
    title = "Log-ratio to the reference of training prompts' samples under IPO, peak far"
    return Measured(
        values={"": values}, rows=charts.table("update", "log_ratio", seeds, series),
        figure=charts.lines(title, "updates", "log(policy / reference), nats", series),
    )  # fmt: skip


def _plan_m2(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    kept = rows.kept(s["samples_per_prompt"])
    found = {
        "centred": _cell(s, rows.reinforce(kept, True), s["learning_rate"], s["states"]),
        "r - min r": _cell(s, rows.reinforce(kept, False), s["learning_rate"], s["states"]),
    }
    for share in s["rejected"] if full else (s["rejected"][0], s["rejected"][-1]):
        method = rows.dpo_with(kept, s["dpo_beta"], share)
        found[f"DPO, rejected x {share}"] = _cell(s, method, s["dpo_rate"], s["states"])
    return {name: (cell, seeds) for name, cell in found.items()}


@experiment("m2-isolated", plan=_plan_m2)
def m2_isolated(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """REINFORCE with and without negative weights; DPO with its rejected half scaled."""
    gap = runs["centred"].last("reward") - runs["r - min r"].last("reward")
    notes = [
        f"{name}: reward {float(c.last('reward').mean()):.3f} at the end."
        for name, c in runs.items()
        if name.startswith("DPO")
    ]
    return _curves(claim, seeds, runs, gap, notes)


def _plan_mass(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    method = rows.dpo(rows.kept(s["samples_per_prompt"]), s["dpo_beta"])
    return {"DPO": (_cell(s, method, s["dpo_rate"], s["states"]), seeds)}


@experiment("m2-displaced-mass", plan=_plan_mass)
def m2_mass(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Where the mass went that rejected samples lost."""
    kinds = ("chosen", "similar", "other", "rejected")
    gained = {k: runs["DPO"].last(f"gained_{k}") for k in kinds}
    lost = -gained["rejected"]
    share = torch.where(lost > 0, gained["other"] / lost, math.nan)
    table = [
        {"seed": seed, **{k: float(x[i]) for k, x in gained.items()}}
        for i, seed in enumerate(seeds)
    ]
    title = "Change of probability on training prompts under offline DPO, by kind of arm"
    return Measured(
        values={"": share}, rows=table,
        figure=charts.bars(title, "probability gained, mean over prompts", gained),
        notes=[
            "Arms of a prompt: its best sample, arms within "
            f"{claim.settings['similar']} of it, its other samples (rejected), all the rest."
        ],
    )  # fmt: skip
