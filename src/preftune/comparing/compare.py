"""A comparison from beginning to end: hold out, time, divide, choose rates, train, judge."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preftune import config as configs
from preftune.comparing import locks, plan, prompts, results, running
from preftune.comparing.fleet import Fleet
from preftune.comparing.job import RESULTS, result_of
from preftune.comparing.page import write_page
from preftune.comparing.request import Request
from preftune.comparing.stages import Stage, Stages
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
    _open(request, folder, resume)
    config = configs.load({**request.settings})
    held = prompts.split(config, folder)
    if resume:
        _forget_faults(folder)
    with Fleet(folder, workers, threads) as fleet:
        stages = Stages(request, folder, fleet, held, max(1, workers), threads, stage)
        costs = stages.time()
        left = None if request.budget is None else request.budget - (time.time() - began)
        first = stages.plan(costs, left)
        if not resume:
            say(stages.in_words(first, costs))
        chosen = stages.choose(first, costs)
        left = None if request.budget is None else request.budget - (time.time() - began)
        last = stages.settle(first, costs, None if resume else left)
        stages.train(last, costs, chosen)
        done = stages.failures, stages.timing
    found = results.summarise(
        folder, request.plain(), plan.plain(last), chosen, done[0], vars(held)
    )
    found["seconds"] = {
        "whole": time.time() - began, "budget": request.budget, **stages.spent,
    }  # fmt: skip
    RunFolder(folder).write_json("compare.json", found)
    write_page(folder / "report.html", found)
    return found


def _open(request: Request, folder: Path, resume: bool) -> None:
    """A free folder, or one that holds this comparison."""
    if not (resume and (folder / "config.yaml").is_file()):
        RunFolder.check_free(folder)
        RunFolder.create(folder, request.plain())


def _forget_faults(folder: Path) -> None:
    """Runs that failed for what may have passed (memory, a server) are run again."""
    for path in sorted((folder / RESULTS).glob("*.json")):
        found = result_of(folder, path.stem) or {}
        if found.get("why") in (running.FAULT, running.REFUSED):
            locks.forget(folder, path.stem)
            path.unlink()
