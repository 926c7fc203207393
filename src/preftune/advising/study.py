"""`preftune advise-study`: draw problems, run the candidates, and measure what advice is worth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from preftune import durable, study
from preftune.advising import (
    candidates,
    drawing,
    files,
    looking,
    problem,
    regret,
    running,
    text_drawing,
    text_judges,
    text_looking,
    text_models,
    texts,
)
from preftune.advising.looking import Seen
from preftune.advising.problem import Problem
from preftune.advising.regret import ByKind, Runs, Tuned
from preftune.advising.running import Arm
from preftune.advising.signs import Circumstances
from preftune.advising.stated import EFFORT, Stated
from preftune.advising.texts import TextProblem
from preftune.errors import UserError
from preftune.runs import RunFolder

Given = TypeVar("Given")
Made = TypeVar("Made")
LEAST_FAMILIES = 3
SEED_BASE = "seed-base.txt"
"""Of a folder of drawn problems."""
Tick = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, kw_only=True)
class Studied:
    """All runs of a study, and what diagnosing each problem showed."""

    runs: Runs
    tuned: Mapping[str, Tuned]
    """By family: the settings that are best on the others of its kind."""
    seen: Sequence[Seen]


def draw(
    count: int, folder: Path, seed_base: int, tick: Callable[[int, int], None], *, of_text: int = 0
) -> list[str]:
    """Write problem files; those that are there already stay.

    Args:
        count: enumerable ones.
        of_text: of language models, which are trained first.

    Returns:
        their names.

    Raises:
        UserError: those that are there were drawn with another seed base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [drawing.name_of(i) for i in range(count)]
    names += [text_drawing.name_of(i) for i in range(of_text)]
    _keep_base(folder, seed_base, any((folder / f"{name}.json").exists() for name in names))
    if of_text:
        text_models.make(folder, seed_base)
    for i, name in enumerate(names):
        if not (folder / f"{name}.json").exists():
            if i < count:
                problem.save(drawing.draw(i, seed_base), folder)
            else:
                texts.save(text_drawing.draw(i - count, folder, seed_base))
        tick(i + 1, len(names))
    return names


def _keep_base(folder: Path, seed_base: int, drawn: bool) -> None:
    """Write the seed base into the folder, or check that it is the one that stands there.

    Args:
        drawn: whether problems stand there.
    """
    path = folder / SEED_BASE
    if not path.exists() and not drawn:
        durable.write_text(path, f"{seed_base}\n")
        return
    held = f"--seed-base {path.read_text().strip()}" if path.exists() else "one that is not known"
    if held != f"--seed-base {seed_base}":
        raise UserError(
            f"output '{folder}': problems there were drawn with another seed base, {held}. "
            "Give another folder."
        )


def run(
    problems: Path, output: Path, *, seed_base: int, workers: int, tuned: ByKind | None, tick: Tick
) -> Studied:
    """Run what is missing of a study, in two stages: on selection seeds, then on fresh ones.

    Args:
        tuned: the setting of each row by kind of problem; None, or where a kind is not there: all
            are run on selection seeds, and those that its family is given (being best on the
            others) on fresh ones.

    Raises:
        UserError: a problem file that is not as the schema says; one family where settings are to
            be tuned on others; an output that is the folder of problems.
    """
    if problems.resolve() == output.resolve():
        raise UserError(
            f"output '{output}': holds the problems, among which results would be taken for some. "
            "Give another folder."
        )
    each, given = files.load_all(problems), tuned or {}
    _check_families(each, problems, given, fit=tuned is None)
    rows, place = candidates.names(), str(problems.resolve())
    models = output / "models"
    every = [
        Arm(i, s)
        for i, p in enumerate(each)
        for r in rows
        for s in candidates.settings_of(r, p.kind)
        if p.kind not in given or s.place == given[p.kind][r]
    ]
    stops = {r: n for r in rows if (n := candidates.patience(r)) is not None}
    runs = Runs(problems=each, rows=rows, stops=stops)
    _make_models(each, models, workers, tick("reward models"))
    both = study.Study(output / "runs", workers)

    def advance(arms: Sequence[Arm], stage: str, seeds: Mapping[str, Sequence[int]]) -> None:
        jobs = [
            job
            for kind, own in seeds.items()
            for job in running.jobs(
                place, each, [a for a in arms if each[a.problem].kind == kind], own, seed_base,
                str(models),
            )
        ]  # fmt: skip
        _advance(both, jobs, runs, tick(stage))

    advance(every, "selection", {kind: e.selection for kind, e in EFFORT.items()})
    by_family = _tuned(runs, given)
    fresh = [
        a for a in every if by_family[each[a.problem].family][a.setting.row] == a.setting.place
    ]
    advance(fresh, "fresh", {kind: e.fresh for kind, e in EFFORT.items()})
    seen = _diagnosed(each, output, seed_base, workers, tick("diagnoses"))
    return Studied(runs=runs, tuned=by_family, seen=seen)


