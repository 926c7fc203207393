"""On-policy sampling and sample reuse (arXiv 2404.14367 section 5.1 and 5.3, and its open ends)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from preftune.cells import Cell
from preftune.method import Method
from preftune.problems.arms import Arms, States
from preftune.problems.bandit import Peak, Peaks
from preftune.problems.tokens import Tokens
from preftune.reproduce import charts, rows
from preftune.reproduce.claims import Cells, Claim, Measured, experiment
from preftune.study import Curves

Runs = Mapping[str, Curves]


def _on_policy(name: str, s: Mapping[str, Any], prompts: int, passes: int) -> Method:
    """The row of that name on rounds of so many prompts."""
    source = rows.fresh(prompts, passes, s["samples_per_prompt"])
    if name == "best_of_n":
        return rows.best_of_n(source)
    if name == "ppo":
        return rows.ppo(source, s["clip"])
    if name == "rwr":
        return rows.rwr(source, s.get("rwr_beta", s.get("beta", 0.1)))
    return rows.dpo(source, s.get("dpo_beta", s.get("beta", 0.1)))


def _items(method: Method, prompts: int, samples: int) -> int:
    """batch_size that takes so many prompts an update."""
    return prompts * method.terms[0].labeller.items(samples)


def _one_round_size(
    s: Mapping[str, Any], name: str, size: int, passes: int, rate: float, evals: int = 12
) -> Cell:
    """A run on `states` whose rounds have `size` samples; equal samples, passes and minibatches
    for every size, so equal updates."""
    n, per_update = s["samples_per_prompt"], s["prompts_per_update"]
    updates = s["samples"] // n // per_update * passes
    method = _on_policy(name, s, size // n, passes)
    return Cell(
        problem=States(reward=s["reward"], states=s["samples"] // n), method=method,
        updates=updates, batch_size=_items(method, per_update, n), learning_rate=rate,
        eval_every=max(1, updates // evals),
    )  # fmt: skip


E1_GRID = (100, 200, 600, 1200, 3000)


def _plan_e1(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    sizes = sorted({s["fresh"], s["stale"], *(E1_GRID if full else ())})
    return {
        f"rounds of {size}": (
            _one_round_size(s, s["method"], size, s["passes"], s["learning_rate"]), seeds
        )
        for size in sizes
    }  # fmt: skip


@experiment("e1-bofn-r1", "e1-bofn-r2", "e1-ppo", "e1-rwr", plan=_plan_e1)
def e1(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Rounds of few samples against one round of all, at equal samples and updates."""
    s = claim.settings
    gap = runs[f"rounds of {s['fresh']}"].last("reward") - runs[f"rounds of {s['stale']}"].last(
        "reward"
    )
    title = f"{s['method']}, reward {s['reward']}: expected reward as samples are used"
    return _curves(claim, seeds, runs, gap, title, "updates")


def _curves(
    claim: Claim, seeds: Sequence[int], runs: Runs, values: Tensor, title: str, x: str,
    notes: Sequence[str] = (),
) -> Measured:  # fmt: skip
    """Reward against updates of every cell."""
    series = {name: (c.steps, c.figures["reward"]) for name, c in runs.items()}
    return Measured(
        values={"": values}, rows=charts.table("update", "reward", seeds, series),
        figure=charts.lines(title, x, "expected reward (0 to 1)", series), notes=notes,
    )  # fmt: skip


