"""Runs claims: cells in a study, what is exact beside it, then verdicts and a page."""

import contextlib
import hashlib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from preftune.durable import write_text
from preftune.errors import UserError
from preftune.reproduce.claims import (
    EXPERIMENTS,
    Cells,
    Claim,
    Experiment,
    Judged,
    Measured,
    choose,
    listed,
    verdicts,
)
from preftune.reproduce.page import write_page
from preftune.runs import RunFolder
from preftune.study import CellsFailed, Runnable, Study, one_thread

MODULES = (
    "sampling",
    "gradients",
    "coverage",
    "exact",
    "fits",
    "modes",
    "language",
    "frontiers",
    "transfer",
)
"""Of `preftune.reproduce`, where experiments are registered."""
Tick = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """What a command gives: verdicts, and where the rest is."""

    rows: list[dict[str, Any]]
    page: Path | None
    failed: dict[str, str]
    """By claim: why it could not be judged."""


def _experiments() -> None:
    for name in MODULES:
        import_module(f"preftune.reproduce.{name}")


def claims_listed(ids: Sequence[str], full: bool = False) -> list[dict[str, Any]]:
    """The claims as they stand, with nothing run."""
    return [listed(claim, part) for claim in choose(ids, full) for part in claim.parts]


def reproduce(
    ids: Sequence[str],
    *,
    folder: Path,
    full: bool = False,
    seed_base: int = 0,
    workers: int = 2,
    resume: bool = False,
    tick: Tick = lambda done, total: None,
) -> Reproduced:
    """Run claims and judge them.

    Args:
        ids: claims or groups; all if empty.
        folder: of the study; each claim's data, figure and result go below it.
        full: the rest of each claim's grid too (the verdict is of the claim's own points), and
            language claims at their second size.
        seed_base: added to every seed.
        workers: processes; 0 for this one alone.
        resume: go on with a folder, whose finished runs are kept.

    Raises:
        UserError: an unknown id, or a folder that cannot be used.
    """
    _experiments()
    claims = choose(ids, full)
    seeds = {c.key: tuple(range(seed_base, seed_base + c.seeds)) for c in claims}
    plans = {
        c.key: plan(c, seeds[c.key], full)
        for c in claims
        if (plan := _experiment(c).plan) is not None
    }
    cells = _distinct(plans.values(), folder / "made")
    now = source_digest()
    study, source = _open(folder, cells, workers, resume, now)
    with RunFolder.held(folder):  # verdicts are drawn and written as the only one too
        RunFolder.create(folder, _config(plans, seed_base, source))
        measure = _run(study, cells, claims, seeds, plans, tick)
        judged = [_judged(folder, c, measure) for c in claims]
        rows = [row for j in judged for row in j.rows]
        facts = {
            "First seed": str(seed_base), "Grid": "full" if full else "each claim's own points",
        }  # fmt: skip
        if source != now:
            facts["Source"] = f"runs {source}, verdicts {now}"
        page = write_page(folder / "report.html", judged, facts)
        RunFolder(folder).write_json("results.json", rows)
    failed = {j.claim.key: j.failed for j in judged if j.failed}
    return Reproduced(rows=rows, page=page, failed=failed)


def _run(
    study: Study, cells: Sequence[tuple[Runnable, Sequence[int]]], claims: Sequence[Claim],
    seeds: Mapping[str, Sequence[int]], plans: Mapping[str, Cells], tick: Tick,
) -> Callable[[Claim], Measured]:  # fmt: skip
    """Run the cells, and beside them what is exact; gives what measures a claim by them."""
    exact: dict[str, Callable[[], Measured]] = {}

    def beside(pool: Executor | None) -> None:
        for c in claims:
            if c.key not in plans:
                job = partial(_exact, c, seeds[c.key])
                exact[c.key] = job if pool is None else pool.submit(job).result

    with contextlib.suppress(CellsFailed):  # the claims that need them say so
        study.run(cells, tick, beside)

    def measure(c: Claim) -> Measured:
        if c.key not in plans:
            return exact[c.key]()
        for cell, _ in plans[c.key].values():
            if cell.key in study.failed:
                raise study.failed[cell.key]
        runs = {n: study.curves(cell, own) for n, (cell, own) in plans[c.key].items()}
        return _experiment(c).conclude(c, seeds[c.key], runs)

    return measure


