"""How a budget is divided: rates x seeds x updates, from what a short timing found. Arithmetic.

All runs of a comparison have the same training time (or updates, or responses), so a method whose
updates are slower makes fewer. What does not fit is cut in a fixed order, and said: first the grid
of rates, then seeds (never below two), then updates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preftune.comparing.costs import Cost, in_words, makespan
from preftune.errors import UserError

GRID = 3
"""Learning rates a method, unless they are given."""
CURVE_PROMPTS = 8
"""Of an evaluation on the way of a run."""
LEAST_SEEDS = 2
LEAST_UPDATES = 8
"""Of a run, below which the grid and seeds are cut first."""
FEWEST_UPDATES = 2
"""Without which there is nothing to compare."""
SAFE = 0.9
"""Share of the time left that is given away: runs take longer than the timing said, not shorter."""
CLOSING = 8.0
"""Seconds for figures and page."""
ANSWERS_SHARE = 1 / 3
"""Of a run's time, at most, for its last evaluation, as long as enough prompts are left."""
ENOUGH_PROMPTS = 8
LEAST_CURVE = 4
"""Prompts of an evaluation on the way, fewer than which show nothing: there is none then."""
SIZES = (16, 8, 4, 2)
"""Reference samples a prompt for best-of-n: the most whose time is a small share of the whole."""
SIZES_SHARE = 0.08


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user wants."""

    budget: float | None = None
    """Seconds that are left of it."""
    spent: float = 0.0
    """Seconds of it that are gone."""
    per_run: float | None = None
    """Seconds of a run."""
    steps: int | None = None
    samples: int | None = None
    """Responses that a run trains on."""
    seeds: int = 3
    grids: Mapping[str, int] = field(default_factory=dict)
    """Rates of each method at most; 1 where its rate is given."""
    workers: int = 1
    selection: int
    final: int
    """Held-out prompts that there are."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    grids: dict[str, int]
    seeds: int
    updates: dict[str, int]
    final: int
    """Held-out prompts of the last evaluation."""
    selection: int
    curve: int
    samples: int
    """Reference samples a prompt."""
    seconds: float
    """That all of it is expected to take from now on."""
    cuts: tuple[str, ...] = ()
    """What was cut and why, in sentences."""


def expected(plan: Plan, costs: Mapping[str, Cost], workers: int, *, chosen: bool = False) -> float:
    """Seconds of all that is planned; `chosen`: of what follows the choice of rates."""
    reference = max(c.ready + plan.final * plan.samples * c.answer for c in costs.values())
    chooses = [
        costs[m].run(plan.updates[m], plan.selection)
        for m in costs for _ in range(plan.grids[m] if plan.grids[m] > 1 else 0)
    ]  # fmt: skip
    finals = [
        costs[m].run(plan.updates[m], plan.final, plan.curve)
        for m in costs for _ in range(plan.seeds)
    ]  # fmt: skip
    if chosen:
        return makespan(finals, workers)
    return makespan([reference, *chooses], workers) + makespan(finals, workers)


def divide(asked: Asked, costs: Mapping[str, Cost]) -> Plan:
    """The plan for what was asked.

    Args:
        asked: `budget` is what is left of it after the timing.

    Raises:
        UserError: not even two updates fit; the time that they would take is said.
    """
    plan = Plan(
        grids={m: asked.grids.get(m, GRID) for m in costs}, seeds=asked.seeds,
        updates=dict.fromkeys(costs, FEWEST_UPDATES), final=asked.final, selection=asked.selection,
        curve=min(CURVE_PROMPTS, asked.final), samples=SIZES[0], seconds=0.0,
    )  # fmt: skip
    wanted = plan
    if asked.per_run is not None:  # evaluations must leave room for training
        plan = _sized(plan, asked, costs, (1 - ANSWERS_SHARE) * asked.per_run)
    if asked.budget is None:
        plan = replace(plan, updates=_updates(asked, costs, plan))
    else:
        plan = _within(plan, asked, costs, asked.budget * SAFE - CLOSING)
    return replace(
        plan,
        seconds=expected(plan, costs, asked.workers) + CLOSING,
        cuts=tuple(_cut_words(wanted, plan, own_length=asked.budget is None)),
    )


