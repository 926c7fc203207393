"""`preftune advise-study`: draw problems, run the candidates, and measure what advice is worth."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from preftune import study
from preftune.advising import candidates, drawing, problem, regret, running, scene
from preftune.advising.looking import Seen, look
from preftune.advising.problem import Problem
from preftune.advising.regret import Runs, Tuned
from preftune.advising.running import Arm
from preftune.advising.signs import Circumstances
from preftune.errors import UserError
from preftune.runs import RunFolder

SELECTION, FRESH = (0, 1), (10, 11, 12, 13)
"""Seeds."""
PATIENCE = 3
"""Places of a curve without a better reward after which a row that stops by itself does."""
LEAST_FAMILIES = 3
Tick = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, kw_only=True)
class Studied:
    """All runs of a study, and what diagnosing each problem showed."""

    runs: Runs
    tuned: Mapping[str, Tuned]
    """By family: the settings that are best on the others."""
    seen: Sequence[Seen]


def draw(count: int, folder: Path, seed_base: int, tick: Callable[[int, int], None]) -> list[str]:
    """Write problem files; those that are there already stay.

    Returns:
        their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [drawing.name_of(i) for i in range(count)]
    for i, name in enumerate(names):
        if not (folder / f"{name}.json").exists():
            problem.save(drawing.draw(i, seed_base), folder)
        tick(i + 1, count)
    return names


def run(
    problems: Path, output: Path, *, seed_base: int, workers: int, tuned: Tuned | None, tick: Tick
) -> Studied:
    """Run what is missing of a study, in two stages: on selection seeds, then on fresh ones.

    Args:
        tuned: the setting of each row; None: all are run on selection seeds, and those that any
            family is given (being best on the others) on fresh ones.

    Raises:
        UserError: a problem file that is not as the schema says; one family where settings are to
            be tuned on others.
    """
    each = problem.load_all(problems)
    families = sorted({p.family for p in each})
    if tuned is None and len(families) < LEAST_FAMILIES:
        raise UserError(
            f"problems '{problems}': {len(families)} families. Rules are judged on families that "
            f"they have not seen, and chosen likewise: there must be {LEAST_FAMILIES}."
        )
    rows, place = candidates.names(), str(problems.resolve())
    every = [
        Arm(i, s)
        for i in range(len(each))
        for r in rows
        for s in candidates.settings_of(r)
        if tuned is None or s.place == tuned[r]
    ]
    stops = dict.fromkeys(filter(candidates.ends_by_itself, rows), PATIENCE)
    runs = Runs(problems=each, rows=rows, stops=stops)
    both = study.Study(output / "runs", workers)
    _advance(both, running.jobs(place, each, every, SELECTION, seed_base), runs, tick("selection"))
    by_family = dict.fromkeys(families, tuned) if tuned is not None else _tuned(runs, families)
    used = {(row, t[row]) for t in by_family.values() for row in rows}
    fresh = [a for a in every if (a.setting.row, a.setting.place) in used]
    _advance(both, running.jobs(place, each, fresh, FRESH, seed_base), runs, tick("fresh"))
    seen = _diagnosed(each, output / "diagnoses.jsonl", workers, tick("diagnoses"))
    return Studied(runs=runs, tuned=by_family, seen=seen)


def _tuned(runs: Runs, families: Sequence[str]) -> dict[str, Tuned]:
    """For each family, what is best on the others."""
    gains, each = runs.gains(SELECTION), runs.problems
    return {
        f: regret.tune(runs, gains, [i for i, p in enumerate(each) if p.family != f])
        for f in families
    }


def _advance(
    both: study.Study, jobs: Sequence[running.Job], runs: Runs, tick: Callable[[int, int], None]
) -> None:
    """Run what is missing, and keep every run's curve."""
    both.run([(j.cell, j.runs) for j in jobs], tick)
    for job in jobs:
        by_run: dict[int, list[study.Row]] = {r: [] for r in job.runs}
        for row in both.rows[job.cell.key]:
            if row["seed"] in by_run:
                by_run[row["seed"]].append(row)
        for number, own in by_run.items():
            i, seed = scene.of_number(number)
            arm = (i, job.setting.row, job.setting.place)
            points = running.curve(runs.problems[i], own)
            runs.curves.setdefault(arm, {})[seed] = points


def _diagnosed(
    each: Sequence[Problem], path: Path, workers: int, tick: Callable[[int, int], None]
) -> list[Seen]:
    """Each problem's diagnosis; those on disk, of the very same problem, are not made again."""
    folder, keys = RunFolder(path.parent), [problem.digest(p) for p in each]
    held = {r["problem"]: Seen.of_plain(r) for r in folder.read(path.name)}
    missing = [(k, p) for k, p in zip(keys, each, strict=True) if k not in held]
    with ProcessPoolExecutor(max(workers, 1), get_context("spawn"), study.one_core) as pool:
        made = pool.map(look, [p for _, p in missing])
        for done, ((key, _), found) in enumerate(zip(missing, made, strict=True), 1):
            held[key] = found
            folder.append(path.name, [{"problem": key, **found.plain()}])
            tick(len(each) - len(missing) + done, len(each))
    return [held[k] for k in keys]


def circumstances(p: Problem) -> Circumstances:
    """What is known of a problem for nothing."""
    return Circumstances(
        label_source=p.labels.source, label_price=p.prices.label, sample_price=p.prices.sample,
        beta=p.beta, pairs=len(p.pairs), budget=p.budget,
    )  # fmt: skip