def _check_families(each: Sequence[Stated], place: Path, given: ByKind, *, fit: bool) -> None:
    kinds = {p.family: p.kind for p in each}
    if any(kinds[p.family] != p.kind for p in each):
        raise UserError(
            f"problems '{place}': a family holds problems both of tables and of a language model. "
            "Give them families of their own."
        )
    if fit and len(kinds) < LEAST_FAMILIES:
        raise UserError(
            f"problems '{place}': {len(kinds)} families. Rules are judged on families that "
            f"they have not seen, and chosen likewise: there must be {LEAST_FAMILIES}."
        )
    for kind in sorted(set(kinds.values()) - set(given)):
        own = [f for f, k in kinds.items() if k == kind]
        if len(own) < 2:
            raise UserError(
                f"problems '{place}': all {kind} ones are of the family '{own[0]}'. Settings are "
                "tuned on families that they are not judged on, so that there must be two."
            )


def _tuned(runs: Runs, given: ByKind) -> dict[str, Tuned]:
    """For each family, what is best on the others of its kind."""
    gains, each = runs.gains(), runs.problems
    kinds = {p.family: p.kind for p in each}

    def others(family: str, kind: str) -> list[int]:
        return [i for i, p in enumerate(each) if p.family != family and p.kind == kind]

    return {
        f: given[k] if k in given else regret.tune(runs, gains, others(f, k))[k]
        for f, k in sorted(kinds.items())
    }


def _make_models(
    each: Sequence[Stated], models: Path, workers: int, tick: Callable[[int, int], None]
) -> None:
    """Reward models of language models' problems, each once."""
    asking = [p for p in each if isinstance(p, TextProblem) and p.labels.source == text_judges.OWN]
    for done, _ in enumerate(_mapped(workers, partial(_make, models=models), asking), 1):
        tick(done, len(asking))


def _make(p: TextProblem, models: Path) -> None:
    text_judges.own_model(p, models)


def _mapped(
    workers: int, function: Callable[[Given], Made], items: Sequence[Given]
) -> Iterator[Made]:
    """In a few processes; none: in this one."""
    if workers == 0 or not items:
        yield from map(function, items)
        return
    with study.pool_of(workers) as pool:
        yield from pool.map(function, items)


def _advance(
    both: study.Study, jobs: Sequence[running.Job], runs: Runs, tick: Callable[[int, int], None]
) -> None:
    """Run what is missing, and keep every run's curve."""
    both.run([(j.cell, j.runs) for j in jobs], tick)
    for job in jobs:
        whose = dict(zip(job.runs, job.whose, strict=True))
        by_run: dict[int, list[study.Row]] = {r: [] for r in job.runs}
        for row in both.rows[job.cell.key]:
            if row["seed"] in by_run:
                by_run[row["seed"]].append(row)
        for number, own in by_run.items():
            i, seed = whose[number]
            arm = (i, job.setting.row, job.setting.place)
            points = running.curve(runs.problems[i], own)
            runs.curves.setdefault(arm, {})[seed] = points


def _diagnosed(
    each: Sequence[Stated], output: Path, seed: int, workers: int,
    tick: Callable[[int, int], None],
) -> list[Seen]:  # fmt: skip
    """Each problem's diagnosis; those on disk, of the very same problem, are not made again."""
    folder, name = RunFolder(output), "diagnoses.jsonl"
    keys = [f"{seed}:{p.digest}" for p in each]
    held = {r["problem"]: Seen.of_plain(r) for r in folder.read(name)}
    missing = [(k, p) for k, p in zip(keys, each, strict=True) if k not in held]
    made = _mapped(
        workers, partial(_look, models=output / "models", seed=seed), [p for _, p in missing]
    )
    for done, ((key, _), found) in enumerate(zip(missing, made, strict=True), 1):
        held[key] = found
        folder.append(name, [{"problem": key, **found.plain()}])
        tick(len(each) - len(missing) + done, len(each))
    return [held[k] for k in keys]


def _look(p: Stated, models: Path, seed: int) -> Seen:
    if isinstance(p, TextProblem):
        return text_looking.look(p, models, seed)
    assert isinstance(p, Problem), "of either kind"
    return looking.look(p, seed)


def circumstances(p: Stated) -> Circumstances:
    """What is known of a problem for nothing."""
    return Circumstances(
        label_source=p.labels.source, label_price=p.prices.label, sample_price=p.prices.sample,
        beta=p.beta, pairs=len(p.pairs), budget=p.budget,
    )  # fmt: skip