def _updates(asked: Asked, costs: Mapping[str, Cost], plan: Plan) -> dict[str, int]:
    """Of each method, where a run's own size is given."""
    if asked.steps is not None:
        return dict.fromkeys(costs, asked.steps)
    if asked.samples is not None:
        return {m: max(1, round(asked.samples / c.trained)) for m, c in costs.items()}
    assert asked.per_run is not None, "one of the budgets is given"
    found = {}
    for name, cost in costs.items():
        left = asked.per_run - cost.run(0, plan.final, plan.curve)
        found[name] = int(left / cost.update)
        if found[name] < FEWEST_UPDATES:
            needed = cost.run(FEWEST_UPDATES, plan.final, plan.curve)
            raise UserError(
                f"--budget-per-run: {asked.per_run:.0f} s are too few for '{name}', whose start "
                f"and evaluation take most of them. Give {math.ceil(1.2 * needed)}s or more."
            )
    return found


def _within(plan: Plan, asked: Asked, costs: Mapping[str, Cost], seconds: float) -> Plan:
    """The first plan, in the order of cuts, whose runs have enough updates."""
    found: Plan | None = None
    for shape in _shapes(plan):
        fits = _longest(shape, asked, costs, seconds)
        if fits is None:
            continue
        found = fits
        if min(fits.updates.values()) >= LEAST_UPDATES:
            break
    if found is None:
        least = list(_shapes(plan))[-1]
        raise UserError(
            f"--budget: too short for {len(costs)} methods and {least.seeds} seeds: "
            f"{FEWEST_UPDATES} updates of each take about "
            f"{in_words(asked.spent + _least_time(least, asked, costs))}. Give at least that, "
            "fewer methods or fewer --max-new-tokens."
        )
    return found


def _least_time(plan: Plan, asked: Asked, costs: Mapping[str, Cost]) -> float:
    """Seconds that would do for this shape: what is measured grows a little with them."""
    needed = asked.budget or 0.0
    while True:
        sized = _sized(plan, replace(asked, budget=needed), costs, _shortest(costs))
        total = (expected(sized, costs, asked.workers) + CLOSING) / SAFE
        if total <= needed:
            return needed
        needed = total + 1e-6


def _shortest(costs: Mapping[str, Cost]) -> float:
    """Seconds of training in which each makes the fewest updates."""
    return FEWEST_UPDATES * max(c.update for c in costs.values())


def _shapes(plan: Plan) -> Sequence[Plan]:
    """The plan, then less and less of it: rates first, then seeds."""
    widest = max(plan.grids.values())
    fewer = [
        replace(plan, grids={m: min(n, size) for m, n in plan.grids.items()})
        for size in range(widest, 0, -1)
    ]
    return [*fewer, *(replace(fewer[-1], seeds=s)
                      for s in range(plan.seeds - 1, LEAST_SEEDS - 1, -1))]  # fmt: skip


def _longest(plan: Plan, asked: Asked, costs: Mapping[str, Cost], seconds: float) -> Plan | None:
    """The longest runs of this shape that fit; None where not even the fewest updates do."""

    def fits(training: float) -> bool:
        sized = _sized(plan, asked, costs, training)
        return expected(sized, costs, asked.workers) <= seconds

    low, high = _shortest(costs), max(1.0, seconds)
    if not fits(low):
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _sized(plan, asked, costs, low)


