"""Runs every candidate on every problem, as far as each problem's budget goes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preftune import counting, loop
from preftune.advising import costs, files, scene
from preftune.advising.candidates import Setting
from preftune.advising.scene import Scene
from preftune.advising.signs import model_price
from preftune.advising.stated import Stated
from preftune.advising.text_scene import TextScene
from preftune.advising.texts import TextProblem
from preftune.cells import Cell
from preftune.method import Method
from preftune.numerics import stream_key
from preftune.rounds import group_terms
from preftune.stopping import Plateau
from preftune.study import Row, one_thread

POINTS, TEXT_POINTS = 24, 6
"""Figures of a run are taken at so many places; where they are by sampling, at fewer."""
TEXT_NORM = 1.0
"""Of a language model's gradients, at most."""
PROBED = 4
"""Updates by which what an update takes is told."""


Points = Sequence[Mapping[str, float]]
"""A run's figures in order of what was spent."""


Place = Scene | TextScene


@dataclass(frozen=True)
class Arm:
    """A candidate with a setting, on one problem."""

    problem: int
    """Its place in the order of files."""
    setting: Setting


@dataclass(frozen=True)
class Job:
    """Runs of one setting that advance together."""

    setting: Setting
    cell: Cell
    runs: tuple[int, ...]
    whose: tuple[tuple[int, int], ...]
    """The problem and the seed of each run."""


def jobs(
    folder: str, each: Sequence[Stated], arms: Iterable[Arm], seeds: Sequence[int], base: int = 0,
    models: str = "",
) -> list[Job]:  # fmt: skip
    """What must be run: arms of one setting, on problems of one shape and budget, together.

    Args:
        base: moves every seed.
        models: folder of the reward models of language models' problems.
    """
    place = Scene(folder=folder, digest=scene.digest(folder))
    paths = files.paths(Path(folder))
    together: dict[tuple[object, ...], list[Arm]] = {}
    for arm in arms:
        p = each[arm.problem]
        together.setdefault((arm.setting, p.kind, p.shape, p.budget), []).append(arm)
    found: list[Job] = []
    for group in together.values():
        setting, those = group[0].setting, [each[a.problem] for a in group]
        first = those[0]
        here: Place = place
        if isinstance(first, TextProblem):
            here = TextScene(str(paths[group[0].problem]), first.digest, models)
        whose = tuple((a.problem, s) for a in group for s in seeds)
        runs = tuple(_number(each, i, s, base) for i, s in whose)
        found.append(Job(setting, cell(here, setting, those, runs[0]), runs, whose))
    return found


def _number(each: Sequence[Stated], problem: int, seed: int, base: int) -> int:
    """Of a run: by the place of an enumerable problem among such problems; by the name of another,
    whose scene is its own."""
    p = each[problem]
    by_name = stream_key("text problem", p.name) % scene.PROBLEMS
    return scene.run_number(by_name if p.kind == "text" else problem, seed, base)


