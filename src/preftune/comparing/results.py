"""From results a run to what is said of a comparison, as plain data: compare.json."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preftune.comparing import statistics, wording
from preftune.comparing.job import read, result_of
from preftune.comparing.running import STOPPED
from preftune.counting import COUNTS
from preftune.report.read import best_of_kl

Result = Mapping[str, Any]
FIGURES = ("reward", "gold", "kl", "length", "entropy", "no_end")
SHOWN = ("response", "reward", "tokens", "finished")
TEXTS = 8
"""Held-out prompts whose answers are shown."""


class Failure(NamedTuple):
    """Of all runs of a competitor."""

    message: str
    why: str
    """As results have it: stopped by a guard, refused, failed."""


def choice(grid: Sequence[float], found: Mapping[str, Result], entry: str) -> dict[str, Any]:
    """Of a competitor's rates the one with the highest mean reward; of equal ones the lowest.

    Returns:
        rate (None where every run failed), the grid with each rate's mean reward or failure, and
        whether the choice is at an end of the grid.
    """
    if len(grid) == 1:
        return {"rate": grid[0], "grid": [{"rate": grid[0]}], "chosen": False, "edge": None}
    rows: list[dict[str, Any]] = []
    for rate in grid:
        result = found[f"rate-{entry}-{rate:.3g}"]
        if "failed" in result:
            rows.append({"rate": rate, "failed": result["failed"], "why": result["why"]})
            continue
        values = matrix([result], "reward")
        rows.append({"rate": rate, "reward": float(values.mean()), "prompts": values.shape[1]})
    sound = [row for row in rows if math.isfinite(row.get("reward", math.nan))]
    if not sound:
        for row in (row for row in rows if "failed" not in row):
            row |= {"failed": "the reward is not finite", "why": STOPPED}
        return {"rate": None, "grid": rows, "chosen": False, "edge": None}
    best = max(sound, key=lambda row: (row["reward"], -row["rate"]))["rate"]
    edge = {min(grid): "lowest", max(grid): "highest"}.get(best) if len(grid) > 2 else None
    return {"rate": best, "grid": rows, "chosen": True, "edge": edge}


def matrix(runs: Sequence[Result], name: str) -> np.ndarray:
    """[S, P]: a figure's mean over each prompt's answers, of runs on the same prompts."""
    rows = runs[0]["answers"]["row"]
    assert all(run["answers"]["row"] == rows for run in runs), "runs answer the same prompts"
    values = [np.asarray(run["answers"][name], dtype=float).mean(-1) for run in runs]
    return np.stack(values)


def summarise(
    folder: Path, request: Mapping[str, Any], plan: Mapping[str, Any],
    chosen: Mapping[str, Mapping[str, Any]], failures: Mapping[str, Failure],
    held: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything that page and terminal show.

    Args:
        request, plan: plain.
        chosen: of each competitor, `choice`.
        failures: of those that could not be run.
        held: how the prompts were split.
    """
    finals = _finals(folder)
    reference = result_of(folder, "reference")
    assert reference is not None, "the reference is the first job"
    names = [e["name"] for e in request["entries"]]
    by = "gold" if "gold" in reference["answers"] else "reward"
    methods = [
        _method(name, finals.get(name, []), reference, chosen.get(name), plan) for name in names
    ]
    able = {m["name"]: [r for r in finals[m["name"]] if "failed" not in r]
            for m in methods if m["runs"]}  # fmt: skip
    pairs = _pairs(able, by)
    found: dict[str, Any] = {
        "command": "compare", "judged_by": by, "facts": reference["facts"],
        "budgets": {k: request[k] for k in ("budget", "per_run", "steps", "samples")},
        "settings": request["settings"], "entries": request["entries"],
        "methods": methods, "reference": _reference(reference), "pairs": pairs,
        "plan": dict(plan), "prompts": dict(held), "cuts": list(plan["cuts"]),
        "failed": _failed(finals, failures, chosen), "texts": _texts(able, reference),
        "notes": [],
    }  # fmt: skip
    found["unit"] = wording.unit(found["facts"][by])
    found["notes"] = [*request.get("notes", ()), *wording.notes(found)]
    found["verdict"] = wording.verdict(found)
    return found


