"""Runs claims: cells in a study, what is exact beside it, then verdicts and a page."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from preftune.errors import UserError
from preftune.reproduce.claims import (
    EXPERIMENTS,
    Claim,
    Experiment,
    Measured,
    choose,
    listed,
    verdicts,
)
from preftune.reproduce.page import write_page
from preftune.runs import RunFolder
from preftune.study import Runnable, Study, one_thread

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
    _open(folder, plans, seed_base, resume)
    study = Study(folder, workers)
    exact: dict[str, Future[Measured] | Measured] = {}

    def beside(pool: Executor | None) -> None:
        for c in claims:
            if c.key not in plans:
                job = (c, seeds[c.key])
                exact[c.key] = _exact(*job) if pool is None else pool.submit(_exact, *job)

    def finished() -> dict[str, Measured]:
        return {k: m.result() if isinstance(m, Future) else m for k, m in exact.items()}

    study.run(_distinct(plans.values(), folder / "made"), tick, beside)
    found = finished()
    rows = []
    for c in claims:
        if c.key in plans:
            runs = {n: study.curves(cell, own) for n, (cell, own) in plans[c.key].items()}
            found[c.key] = _experiment(c).conclude(c, seeds[c.key], runs)
        own_rows = verdicts(c, found[c.key])
        _write(folder / "claims" / c.key, own_rows, found[c.key])
        rows += own_rows
    page = write_page(folder / "report.html", claims, rows, found, seed_base, full)
    RunFolder(folder).write_json("results.json", rows)
    return Reproduced(rows=rows, page=page)


def _experiment(claim: Claim) -> Experiment:
    return EXPERIMENTS[claim.by or claim.key]


def _exact(claim: Claim, seeds: Sequence[int]) -> Measured:
    """What needs no training, here or in another process."""
    _experiments()
    with one_thread():
        return _experiment(claim).conclude(claim, seeds, {})


def _distinct(
    plans: Iterable[Mapping[str, tuple[Runnable, Sequence[int]]]], made: Path
) -> list[tuple[Runnable, Sequence[int]]]:
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
    folder: Path,
    plans: Mapping[str, Mapping[str, tuple[Runnable, Sequence[int]]]],
    seed_base: int,
    resume: bool,
) -> None:
    """A free folder, or one that this very code has begun."""
    config = {
        "command": "reproduce", "seed_base": seed_base, "source": source_digest(),
        "cells": {
            cell.key: {"claims": [], "settings": _words(cell.plain())}
            for plan in plans.values() for cell, _ in plan.values()
        },
    }  # fmt: skip
    for name, plan in plans.items():
        for cell, _ in plan.values():
            config["cells"][cell.key]["claims"].append(name)
    began = folder / "config.yaml"
    if not (resume and began.is_file()):
        RunFolder.check_free(folder)
    elif RunFolder(folder).read_config().get("source") != config["source"]:
        raise UserError(
            f"output '{folder}': its runs were made by other source code, so they cannot be "
            "mixed with new ones. Give another folder."
        )
    RunFolder.create(folder, config)


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


def _write(folder: Path, rows: list[dict[str, Any]], measured: Measured) -> None:
    """data.jsonl and result.json of a claim."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").unlink(missing_ok=True)
    own = RunFolder(folder)
    own.append("data.jsonl", measured.rows)
    per_seed = {name: values.tolist() for name, values in measured.values.items()}
    own.write_json("result.json", {
        "verdicts": rows, "statistic_by_seed": per_seed, "notes": list(measured.notes),
    })  # fmt: skip
