"""A study: many runs of equal shape advance together, in chunks, in a few processes.

A cell is a method with its settings on a problem; its runs differ in their seeds. What a run gives
does not depend on the runs beside it, on their order, or on how a cell is cut into chunks.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from preftune import loop, spec
from preftune.errors import GuardStop, UserError
from preftune.method import Method
from preftune.numerics import keep_freed_memory, stream_key
from preftune.rounds import World
from preftune.runs import RunFolder
from preftune.samples import Samples, join

Row = dict[str, Any]
LOGGED = ("loss", "grad_norm", "kl", "log_ratio_chosen", "log_ratio_rejected", "margin")
"""Metrics of an update that a study keeps, beside the exact figures of its problem."""


@runtime_checkable
class Problem(Protocol):
    """Where a study's runs happen. A frozen dataclass of plain values: it goes to other processes,
    and its fields are its identity."""

    @property
    def chunk(self) -> int:
        """Runs that advance together, by measurement: so many stay in the processor's cache."""
        ...

    @property
    def cost(self) -> float:
        """Milliseconds of an update of one run, roughly: the dearest cells start first."""
        ...

    def world(
        self, method: Method, seeds: tuple[int, ...], batch_size: int, data: Samples | None
    ) -> World:
        """What rounds are made from; `data` in place of its own, where another cell drew them."""
        ...

    def evaluate(self, run: loop.State) -> dict[str, Tensor]:
        """Figures of the policy as it is, [R] each."""
        ...


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


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs of one method with one setting on one problem."""

    problem: Problem
    method: Method
    updates: int
    batch_size: int
    learning_rate: float
    lr_schedule: str = "constant"
    max_grad_norm: float = math.inf
    eval_every: int | None = None
    """None: at the start and at the end."""
    after: "Cell | None" = None
    """Its data are the pairs that this on-policy cell's runs drew, in a shuffled order."""

    def plain(self) -> dict[str, Any]:
        """Everything that decides what its runs give."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own |= {"problem": repr(self.problem), "method": spec.to_data(self.method)}
        rest = {"reference_update": self.method.reference_update, "name": self.method.name}
        return own | rest | {"after": self.after and self.after.plain()}

    @property
    def key(self) -> str:
        """A name that is the same for the same cell, and for no other."""
        return f"{self.method.name}-{stream_key(self.plain()):016x}"

    @property
    def chunk(self) -> int:
        """See `Runnable.chunk`."""
        return self.problem.chunk

    @property
    def cost(self) -> float:
        """See `Runnable.cost`."""
        before = 0.0 if self.after is None else self.after.cost
        return before + self.problem.cost * self.updates

    def placed(self, folder: Path) -> "Cell":
        """See `Runnable.placed`."""
        return self

    def run(self, seeds: tuple[int, ...]) -> list[Row]:
        """See `Runnable.run`."""
        return advance(self, seeds)

    @property
    def settings(self) -> loop.Settings:
        """Of the loop."""
        return loop.Settings(
            max_steps=self.updates, learning_rate=self.learning_rate, warmup_ratio=0.0,
            lr_schedule=self.lr_schedule,  # pyright: ignore[reportArgumentType]
            max_grad_norm=self.max_grad_norm, log_every=self.eval_every or self.updates,
            eval_every=self.eval_every or self.updates,
        )  # fmt: skip


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


def advance(cell: Cell, seeds: tuple[int, ...]) -> list[Row]:
    """Run some of a cell's seeds in this process: a row a run and logged step."""
    with one_thread():
        drawn = None if cell.after is None else _shuffled(_advance(cell.after, seeds, None)[1])
        return _advance(cell, seeds, drawn, record=False)[0]


def _advance(
    cell: Cell, seeds: tuple[int, ...], data: Samples | None, record: bool = True
) -> tuple[list[Row], list[Samples]]:
    """Rows, and (where recorded) the pairs of each round, the chosen first."""
    world = cell.problem.world(cell.method, seeds, cell.batch_size, data)
    run = loop.start(cell.method, world, cell.settings)
    rows: list[Row] = []
    drawn: list[Samples] = []

    def log(step: int, metrics: loop.Metrics) -> None:
        kept = {k: v for k, v in metrics.items() if isinstance(v, list)}
        for i, seed in enumerate(seeds):
            own = {k: v[i] for k, v in kept.items() if not math.isnan(v[i])}
            rows.append({"seed": seed, "step": step, **own})

    def evaluate(step: int, last: bool) -> loop.Metrics:
        return {k: v.double().tolist() for k, v in cell.problem.evaluate(run).items()}

    def after_update() -> bool:
        current = run.groups[0].round
        if record and current is not None and current.taken == 1:
            pairs = current.batches[0].index[..., 0, :]
            drawn.append(replace(current.samples.at(pairs), reward=None, logp=None, ref_logp=None))
        return False

    hooks = loop.Hooks(
        log=lambda step, m: log(step, {k: v for k, v in m.items() if k in LOGGED or k in names}),
        evaluate=evaluate, stop=after_update,
    )  # fmt: skip
    names = set(evaluate(0, False))
    with contextlib.suppress(GuardStop):  # every run has stopped: what was logged stands
        loop.advance(run, cell.settings, hooks)
    return rows, drawn


def _shuffled(rounds: Sequence[Samples]) -> Samples:
    """All rounds' pairs; the loop draws their order anew each epoch."""
    return join(list(rounds))


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


@dataclass
class Study:
    """Runs cells, each once, into one run folder; what that already holds is not run again."""

    folder: Path | None
    workers: int = 2
    """Processes; 0: this one."""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """By cell."""

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for row in RunFolder(self.folder).read("metrics.jsonl"):
                self.rows.setdefault(row["cell"], []).append(row)

    def _missing(self, cell: Runnable, seeds: Sequence[int]) -> list[int]:
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
        """
        jobs: dict[tuple[str, int], tuple[Runnable, tuple[int, ...]]] = {}
        for cell, seeds in cells:
            left, size = self._missing(cell, seeds), cell.chunk
            for start in range(0, len(left), size):
                part = tuple(left[start : start + size])
                jobs[cell.key, part[0]] = (cell, part)
        ordered = sorted(jobs.values(), key=lambda j: -j[0].cost * len(j[1]))
        total, done = sum(c.updates * len(s) for c, s in ordered), 0
        if self.workers == 0:
            beside(None)
            for cell, seeds in ordered:
                self._keep(cell, cell.run(seeds))
                done += cell.updates * len(seeds)
                tick(done, total)
            return
        with pool_of(self.workers) as pool:
            try:
                beside(pool)
                waiting: dict[Future[list[Row]], tuple[Runnable, tuple[int, ...]]] = {
                    pool.submit(job[0].run, job[1]): job for job in ordered
                }
                while waiting:
                    ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in ready:
                        cell, seeds = waiting.pop(future)
                        self._keep(cell, future.result())
                        done += cell.updates * len(seeds)
                    tick(done, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _keep(self, cell: Runnable, rows: list[Row]) -> None:
        rows = [{"cell": cell.key, **r} for r in rows]
        self.rows.setdefault(cell.key, []).extend(rows)
        if self.folder is not None:
            RunFolder(self.folder).append("metrics.jsonl", rows)

    def curves(self, cell: Runnable, seeds: Sequence[int]) -> Curves:
        """What the runs of a cell gave; it must have been run."""
        return curves(self.rows[cell.key], seeds)


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one core each.

    Raises:
        UserError: the system has ended one of them.
    """
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), _one_core) as pool:
            yield pool
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
