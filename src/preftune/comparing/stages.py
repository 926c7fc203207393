"""The stages of a comparison: timing, rates, judged runs, and what is decided between them.

Each stage is a set of jobs in the folder and a decision that follows from their results alone, so
that whoever goes on with the folder, later or on another machine, decides the same.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.comparing import costs as costs_of
from preftune.comparing import locks, plan, prompts, results, running
from preftune.comparing.costs import Cost
from preftune.comparing.entries import Entry
from preftune.comparing.fleet import Fleet, MayPass
from preftune.comparing.job import OF_MACHINE, Job, Kind, result_path
from preftune.comparing.plan import Asked, Plan
from preftune.comparing.request import Request
from preftune.comparing.results import Failure
from preftune.errors import UserError
from preftune.runs import dumps

Stage = Callable[[str], Callable[[int, int, str], None]]
"""The name of a stage to its progress."""
CHOICE_SEED = 1000
"""Added to the first seed: rates are chosen by a run that is not among those that are judged."""
PLAN, CHOSEN, FINAL = "plan.json", "chosen", "final.json"
"""What is decided once: the budget's division, each competitor's rate, the final runs."""
ORDER = {"timing": 0, "reference": 1, "selection": 2, "final": 3}
TIMING_PROMPTS = 8


def once(path: Path, value: Any) -> Any:
    """What the file holds: this, unless another process was first."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(dumps(value) + "\n")
    try:
        os.link(name, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the last of two who decide at once wins
        if not path.exists():
            os.replace(name, path)
    Path(name).unlink(missing_ok=True)
    return json.loads(path.read_text("utf-8"))


def is_settled(folder: Path, kind: Kind, entry: str) -> bool:
    """Whether what such a run of a competitor decides is decided."""
    decided = {"timing": folder / PLAN, "selection": folder / CHOSEN / f"{entry}.json"}
    return kind in decided and decided[kind].is_file()


class Stages:
    """What is run one after another; each stage's jobs beside one another."""

    def __init__(
        self, request: Request, folder: Path, fleet: Fleet, held: prompts.Split,
        workers: int, stage: Stage,
    ) -> None:  # fmt: skip
        self.request, self.folder, self.fleet, self.held = request, folder, fleet, held
        self.workers, self.stage = workers, stage
        self.failures: dict[str, Failure] = {}
        """Competitors that cannot be run."""
        self.timing: dict[str, dict[str, Any]] = {}
        self.spent: dict[str, float] = {}

    @property
    def entries(self) -> list[Entry]:
        """Those that can be run."""
        return [e for e in self.request.entries if e.name not in self.failures]

    def _finish(self, name: str, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        began = time.time()
        found = self.fleet.finish(jobs, self.stage(name))
        self.spent[name] = time.time() - began
        return found

    def _job(
        self, kind: Kind, entry: Entry, key: str, *, seed: int, updates: int, rate: float | None,
        order: int, **more: Any,
    ) -> Job:  # fmt: skip
        """A run of a competitor."""
        own = ("data", "eval_data", "eval_fraction", "prompts", "output", "resume", "epochs")
        left_out = (*own, *OF_MACHINE)
        common = {k: v for k, v in self.request.settings.items() if k not in left_out}
        facts = self.timing.get(entry.name, {}).get("facts", {})
        told = {"label_source": facts.get("label_source")} if facts.get("label_source") else {}
        values = {**common, **told, **entry.settings, "seed": seed, "max_steps": updates}
        if rate is not None:
            values["learning_rate"] = rate
        if kind == "selection":
            values.pop("gold", None)  # nothing is chosen by it
        return Job(
            key=key, kind=kind, entry=entry.name, order=1000 * ORDER[kind] + order,
            settings=values, overrides=entry.overrides, **more,
        )  # fmt: skip

    @property
    def _seed(self) -> int:
        return int(self.request.settings.get("seed", 0))

    def time(self) -> dict[str, Cost]:
        """A few updates and answers of each competitor."""
        # to answer a prompt takes each of them as long: they are of one model
        few = min(TIMING_PROMPTS, self.held.selection)
        jobs = [
            self._job("timing", entry, f"timing-{entry.name}", seed=self._seed + CHOICE_SEED,
                      updates=running.TIMED, rate=None, order=i, prompts=0 if i else few)
            for i, entry in enumerate(self.request.entries)
        ]  # fmt: skip
        found = self._finish("timing", jobs)
        self.timing = {r["entry"]: r for r in found.values() if "failed" not in r}
        refused = [r for r in found.values() if r.get("why") == running.REFUSED]
        if refused:
            for result in refused:  # a mistake that is mended must not be remembered
                locks.forget(self.folder, result["key"])
                result_path(self.folder, result["key"]).unlink(missing_ok=True)
            raise UserError(f"{refused[0]['entry']}: {refused[0]['failed']}")
        self.failures = {
            r["entry"]: Failure(r["failed"], r["why"]) for r in found.values() if "failed" in r
        }
        if len(self.timing) < 2:
            raise self._too_few()
        # a process's first run loads libraries, too, which the ones that follow do not
        ready = min(t["seconds"]["ready"] for t in self.timing.values())
        answer = max(_answer(t) for t in found.values())
        costs = {e.name: cost_of(self.timing[e.name]) for e in self.entries}
        answer = answer or max(c.update for c in costs.values())  # the one that was to tell failed
        return {name: replace(c, ready=ready, answer=answer) for name, c in costs.items()}

    def _too_few(self) -> UserError:
        words = "; ".join(f"{name}: {how.message}" for name, how in self.failures.items())
        message = f"--methods: fewer than two can be run here. {words}"
        if any(how.why == running.FAULT for how in self.failures.values()):
            return MayPass(f"{message}. --output {self.folder} --resume tries them again.")
        return UserError(message)

    def plan(self, costs: Mapping[str, Cost], left: float | None) -> Plan:
        """How the budget is divided; settled once."""
        settled = self.folder / PLAN
        if not settled.is_file():
            made = once(settled, plan.plain(plan.divide(self._asked(left), costs)))
        else:
            made = json.loads(settled.read_text("utf-8"))
        for name in (e.name for e in self.entries if e.name not in made["updates"]):
            self.failures[name] = Failure("it failed when the budget was divided", running.FAULT)
        return plan.from_plain(made)

    def _asked(self, left: float | None) -> Asked:
        r = self.request
        known = min(t["facts"]["held_out"] for t in self.timing.values())
        spent = 0.0 if left is None else (r.budget or 0.0) - left
        return Asked(
            budget=left, spent=spent, per_run=r.per_run, steps=r.steps, samples=r.samples,
            seeds=r.seeds,
            grids={e.name: len(given) if (given := self._given(e)) else plan.GRID
                   for e in self.entries},
            workers=self.workers, selection=min(known, self.held.selection), final=self.held.final,
        )  # fmt: skip

    def _given(self, entry: Entry) -> list[float]:
        """Rates that the user settled."""
        own = entry.settings.get("learning_rate", self.request.settings.get("learning_rate"))
        return [float(own)] if own is not None else [float(r) for r in self.request.rates]

    def rates(self, made: Plan, costs: Mapping[str, Cost], entry: Entry) -> list[float]:
        """The grid of a competitor."""
        count, given = made.grids[entry.name], self._given(entry)
        if not given:
            return costs_of.rates(costs[entry.name], made.updates[entry.name], count)
        return [given[i] for i in costs_of.spread(len(given), count)]

    def in_words(self, made: Plan, costs: Mapping[str, Cost]) -> str:
        """What is going to be run, in a sentence or two."""
        grid = max(made.grids.values())
        updates = ", ".join(f"{name} {n}" for name, n in made.updates.items())
        words = f"{len(costs)} methods x ({grid} learning rates + {made.seeds} seeds)"
        if grid == 1:
            words = f"{len(costs)} methods x {made.seeds} seeds"
        took = made.seconds / 60
        return " ".join(
            [f"{words}; updates a run: {updates}; about {took:.0f} min more.", *made.cuts]
        )

    def reference(self, made: Plan) -> Job:
        """The untrained model's answers."""
        entry = self.entries[0]
        job = self._job("reference", entry, "reference", seed=self._seed, updates=1, rate=None,
                        order=0, prompts=made.final, samples=made.samples)  # fmt: skip
        return replace(job, entry="reference")

    def choose(self, made: Plan, costs: Mapping[str, Cost]) -> dict[str, dict[str, Any]]:
        """The rate of each competitor, and how its grid did; the untrained model's answers."""
        jobs, grids = [self.reference(made)], {}
        for place, entry in enumerate(self._dearest(made, costs)):
            grids[entry.name] = self.rates(made, costs, entry)
            if len(grids[entry.name]) == 1 or self._chosen(entry.name).is_file():
                continue
            for rate in grids[entry.name]:
                jobs.append(self._job(
                    "selection", entry, f"rate-{entry.name}-{rate:.3g}", rate=rate, order=place,
                    seed=self._seed + CHOICE_SEED, updates=made.updates[entry.name],
                    prompts=made.selection,
                ))  # fmt: skip
        found = self._finish("learning rates", jobs)
        if "failed" in found["reference"]:
            raise UserError(f"the untrained model: {found['reference']['failed']}")
        chosen = {name: self._choice(grid, found, name) for name, grid in grids.items()}
        for name, how in chosen.items():
            if how["rate"] is None:
                first = how["grid"][0]
                self.failures[name] = Failure(
                    f"at every learning rate: {first['failed']}", first["why"]
                )
        return chosen

    def _chosen(self, name: str) -> Path:
        return self.folder / CHOSEN / f"{name}.json"

    def _choice(self, grid: Sequence[float], found: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A competitor's rate; settled once there is one, since judged runs are made with it."""
        settled = self._chosen(name)
        if settled.is_file():
            return json.loads(settled.read_text("utf-8"))
        how = results.choice(grid, found, name)
        if how["rate"] is None:  # when going on, runs that failed may not
            return how
        settled.parent.mkdir(exist_ok=True)
        return once(settled, how)

    def _dearest(self, made: Plan, costs: Mapping[str, Cost]) -> list[Entry]:
        """The longest runs first, so that no process waits for a late one."""

        def cost(entry: Entry) -> float:
            return costs[entry.name].run(made.updates[entry.name], made.final, made.curve)

        return sorted(self.entries, key=cost, reverse=True)

    def settle(self, made: Plan, costs: Mapping[str, Cost], left: float | None) -> Plan:
        """The plan of the final runs; settled once."""
        settled = self.folder / FINAL
        if settled.is_file():
            return plan.from_plain(json.loads(settled.read_text("utf-8")))
        able = {e.name: costs[e.name] for e in self.entries}
        if left is not None and able:
            made = plan.again(made, self._asked(left), able, left)
        return plan.from_plain(once(settled, plan.plain(made)))

    def train(
        self, made: Plan, costs: Mapping[str, Cost], chosen: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """The runs that are judged."""
        jobs = [
            self._job(
                "final", entry, f"final-{entry.name}-s{seed}", seed=seed,
                updates=made.updates[entry.name], rate=chosen[entry.name]["rate"],
                order=100 * (seed - self._seed) + place, prompts=made.final, curve=made.curve,
                keep_model=self.request.keep_models,
            )
            for seed in range(self._seed, self._seed + made.seeds)
            for place, entry in enumerate(self._dearest(made, costs))
        ]  # fmt: skip
        self._finish("final runs", jobs)


def _answer(timing: Mapping[str, Any]) -> float:
    """Seconds of a held-out prompt; 0 where none was answered."""
    count = len(timing.get("answers", {}).get("row", ()))
    return timing["seconds"]["answers"] / count if count else 0.0


def cost_of(timing: Mapping[str, Any]) -> Cost:
    """What a timing run found."""
    curve = {row["step"]: row for row in timing["curve"]}
    last = max(curve)
    half = max(0, last - 2)
    seconds = (curve[last]["seconds"] - curve[half]["seconds"]) / (last - half)
    return Cost(
        ready=timing["seconds"]["ready"],
        update=max(1e-6, seconds + timing["seconds"]["cache"] / last),
        answer=_answer(timing),
        trained=max(1.0, (curve[last]["trained"] - curve[half]["trained"]) / (last - half)),
        parameters=float(timing["facts"]["parameters"]),
        default_rate=float(timing["facts"]["default_rate"]),
    )
