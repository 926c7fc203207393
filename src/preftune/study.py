"""A study: many runs of equal shape advance together, in chunks, in a few processes.

A cell is a method with its settings on a problem; its runs differ in their seeds. What a run gives
does not depend on the runs beside it, on their order, or on how a cell is cut into chunks.
"""

import contextlib
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from preftune.errors import UserError
from preftune.numerics import keep_freed_memory
from preftune.runs import RunFolder

Row = dict[str, Any]


@runtime_checkable
class Runnable(Protocol):
    """Runs that differ in their seeds alone. A frozen dataclass: it goes to other processes."""

    @property
    def key(self) -> str:
        """A name that is the same for the same runs, and for no others."""
        ...

    @property
    def updates(self) -> int:
        """Of a run."""
        ...

    @property
    def chunk(self) -> int:
        """Seeds that advance together."""
        ...

    @property
    def cost(self) -> float:
        """Milliseconds of a run, roughly."""
        ...

    def plain(self) -> dict[str, Any]:
        """Everything that decides what its runs give."""
        ...

    def placed(self, folder: Path) -> "Runnable":
        """The same runs, with a folder for what they make on the way; that is not part of them."""
        ...

    def run(self, seeds: tuple[int, ...]) -> list[Row]:
        """Run some seeds in this process: a row a run and logged step, to the last step."""
        ...


Job = tuple[Runnable, tuple[int, ...]]
"""A cell and those of its seeds that advance together."""


@dataclass(frozen=True)
class Curves:
    """What a cell's runs gave."""

    steps: tuple[int, ...]
    figures: Mapping[str, Tensor]
    """By name, [S, E] float64: a row a seed, a column a step; NaN where a step has none."""

    def last(self, name: str) -> Tensor:
        """[S]."""
        return self.figures[name][:, -1]

    def at(self, name: str, step: int) -> Tensor:
        """[S]."""
        return self.figures[name][:, self.steps.index(step)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For studies: two threads split small products otherwise than one, so that bits differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def curves(rows: Sequence[Row], seeds: Sequence[int]) -> Curves:
    """Rows of a cell as tensors."""
    steps = tuple(sorted({r["step"] for r in rows}))
    names = sorted({k for r in rows for k in r} - {"seed", "step", "cell"})
    at = {(r["seed"], r["step"]): r for r in rows}

    def number(seed: int, step: int, name: str) -> float:
        value = at.get((seed, step), {}).get(name)
        return math.nan if value is None else float(value)

    figures = {
        n: torch.tensor([[number(s, t, n) for t in steps] for s in seeds], dtype=torch.float64)
        for n in names
    }
    return Curves(steps, figures)


class CellsFailed(ExceptionGroup[Exception]):
    """Faults in the runs of some cells; those of all others have been made and kept."""


@dataclass
class Study:
    """Runs cells, each once, into one run folder; what that already holds is not run again."""

    folder: Path | None
    workers: int = 2
    """Processes; 0: this one."""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """By cell."""
    failed: dict[str, Exception] = field(default_factory=dict)
    """By cell: what a run of it raised, the first of them."""

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for row in RunFolder(self.folder).read("metrics.jsonl"):
                self.rows.setdefault(row["cell"], []).append(row)

    def missing(self, cell: Runnable, seeds: Sequence[int]) -> list[int]:
        """Seeds whose runs are not there to the last step."""
        done = {r["seed"] for r in self.rows.get(cell.key, []) if r["step"] == cell.updates}
        return [s for s in seeds if s not in done]

    def run(
        self,
        cells: Sequence[tuple[Runnable, Sequence[int]]],
        tick: Callable[[int, int], None] = lambda done, total: None,
        beside: Callable[[Executor | None], None] = lambda pool: None,
    ) -> None:
        """Run what is missing of the cells, the dearest chunks first.

        Args:
            tick: told how many run-updates are done, of how many.
            beside: given the pool first, to send other work to it (None: no pool).

        Raises:
            UserError: what a user must mend before any run can go on, at once; or another process
                runs a study in the folder.
            CellsFailed: other faults of runs; after all that can be run.
        """
        jobs: dict[tuple[str, int], Job] = {}
        for cell, seeds in cells:
            left, size = self.missing(cell, seeds), cell.chunk
            for start in range(0, len(left), size):
                part = tuple(left[start : start + size])
                jobs[cell.key, part[0]] = (cell, part)
        ordered = sorted(jobs.values(), key=lambda j: -j[0].cost * len(j[1]))
        total, done = sum(c.updates * len(s) for c, s in ordered), 0
        with self._held(), pool_of(self.workers) if self.workers else nullcontext() as pool:
            beside(pool)
            for (cell, seeds), result in _results(ordered, pool):
                self._keep(cell, seeds, result)
                done += cell.updates * len(seeds)
                tick(done, total)
        if self.failed:
            raise CellsFailed("runs of a study failed", list(self.failed.values()))

    def _held(self) -> contextlib.AbstractContextManager[None]:
        """The folder for this study alone: two would both run what is missing."""
        if self.folder is None or RunFolder.is_held(self.folder):  # by who called
            return nullcontext()
        return RunFolder.held(self.folder)

    def _keep(
        self, cell: Runnable, seeds: tuple[int, ...], result: Callable[[], list[Row]]
    ) -> None:
        """What runs gave, or that they failed, where a folder keeps it."""
        try:
            rows = [{"cell": cell.key, **r} for r in result()]
        except (UserError, BrokenProcessPool):
            raise
        except Exception as error:
            self.failed.setdefault(cell.key, error)
            if self.folder is not None:
                said = "".join(traceback.format_exception(error))
                failure = {"cell": cell.key, "seeds": list(seeds), "traceback": said}
                RunFolder(self.folder).append("failed.jsonl", [failure])
            return
        self.rows.setdefault(cell.key, []).extend(rows)
        if self.folder is not None:
            RunFolder(self.folder).append("metrics.jsonl", rows)

    def curves(self, cell: Runnable, seeds: Sequence[int]) -> Curves:
        """What the runs of a cell gave; it must have been run."""
        return curves(self.rows[cell.key], seeds)


def _results(
    jobs: Sequence[Job], pool: Executor | None
) -> Iterator[tuple[Job, Callable[[], list[Row]]]]:
    """What gives, or raises, the rows of each job: as it is done in the pool, or does it here."""
    if pool is None:
        yield from ((job, partial(job[0].run, job[1])) for job in jobs)
        return
    waiting = {pool.submit(cell.run, seeds): (cell, seeds) for cell, seeds in jobs}
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(future), future.result


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one core each; what has not begun when an error leaves them is not begun.

    Raises:
        UserError: the system has ended one of them.
    """
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), _one_core) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was ended from outside, mostly for want of memory. Free some, or "
            "give fewer --workers, and go on (reproduce: with --resume): what was done is kept."
        ) from error


def _one_core() -> None:
    """A process of a pool: one thread, and no life of its own after its parent's."""
    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