def cell(place: Place, setting: Setting, those: Sequence[Stated], a_run: int) -> Cell:
    """The runs of one setting on these problems, as long as the longest that one can afford."""
    method = setting.method(those[0].beta)
    least = min(_price(place, setting, p, a_run) for p in those)
    short = _short(method, len(those[0].pairs), setting.batch_size)
    updates = max(2, math.ceil(those[0].budget / least * short))
    text = isinstance(place, TextScene)
    return Cell(
        problem=place, method=method, updates=updates, batch_size=setting.batch_size,
        learning_rate=setting.learning_rate, max_grad_norm=TEXT_NORM if text else math.inf,
        eval_every=math.ceil(updates / TEXT_POINTS) if text else max(1, updates // POINTS),
    )  # fmt: skip


def _short(method: Method, rows: int, batch_size: int) -> float:
    """How many more updates an epoch takes because its last minibatch is short, where nothing is
    drawn anew."""
    if any(t.source.on_policy for t in method.terms):
        return 1.0
    each = group_terms(method)[0]
    of_each = min(rows, each.prompts_per_update(batch_size, each.source.num_responses))
    return math.ceil(rows / of_each) * of_each / rows


def _price(place: Place, setting: Setting, problem: Stated, a_run: int) -> float:
    """Of an update."""
    # what an update takes is the same for all problems of language models with as many pairs
    alike = place if isinstance(place, Scene) else len(problem.pairs)
    key = alike, setting.row, setting.batch_size, setting.flat, isinstance(place, Scene) and a_run
    if key not in _known:
        _known[key] = _taken(place, setting, a_run)
    trained, drawn, judged = _known[key]
    return trained + problem.prices.sample * drawn + problem.prices.label * judged


_known: dict[tuple[object, ...], tuple[float, float, float]] = {}


def _taken(place: Place, setting: Setting, a_run: int) -> tuple[float, float, float]:
    """Responses trained, drawn and judged by an update after the first, by a few that leave the
    policy as it is."""
    problem = place.problem(a_run)
    method = setting.method(problem.beta)
    settings = loop.Settings(max_steps=2 * PROBED, learning_rate=0.0, warmup_ratio=0.0)
    seen = []
    with one_thread():
        world = place.world(method, (a_run,), setting.batch_size, None)
        run = loop.start(method, world, settings)
        for step in range(2 * PROBED):
            loop.update(run, settings, measure=False)
            if (step + 1) % PROBED == 0:
                seen.append(counting.counts(run))
    kept = len(problem.pairs) > PROBED * setting.batch_size  # drawn once: later it is free
    trained, drawn, judged = ((seen[1][n] - seen[0][n]) / PROBED for n in counting.COUNTS)
    if kept and not any(t.source.on_policy for t in method.terms):
        return trained, 0.0, 0.0
    return trained, drawn, judged


def curve(problem: Stated, rows: Sequence[Row]) -> list[dict[str, float]]:
    """A run's figures in order, each with what has been spent by then: before the first update, a
    reward model of its pairs where it asks one."""
    ordered = sorted(rows, key=lambda r: r["step"])
    asks = ordered[-1]["judged"] > 0
    before = model_price(problem.labels.source, len(problem.pairs)) if asks else 0.0
    return [
        {k: float(v) for k, v in row.items() if isinstance(v, (int, float))}
        | {"spent": max(before, costs.spent(problem, *(row[n] for n in counting.COUNTS)))}
        for row in ordered
    ]


def stopped(
    points: Points, beta: float, patience: int, rng: np.random.Generator
) -> list[Mapping[str, float]]:
    """A curve up to where `stopping.Plateau` ends the run, which sees each update's mean reward:
    the judge's, between the places of the curve, with the noise of so few samples."""
    steps = np.array([p["step"] for p in points])
    rewards = np.array([p["proxy"] + beta * p["reverse_kl"] for p in points])
    fresh = max(points[-1]["drawn"] / max(points[-1]["step"], 1.0), 1.0)
    seen, state = np.arange(1, int(steps[-1]) + 1), Plateau()
    noise = np.interp(seen, steps, [p["proxy_spread"] for p in points]) / math.sqrt(fresh)
    each = np.interp(seen, steps, rewards) + noise * rng.normal(size=len(seen))
    for step, reward in zip(seen.tolist(), each.tolist(), strict=True):
        state = state.after(reward)
        if state.reached(patience):
            last = {k: float(np.interp(step, steps, [p[k] for p in points])) for k in points[0]}
            return [*(p for p in points if p["step"] < step), last]
    return list(points)


def at(points: Points, name: str, budget: float) -> float:
    """A figure when so much has been spent, between the places where it was taken; at the start
    where the budget does not reach beyond it, at the end where the run ended before."""
    before = points[0]
    for point in points[1:]:
        if point["spent"] >= budget:
            share = (budget - before["spent"]) / max(point["spent"] - before["spent"], 1e-9)
            return before[name] + max(0.0, min(1.0, share)) * (point[name] - before[name])
        before = point
    return before[name]
