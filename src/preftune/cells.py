"""Cells of a study: runs of one method with one setting on one problem, advanced together by the
loop that trains everything else.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from preftune import loop, spec
from preftune.errors import GuardStop
from preftune.method import Method
from preftune.numerics import stream_key
from preftune.rounds import World
from preftune.samples import Samples, join
from preftune.study import Row, one_thread

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
        rest: dict[str, Any] = {n: getattr(self.method, n) for n in ("reference_update", "name")}
        if self.method.reference_update == "ema":
            rest["ema_decay"] = self.method.ema_decay
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