def _sized(plan: Plan, asked: Asked, costs: Mapping[str, Cost], training: float) -> Plan:
    """The plan with so many seconds of training a run."""
    slowest = max(c.answer for c in costs.values())
    updates = {
        m: max(FEWEST_UPDATES, int(training / c.update + 1e-9)) for m, c in costs.items()
    }  # fmt: skip
    room = int(ANSWERS_SHARE * training / max(slowest, 1e-9))
    final = min(asked.final, max(ENOUGH_PROMPTS, room))
    allowed = SIZES_SHARE * (asked.budget or math.inf) * asked.workers
    samples = next((m for m in SIZES if m * final * slowest <= allowed), SIZES[-1])
    few = min(CURVE_PROMPTS, final // 4)
    return replace(
        plan, updates=updates, final=final, samples=samples,
        selection=min(asked.selection, max(ENOUGH_PROMPTS, room)),
        curve=few if few >= LEAST_CURVE else 0,
    )  # fmt: skip


def _cut_words(wanted: Plan, found: Plan, *, own_length: bool) -> list[str]:
    """What was cut, in the order of cuts; `own_length`: how long runs are was given."""
    out = []
    before, after = max(wanted.grids.values()), max(found.grids.values())
    if before > after > 1:
        out.append(f"The grid has {after} learning rates a method in place of {before}.")
    elif before > after:
        out.append(
            "No learning rate was chosen: each method has the one that is the default for runs of "
            "this length. Another rate may change the order of methods."
        )
    if found.seeds < wanted.seeds:
        out.append(f"{found.seeds} training seeds in place of {wanted.seeds}.")
    least = min(found.updates.values())
    if least < LEAST_UPDATES and not own_length:
        out.append(
            f"Runs are very short: only {least} updates of the slowest method. Read this as a "
            "trial of the settings, not as an answer."
        )
    if found.final < wanted.final:
        out.append(f"Methods are judged on {found.final} of {wanted.final} held-out prompts.")
    if wanted.curve and not found.curve:
        out.append("Nothing was measured on the way of a run, only at its end.")
    if found.samples < wanted.samples:
        out.append(
            f"Best-of-n is of {found.samples} samples of the untrained model in place of "
            f"{wanted.samples}."
        )
    return out


def again(plan: Plan, asked: Asked, costs: Mapping[str, Cost], left: float) -> Plan:
    """The plan of the final runs, once rates are chosen and `left` seconds remain of the budget:
    what was slower than the timing said is made good by shorter runs, as long as they have enough
    updates, then by fewer seeds, too."""
    if _fits_again(plan, asked, costs, left):
        return plan
    enough = min(LEAST_UPDATES, *plan.updates.values())
    shorter = [
        _shortened(plan, seeds, share / 20)
        for seeds in range(plan.seeds, LEAST_SEEDS - 1, -1)
        for share in range(20, 0, -1)
    ]
    fitting = [found for found in shorter if _fits_again(found, asked, costs, left)]
    long_enough = [found for found in fitting if min(found.updates.values()) >= enough]
    return next(iter([*long_enough, *fitting, shorter[-1]]))


def _fits_again(plan: Plan, asked: Asked, costs: Mapping[str, Cost], left: float) -> bool:
    return expected(plan, costs, asked.workers, chosen=True) <= left - CLOSING


def _shortened(plan: Plan, seeds: int, share: float) -> Plan:
    """The plan with so many seeds and this share of the updates, and that in words."""
    updates = {m: max(FEWEST_UPDATES, int(n * share)) for m, n in plan.updates.items()}
    parts = []
    if seeds < plan.seeds:
        parts.append(f"there are {seeds} training seeds in place of {plan.seeds}")
    if share < 1:
        parts.append(f"final runs have {share:.0%} of the updates that rates were chosen with")
    words = f"The machine was slower than in the timing: {' and '.join(parts)}."
    return replace(plan, seeds=seeds, updates=updates, cuts=(*plan.cuts, words))


def plain(plan: Plan) -> dict[str, Any]:
    """As JSON holds it."""
    return {**vars(plan), "cuts": list(plan.cuts)}


def from_plain(found: Mapping[str, Any]) -> Plan:
    """What `plain` gave."""
    return Plan(**{**found, "cuts": tuple(found["cuts"])})
