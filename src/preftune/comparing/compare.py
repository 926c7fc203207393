"""A comparison from beginning to end: hold out, time, divide, choose rates, train, judge."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from preftune import config as configs
from preftune.comparing import locks, plan, prompts, results, running, stages
from preftune.comparing.fleet import Fleet, MayPass
from preftune.comparing.job import RESULTS, result_of
from preftune.comparing.page import write_page
from preftune.comparing.request import Request
from preftune.comparing.stages import Stage, Stages
from preftune.errors import UserError
from preftune.runs import RunFolder


def compare(
    request: Request, folder: Path, *, workers: int, threads: int, began: float,
    resume: bool = False, stage: Stage, say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Run what is missing, and write compare.json and report.html.

    Args:
        workers: processes; 0: this one.
        threads: of each.
        began: when the command did, by `time.time()`.
        resume: go on with what the folder holds.

    Returns:
        what compare.json holds.

    Raises:
        UserError: settings or data that cannot be used, a budget too small.
        KeyboardInterrupt, Saved: asked to end; `resume` goes on.
    """
    goes_on = resume and (folder / "config.yaml").is_file()
    held = _open(request, folder, goes_on)
    if goes_on:
        _forget_faults(folder)
    device = str(request.settings.get("device", "auto"))
    try:
        with Fleet(folder, workers, threads, device) as fleet:
            run = Stages(request, folder, fleet, held, max(1, workers), stage)
            last, chosen = _run(run, request, began, goes_on, say)
    except UserError as error:
        begun = goes_on or (folder / stages.PLAN).is_file()
        if not begun and not isinstance(error, MayPass):  # a mistake: the folder is free again
            _empty(folder)
        raise
    found = results.summarise(
        folder, request.plain(), plan.plain(last), chosen, run.failures, vars(held)
    )
    found["seconds"] = {
        "whole": time.time() - began, "budget": request.budget, **run.spent,
    }  # fmt: skip
    RunFolder(folder).write_json("compare.json", found)
    write_page(folder / "report.html", found)
    return found


def _run(
    run: Stages, request: Request, began: float, goes_on: bool, say: Callable[[str], None]
) -> tuple[plan.Plan, dict[str, dict[str, Any]]]:
    """One stage after another: the plan of the final runs, and how rates were chosen."""

    def left() -> float | None:
        return None if request.budget is None else request.budget - (time.time() - began)

    costs = run.time()
    first = run.plan(costs, left())
    if not goes_on:
        say(run.in_words(first, costs))
    chosen = run.choose(first, costs)
    last = run.settle(first, costs, None if goes_on else left())
    run.train(last, costs, chosen)
    return last, chosen


def _open(request: Request, folder: Path, goes_on: bool) -> prompts.Split:
    """A free folder, made once the data can be used, or one that holds this comparison."""
    if not goes_on:
        RunFolder.check_free(folder)
    config = configs.load({**request.settings})
    if goes_on and (held := prompts.there(folder)) is not None:
        return held
    cut = prompts.cut(config)
    if not goes_on:
        RunFolder.create(folder, request.plain())
    return prompts.write(cut, folder)


def _empty(folder: Path) -> None:
    """Remove what was made of a comparison that cannot be, in a folder that was free."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _forget_faults(folder: Path) -> None:
    """Runs that failed for what may have passed (memory, a server) are run again, but for those
    that something was decided by."""
    for path in sorted((folder / RESULTS).glob("*.json")):
        found = result_of(folder, path.stem) or {}
        if found.get("why") not in (running.FAULT, running.REFUSED):
            continue
        if not stages.is_settled(folder, found["kind"], found["entry"]):
            locks.forget(folder, path.stem)
            path.unlink()
