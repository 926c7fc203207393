"""The laboratory's speed against targets: one JSON line a target, last, bigger is better.

    python benchmarks/bandit.py

bandit_step      on-policy IPO on nine tokens, ten states x ten samples, all pairs: training updates
                 (loss, backward, step; no sampling, no evaluation) against a loop that calls the
                 model once for each member of each pair
bandit_tabular   64 runs together against one after another, a table of 100 arms, on-policy DPO
bandit_mlp       the same, in chunks, for the network of 109,698 weights, on-policy best-of-n
bandit_tokens    the same for the transformer, on-policy IPO
bandit_ceiling   offline DPO on tables of 100 arms: run-updates a second, as a share of what a time
                 allows in which this machine moves what AdamW must move and takes the exponentials
                 of one softmax, both measured here on arrays of the same size

All on one thread (a study's workers have one each), in this process, interleaved, medians.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from plain_bandit import PlainGPT, step
from results import Plan, Row, hardware

from preftune import loop
from preftune.cells import Cell, Problem
from preftune.method import Method
from preftune.numerics import keep_freed_memory
from preftune.problems.arms import Arms, States
from preftune.problems.tokens import Tokens
from preftune.problems.unseen import Unseen
from preftune.reproduce import rows

TAU = 0.05
UPDATES = 6


def started(
    problem: Problem, method: Method, seeds: Sequence[int], batch_size: int
) -> tuple[loop.State, loop.Settings]:
    """A run at step 0, warmed up by two updates."""
    cell = Cell(
        problem=problem, method=method, updates=10**6, batch_size=batch_size, learning_rate=1e-3
    )
    world = problem.world(method, tuple(seeds), batch_size, None)
    run = loop.start(method, world, cell.settings)
    for _ in range(2):
        loop.update(run, cell.settings, measure=False)
    return run, cell.settings


def seconds(work: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def advancing(run: loop.State, settings: loop.Settings) -> Callable[[], None]:
    """Several updates of one program."""

    def work() -> None:
        for _ in range(UPDATES):
            loop.update(run, settings, measure=False)

    return work


def together(
    problem: Problem, method: Method, batch_size: int, chunks: Sequence[int], repeats: int
) -> tuple[float, int, float]:
    """How many times faster a run advances in a chunk than alone, at the best of these sizes. A
    study advances one chunk to its end before the next, so one chunk is what is measured.

    Returns:
        the ratio, the chunk, and milliseconds of a run-update in it.
    """
    alone = advancing(*started(problem, method, [0], batch_size))
    works = {c: advancing(*started(problem, method, range(c), batch_size)) for c in chunks}
    taken: dict[int, list[float]] = {c: [] for c in chunks}
    single = []
    for _ in range(repeats):
        single.append(seconds(alone) / UPDATES)
        for c, work in works.items():
            taken[c].append(seconds(work) / UPDATES / c)
    best = min(chunks, key=lambda c: median(taken[c]))
    return median(single) / median(taken[best]), best, 1e3 * median(taken[best])


def bandit_step() -> float:
    """The program against the plain loop, on the same samples from the same weights."""
    problem, n, k = Tokens(prompts=10), 10, 10
    method = rows.ipo(rows.fresh(n, 500, k), TAU, 0.0)
    run, settings = started(problem, method, [0], n * k * (k - 1) // 2)
    policy, reference = (
        PlainGPT({name: w.detach()[0] for name, w in p.tensors()})  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        for p in (run.world.policy, run.world.reference)
    )
    current = run.groups[0].round
    assert current is not None and current.samples.reward is not None
    s = current.samples
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
    fast, slow = [], []
    for _ in range(3):
        slow.append(seconds(lambda: step(
            policy, reference, optimizer, s.prompt[0], s.tokens[0], s.reward[0], TAU
        )))  # fmt: skip
        fast.append(seconds(advancing(run, settings)) / UPDATES)
    print(f"bandit_step: {median(slow):.2f} s a plain update, {1e3 * median(fast):.1f} ms here",
          file=sys.stderr)  # fmt: skip
    return median(slow) / median(fast)


def ceiling(runs: int = 2048, states: int = 16, pairs: int = 4) -> float:
    """Share of what the machine could do for tables of 100 arms."""
    problem = Unseen(arms=100, seen=100, reward_range=1.0, pairs=pairs * states)
    problem = replace(problem, states=states)
    run, settings = started(problem, rows.given_pairs(0.1), range(runs), pairs)
    work = advancing(run, settings)
    x = torch.randn(runs, states, 100)
    y, z = torch.empty_like(x), torch.empty_like(x)
    numbers = x.numel() // runs
    bytes_moved = 24 * numbers  # AdamW reads three arrays of float32 and writes three
    times: dict[str, list[float]] = {"work": [], "copy": [], "exp": []}
    for _ in range(7):
        times["work"].append(seconds(work) / UPDATES)
        times["copy"].append(seconds(lambda: y.copy_(x)))
        times["exp"].append(seconds(lambda: torch.exp(x, out=z)))
    rate = 2 * 4 * x.numel() / median(times["copy"])
    floor = max(runs * bytes_moved / rate, median(times["exp"]))
    print(
        f"bandit_ceiling: R {runs}, S {states}, A 100, float32: {runs / median(times['work']):.3g} "
        f"run-updates/s; copy {rate / 1e9:.1f} GB/s, exp {x.numel() / median(times['exp']):.3g}/s, "
        f"which allow {runs / floor:.3g}",
        file=sys.stderr,
    )
    return floor / median(times["work"])


def products() -> None:
    """The ceiling of matrix products on one thread, for scale."""
    a, b = torch.randn(8, 64, 256), torch.randn(8, 256, 256)
    taken = min(seconds(lambda: torch.bmm(a, b)) for _ in range(50))
    print(f"matrix products: {2 * 8 * 64 * 256 * 256 / taken / 1e9:.0f} GFLOP/s on one thread, "
          "8 x (64 x 256 x 256)", file=sys.stderr)  # fmt: skip


def targets() -> dict[str, tuple[float, float]]:
    """Ratio and target, by name."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as a study's workers do
    products()
    found = {"bandit_step": (bandit_step(), 100.0)}
    n, k = 5, 10
    settings = {
        "bandit_tabular": (Arms(), rows.dpo(rows.fresh(n, 1, k), 0.1), 45 * n, [64], 9, 20.0),
        "bandit_mlp": (States(states=50), rows.best_of_n(rows.fresh(n, 5, k)), n,
                       [2, 4, 8, 16], 5, 1.3),
        "bandit_tokens": (Tokens(prompts=10), rows.ipo(rows.fresh(10, 10, k), TAU, 0.0), 450,
                          [4, 8, 16], 3, 1.3),
    }  # fmt: skip
    for name, (problem, method, batch, chunks, repeats, target) in settings.items():
        ratio, chunk, ms = together(problem, method, batch, chunks, repeats)
        print(f"{name}: best in chunks of {chunk}, {ms:.3f} ms a run-update", file=sys.stderr)
        found[name] = (ratio, target)
    found["bandit_ceiling"] = (ceiling(), 0.3)
    return found


def rows_of(plan: Plan) -> list[Row]:
    """All of them; the plan is the laboratory's own."""
    return [Row(name, *found) for name, found in targets().items()]


def main() -> None:
    """Measure, then print one line a target."""
    for row in rows_of(Plan()):
        assert math.isfinite(row.ratio)
        print(row.line(hardware()))


if __name__ == "__main__":
    main()