def _token_cell(s: Mapping[str, Any], name: str, passes: int, rate: float, evals: int = 5) -> Cell:
    """A run on `tokens`: full-batch updates on rounds of equal size."""
    n = s["samples_per_prompt"]
    prompts = s["round"] // n
    updates = s["samples"] // s["round"] * passes
    method = _on_policy(name, s, prompts, passes)
    return Cell(
        problem=Tokens(reward=s["reward"], prompts=s["samples"] // n), method=method,
        updates=updates, batch_size=_items(method, prompts, n), learning_rate=rate,
        eval_every=updates // evals,
    )  # fmt: skip


E2_GRID = (1, 2, 5, 10, 20, 50)


def _plan_e2(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    counts = sorted({s["fewer"], s["more"], *(E2_GRID if full else ())})
    names = {"best_of_n": s.get("best_of_n_rate", s.get("learning_rate"))}
    if "ppo_rate" in s:
        names["ppo"] = s["ppo_rate"]
    return {
        f"{name}, {t} passes": (_token_cell(s, name, t, rate), seeds)
        for name, rate in names.items()
        for t in counts
    }


def _shares(runs: Runs) -> dict[str, tuple[Sequence[float], Tensor]]:
    """Reward against the share of samples used: runs of other lengths on one axis."""
    return {
        name: ([100 * t / c.steps[-1] for t in c.steps], c.figures["reward"])
        for name, c in runs.items()
    }


@experiment("e2-t2", "e2-large-t", plan=_plan_e2)
def e2(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """More passes against fewer, at equal samples: e2-t2 asks for a gain, e2-large-t for a loss."""
    s = claim.settings
    few, many = (runs[f"best_of_n, {s[k]} passes"].last("reward") for k in ("fewer", "more"))
    values = many - few if claim.id == "e2-t2" else few - many
    return _passes(claim, seeds, runs, values)


@experiment("e2-ppo-tolerates", plan=_plan_e2)
def e2_ppo(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Best-of-n's loss of reward from fewer to more passes less PPO's."""
    s = claim.settings
    lost = {
        name: runs[f"{name}, {s['fewer']} passes"].last("reward")
        - runs[f"{name}, {s['more']} passes"].last("reward")
        for name in ("best_of_n", "ppo")
    }
    return _passes(claim, seeds, runs, lost["best_of_n"] - lost["ppo"])


def _passes(claim: Claim, seeds: Sequence[int], runs: Runs, values: Tensor) -> Measured:
    series = _shares(runs)
    where = {"tokens": "Nine tokens", "arms": "One state"}[claim.settings["problem"]]
    title = f"{where}, peak far: expected reward as samples are used, by passes over each round"
    return Measured(
        values={"": values}, rows=charts.table("share_of_samples", "reward", seeds, series),
        figure=charts.lines(title, "samples used, %", "expected reward (0 to 1)", series),
    )  # fmt: skip


def _plan_e7(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    found = {
        f"on-policy {name}": _token_cell(s, name, s["passes"], s[f"{name}_rate"])
        for name in ("dpo", "best_of_n", "ppo", "rwr")
    }
    model, n = found["on-policy dpo"], s["samples_per_prompt"]
    problem = Tokens(reward=s["reward"], prompts=s["samples"] // n, responses=n)
    found["offline dpo"] = replace(
        model, problem=problem, method=rows.dpo(rows.kept(n), s["dpo_beta"])
    )
    return {name: (cell, seeds) for name, cell in found.items()}


@experiment("e7-complement", plan=_plan_e7)
def e7(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """On-policy DPO less the best of the others."""
    others = [c.last("reward") for n, c in runs.items() if n != "on-policy dpo"]
    best = max(others, key=lambda x: float(x.mean()))
    title = "Nine tokens, peak far: fresh samples and negative gradient, together and apart"
    return _curves(
        claim, seeds, runs, runs["on-policy dpo"].last("reward") - best, title, "updates"
    )


def _arms_cell(s: Mapping[str, Any], offline: bool, modes: Peaks | None = None) -> Cell:
    """DPO on one state, fresh or on as many samples of the reference."""
    n, prompts = s["samples_per_prompt"], s["prompts_per_update"]
    method = rows.dpo(rows.kept(n) if offline else rows.fresh(samples=n), s["beta"])
    problem = Arms(
        reward=s.get("reward", "far"), modes=modes, rows=prompts * s["updates"],
        responses=n if offline else 0,
    )  # fmt: skip
    return Cell(
        problem=problem, method=method, updates=s["updates"], eval_every=s["updates"] // 12,
        batch_size=_items(method, prompts, n), learning_rate=s["learning_rate"],
    )  # fmt: skip


def _plan_first1(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    cells = {"on-policy": False, "offline": True}
    return {name: (_arms_cell(claim.settings, off), seeds) for name, off in cells.items()}


@experiment("first-1", plan=_plan_first1)
def first1(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """On-policy less offline DPO at the end."""
    gap = runs["on-policy"].last("reward") - runs["offline"].last("reward")
    return _curves(claim, seeds, runs, gap, "One state, peak far: DPO by its samples", "updates")


def _plan_null(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    cell = _arms_cell(claim.settings, offline=False)
    apart = max(seeds) - min(seeds) + 1
    return {"dpo": (cell, seeds), "dpo, other seeds": (cell, [s + apart for s in seeds])}


@experiment("control-null-dpo", plan=_plan_null)
def null(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """A method against itself."""
    gap = runs["dpo"].last("reward") - runs["dpo, other seeds"].last("reward")
    return _curves(claim, seeds, runs, gap, "Control: DPO against DPO on other seeds", "updates")


def _plan_first3(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s, found = claim.settings, {}
    n = s["samples_per_prompt"]
    prompts = s["round"] // n
    for passes in s["passes"] if full else (s["fewer"], s["more"]):
        method = rows.best_of_n(rows.fresh(prompts, passes, n))
        updates = s["samples"] // s["round"] * passes
        found[f"{passes} passes"] = Cell(
            problem=Arms(reward=s["reward"], rows=prompts), method=method, updates=updates,
            batch_size=prompts, learning_rate=s["learning_rate"], eval_every=updates // 12,
        )  # fmt: skip
    return {name: (cell, seeds) for name, cell in found.items()}


@experiment("first-3", plan=_plan_first3)
def first3(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Ten passes less one, at equal samples."""
    s = claim.settings
    gap = runs[f"{s['more']} passes"].last("reward") - runs[f"{s['fewer']} passes"].last("reward")
    return _passes(claim, seeds, runs, gap)


def _plan_open2(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    sizes, counts = (s["all_rounds"], s["all_passes"]) if full else (s["rounds"], s["passes"])
    return {
        f"{name}, rounds of {size}, {t} passes": (
            _one_round_size(s, name, size, t, s["learning_rate"], 1), seeds
        )
        for name in ("best_of_n", "ppo", "dpo")
        for size in sizes
        for t in counts
    }  # fmt: skip


@experiment("open-2", plan=_plan_open2)
def open2(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """Some passes over small rounds less the better of fewer passes and of larger rounds."""
    (small, large), (one, some) = claim.settings["rounds"], claim.settings["passes"]

    def at(name: str, size: int, passes: int) -> Tensor:
        return runs[f"{name}, rounds of {size}, {passes} passes"].last("reward")

    gaps = [
        at(n, small, some) - torch.maximum(at(n, small, one), at(n, large, some))
        for n in ("best_of_n", "ppo", "dpo")
    ]
    ends = {name: c.last("reward") for name, c in runs.items()}
    best = max(ends, key=lambda name: float(ends[name].mean()))
    table = [
        {"cell": name, "seed": seed, "reward": float(x[i])}
        for name, x in ends.items()
        for i, seed in enumerate(seeds)
    ]
    title = "States, peak far, 3000 samples: expected reward by size of rounds and passes"
    return Measured(
        values={"": torch.stack(gaps).mean(0)}, rows=table,
        figure=charts.bars(title, "expected reward (0 to 1)", ends),
        notes=[f"The highest mean of the grid that was run: {best}."],
    )  # fmt: skip


def _modes(s: Mapping[str, Any]) -> Peaks:
    return Peaks(tuple(Peak(c, s["width"]) for c in s["centres"]))


def _plan_check3(claim: Claim, seeds: Sequence[int], full: bool) -> Cells:
    s = claim.settings
    fresh = _arms_cell(s, offline=False, modes=_modes(s))
    kept = _arms_cell(s, offline=True, modes=_modes(s))
    n, prompts = s["samples_per_prompt"], s["prompts_per_update"]
    imitation = replace(kept, method=rows.best_of_n(rows.kept(n)), batch_size=prompts)
    cells = {
        "on-policy dpo": fresh, "offline dpo": kept, "offline best-of-n": imitation,
        "on-policy best-of-n": replace(
            fresh, method=rows.best_of_n(rows.fresh(samples=n)), batch_size=prompts
        ),
    }  # fmt: skip
    return {name: (cell, seeds) for name, cell in cells.items()}


@experiment("check-3", plan=_plan_check3)
def check3(claim: Claim, seeds: Sequence[int], runs: Runs) -> Measured:
    """How many of three equal modes are kept."""
    kept: dict[str, Tensor] = {}
    table: list[dict[str, Any]] = []
    for name, c in runs.items():
        mass = torch.stack([c.last(f"mass_{i}") for i in range(3)], -1)
        share = mass / mass.sum(-1, keepdim=True)
        kept[name] = torch.exp(torch.special.entr(share).sum(-1))
        table += [
            {"method": name, "seed": seed, **{f"mass_{i}": float(mass[k, i]) for i in range(3)}}
            for k, seed in enumerate(seeds)
        ]
    title = "Three equal modes at 20, 45 and 70: effective number kept after 300 updates"
    return Measured(
        values={"": kept["offline best-of-n"] - kept["on-policy dpo"]}, rows=table,
        figure=charts.bars(title, "effective number of modes (1 to 3)", kept),
    )  # fmt: skip