def _finals(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The judged runs that ended, by competitor, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for job in read(folder):
        result = result_of(folder, job.key) if job.kind == "final" else None
        if result is not None:
            found.setdefault(job.entry, []).append(result)
    return {name: sorted(runs, key=lambda r: r["seed"]) for name, runs in found.items()}


def _method(
    name: str, runs: Sequence[Result], reference: Result,
    chosen: Mapping[str, Any] | None, plan: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One competitor."""
    sound = [r for r in runs if "failed" not in r]
    for result in sound:
        assert chosen and result["rate"] == chosen["rate"], "judged runs have the chosen rate"
    own: dict[str, Any] = {
        "name": name, "rate": chosen and chosen["rate"], "choice": chosen,
        "planned": plan["updates"].get(name), "runs": [r["seed"] for r in sound],
        "asked": len(runs), "figures": {}, "gains": {}, "spent": {}, "curves": [],
    }  # fmt: skip
    if not sound:
        return own
    start = {f: matrix([reference], f) for f in FIGURES if f in reference["answers"]}
    for figure in FIGURES:
        if figure not in sound[0]["answers"]:
            continue
        values = matrix(sound, figure)
        own["figures"][figure] = _bounded(figure, statistics.crossed(values))
        if figure in ("reward", "gold") and figure in start:
            own["gains"][figure] = vars(statistics.crossed(values - start[figure]))
    last = [r["curve"][-1] for r in sound]
    own["spent"] = {k: float(np.mean([row[k] for row in last])) for k in ("seconds", *COUNTS)}
    own["spent"]["whole"] = float(np.mean([r["seconds"]["whole"] for r in sound]))
    own["updates"] = [r["updates"] for r in sound]
    own["curves"] = [_curve(run, reference) for run in sound]
    return own


def _bounded(figure: str, e: statistics.Estimate) -> dict[str, Any]:
    """An interval that ends where the figure does: only rewards may be below 0."""
    found = dict(vars(e))
    if figure not in ("reward", "gold") and found["low"] is not None:
        found["low"] = max(0.0, found["low"])
    return found


def _curve(run: Result, reference: Result) -> dict[str, Any]:
    """A run's way: what was spent, and its figures on the prompts that are asked all along."""
    on_the_way = [row for row in run["curve"] if "answers" in row]
    few = len(on_the_way[0]["answers"]["row"]) if on_the_way else len(run["answers"]["row"])
    zero = dict.fromkeys(("step", "seconds", *COUNTS), 0.0)
    points = [zero | _means(reference["answers"], few) | {"kl": 0.0}]
    for row in on_the_way:
        points.append({k: row[k] for k in zero} | _means(row["answers"], few))
    end = run["curve"][-1]
    points.append({k: end[k] for k in zero} | _means(run["answers"], few))
    return {"seed": run["seed"], "prompts": few, "points": points}


def _means(answers: Mapping[str, Any], few: int) -> dict[str, float]:
    return {
        name: float(np.asarray(answers[name][:few], dtype=float).mean())
        for name in ("reward", "gold", "kl") if name in answers
    }  # fmt: skip


def _reference(result: Result) -> dict[str, Any]:
    """The untrained model, and the best of n of its answers."""
    names = [f for f in FIGURES if f in result["answers"]]
    return {
        "figures": {f: _bounded(f, statistics.crossed(matrix([result], f))) for f in names},
        "best_of_n": {
            role: [{"n": int(n), "kl": best_of_kl(int(n)), **f} for n, f in sizes.items()]
            for role, sizes in result["best_of_n"].items()
        },
    }


def _pairs(runs: Mapping[str, Sequence[Result]], by: str) -> list[dict[str, Any]]:
    """Each two competitors on the seeds that both have."""
    found: dict[tuple[str, str], statistics.Estimate] = {}
    for a, b in statistics.pairs_of(list(runs)):
        mine, other = ({r["seed"]: r for r in runs[name]} for name in (a, b))
        seeds = sorted(mine.keys() & other.keys())
        if seeds:
            values = matrix([mine[s] for s in seeds], by) - matrix([other[s] for s in seeds], by)
            found[a, b] = statistics.crossed(values)
    # one seed says nothing of another, however many prompts agree
    adjusted = statistics.holm({k: e.p if e.seeds > 1 else None for k, e in found.items()})
    return [
        {
            "a": a, "b": b, **vars(e), "adjusted": adjusted.get((a, b)),
            "better": _better(a, b, e, adjusted.get((a, b))),
        }
        for (a, b), e in found.items()
    ]  # fmt: skip


def _better(a: str, b: str, e: statistics.Estimate, adjusted: float | None) -> str | None:
    """Which of the two, where it can be told at 5 % over all pairs together."""
    if adjusted is None or adjusted > 1 - statistics.LEVEL or e.value == 0:
        return None
    return a if e.value > 0 else b


def _failed(
    finals: Mapping[str, Sequence[Result]], failures: Mapping[str, Failure],
    chosen: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Every run that gave no figures; `why` of those that were to be judged."""
    out = [{"method": n, "what": "all of its runs", **how._asdict()} for n, how in failures.items()]
    for name, how in chosen.items():
        out += [
            {"method": name, "what": f"learning rate {row['rate']:.3g}", "message": row["failed"]}
            for row in how["grid"] if "failed" in row and name not in failures
        ]  # fmt: skip
    for name, runs in finals.items():
        out += [
            {"method": name, "what": f"seed {r['seed']} ({r['why']})", "message": r["failed"],
             "why": r["why"]}
            for r in runs if "failed" in r
        ]  # fmt: skip
    return out


def _texts(runs: Mapping[str, Sequence[Result]], reference: Result) -> list[dict[str, Any]]:
    """Answers side by side: the untrained model's and each competitor's of its first seed."""
    sides = {"untrained": reference["texts"], **{n: own[0]["texts"] for n, own in runs.items()}}
    out = []
    for place, row in enumerate(reference["texts"][:TEXTS]):
        answers = [
            {"method": name, **{k: texts[place][k] for k in SHOWN}}
            for name, texts in sides.items()
            if place < len(texts) and texts[place]["row"] == row["row"]
        ]
        out.append({"prompt": row["prompt"], "answers": answers})
    return out