def _experiment(claim: Claim) -> Experiment:
    return EXPERIMENTS[claim.by or claim.key]


def _exact(claim: Claim, seeds: Sequence[int]) -> Measured:
    """What needs no training, here or in another process."""
    _experiments()
    with one_thread():
        return _experiment(claim).conclude(claim, seeds, {})


def _distinct(plans: Iterable[Cells], made: Path) -> list[tuple[Runnable, Sequence[int]]]:
    """Each cell once with all of its seeds: claims share cells.

    Args:
        made: the folder for what they make on the way.
    """
    cells: dict[str, Runnable] = {}
    seeds: dict[str, set[int]] = {}
    for plan in plans:
        for cell, own in plan.values():
            cells[cell.key] = cell.placed(made)
            seeds.setdefault(cell.key, set()).update(own)
    return [(cell, sorted(seeds[key])) for key, cell in cells.items()]


def _open(
    folder: Path, cells: Sequence[tuple[Runnable, Sequence[int]]], workers: int, resume: bool,
    now: str,
) -> tuple[Study, str]:  # fmt: skip
    """A free folder, or one that has been begun, and the digest of the source of its runs: that of
    the code as it is now, or another where nothing is left to run and verdicts alone are drawn."""
    if not (resume and (folder / "config.yaml").is_file()):
        RunFolder.check_free(folder)
        return Study(folder, workers), now
    source = RunFolder(folder).read_config().get("source")
    study = Study(folder, workers)
    if source != now and any(study.missing(*cell) for cell in cells):
        raise UserError(
            f"output '{folder}': its runs were made by other source code, so they cannot be "
            "mixed with new ones. Give another folder."
        )
    return study, str(source)


def _config(plans: Mapping[str, Cells], seed_base: int, source: str) -> dict[str, Any]:
    """Of the folder: every cell's settings, and which claims need it."""
    cells: dict[str, Any] = {}
    for name, plan in plans.items():
        for cell, _ in plan.values():
            own = cells.setdefault(cell.key, {"claims": [], "settings": _words(cell.plain())})
            own["claims"].append(name)
    return {"command": "reproduce", "seed_base": seed_base, "source": source, "cells": cells}


def _words(value: Any) -> Any:
    """Plain YAML of a cell's settings."""
    if isinstance(value, Mapping):
        return {str(k): _words(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_words(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def source_digest() -> str:
    """Of every source file of the package: results of other code are not mixed with these."""
    digest = hashlib.blake2b(digest_size=8)
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")) + sorted(root.rglob("*.yaml")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _judged(folder: Path, claim: Claim, measure: Callable[[Claim], Measured]) -> Judged:
    """A claim's verdicts, kept in its folder; or why there are none: a fault in one claim must not
    lose the others."""
    place = folder / "claims" / claim.key
    place.mkdir(parents=True, exist_ok=True)
    for old in ("data.jsonl", "result.json", "traceback.txt"):
        (place / old).unlink(missing_ok=True)
    try:
        measured = measure(claim)
        rows = verdicts(claim, measured)
    except UserError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        write_text(place / "traceback.txt", "".join(traceback.format_exception(error)))
        return Judged(claim, [listed(claim, p) | {"error": why} for p in claim.parts], None, why)
    own = RunFolder(place)
    own.append("data.jsonl", measured.rows)
    per_seed = {name: values.tolist() for name, values in measured.values.items()}
    own.write_json("result.json", {
        "verdicts": rows, "statistic_by_seed": per_seed, "notes": list(measured.notes),
    })  # fmt: skip
    return Judged(claim, rows, measured)
