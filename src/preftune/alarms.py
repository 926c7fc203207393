"""Signs in a run's figures that it goes wrong, each said once with what was measured and its cure.

What alarms compare are means over windows of `WINDOW` measured updates, or evaluations, never one
step's noise. All that is kept of a run's past is a `Watch` of a few numbers, which a checkpoint
holds, so that a resumed run says what it would have said. The alarms themselves: `signs`.

docs/alarms.md has each alarm's numbers, with a run where it fires and one where it is silent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from preftune.signs import ALARMS, Moment, Numbers, View, is_number

WINDOW = 8
"""Measured updates whose mean is one point of a run's past."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A run's past at a few points, each a few figures; a trend is told between the last and
    `before`, which lies half to three quarters of the way back, however long the run is."""

    count: int = 0
    """Points so far."""
    first: Numbers = field(default_factory=dict)
    """Each figure where it first was."""
    before: Numbers = field(default_factory=dict)
    """Point p / 2, where p is the largest power of two up to `count`."""
    power: Numbers = field(default_factory=dict)
    """Point p, which will be `before`."""
    last: Numbers = field(default_factory=dict)

    def then(self, point: Numbers) -> "Series":
        """With one point more."""
        count = self.count + 1
        is_power = count & (count - 1) == 0
        return Series(
            count=count, first={**point, **self.first}, last=point,
            before=self.power if is_power else self.before,
            power=point if is_power else self.power,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is kept of a run, in plain numbers."""

    said: tuple[str, ...] = ()
    """Alarms that have fired."""
    updates: int = 0
    """Measured updates of the window under way."""
    sums: Numbers = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    """Of each figure in the window under way; one that an update lacks counts once less."""
    windows: Series = field(default_factory=Series)
    evaluations: Series = field(default_factory=Series)
    best: Numbers = field(default_factory=dict)
    """The evaluation with the highest gold reward."""

    @staticmethod
    def of(plain: Mapping[str, Any]) -> "Watch":
        """The watch that `dataclasses.asdict` made plain."""
        series = {name: Series(**plain[name]) for name in ("windows", "evaluations")}
        return Watch(**{**plain, **series, "said": tuple(plain["said"])})


@dataclass(frozen=True, kw_only=True)
class Fired:
    """An alarm of a run."""

    step: int
    alarm: str
    title: str
    measured: str
    cure: str

    @property
    def message(self) -> str:
        """All of it in a line."""
        return f"step {self.step}: {self.title}: {self.measured}. {self.cure}"


def after_update(
    watch: Watch, step: int, metrics: Mapping[str, Any]
) -> tuple[Watch, tuple[Fired, ...]]:
    """What is to be said after an update, and what is kept of it.

    Args:
        metrics: the update's figures; some may be missing. Those of a study, which are lists, are
            left alone.
    """
    watch, fired = _ask(watch, step, "update", View(now=metrics))
    found = {n: metrics[n] for n in _OF_UPDATES if is_number(metrics.get(n))}
    if not found:  # not measured, not logged
        return watch, fired
    watch = replace(
        watch, updates=watch.updates + 1,
        sums={**watch.sums, **{n: watch.sums.get(n, 0.0) + x for n, x in found.items()}},
        counts={**watch.counts, **{n: watch.counts.get(n, 0) + 1 for n in found}},
    )  # fmt: skip
    if watch.updates < WINDOW:
        return watch, fired
    means = {n: total / watch.counts[n] for n, total in watch.sums.items()}
    past = watch.windows.then(means)
    watch = replace(watch, updates=0, sums={}, counts={}, windows=past)
    view = View(now=means, first=past.first, before=past.before)
    watch, more = _ask(watch, step, "window", view)
    return watch, fired + more


def after_evaluation(
    watch: Watch, step: int, metrics: Mapping[str, Any]
) -> tuple[Watch, tuple[Fired, ...]]:
    """What is to be said after an evaluation, and what is kept of it.

    Args:
        metrics: the evaluation's figures, by their names in metrics.jsonl.
    """
    pairs = {n: watch.windows.last[n] for n in _OF_PAIRS if n in watch.windows.last}
    point = {**pairs, **_evaluated(metrics)}
    past = watch.evaluations.then(point)
    best = watch.best
    if "gold" in point and point["gold"] > best.get("gold", -math.inf):
        best = point
    watch = replace(watch, evaluations=past, best=best)
    view = View(now=point, first=past.first, before=past.before, best=best)
    return _ask(watch, step, "evaluation", view)


def _ask(watch: Watch, step: int, moment: Moment, view: View) -> tuple[Watch, tuple[Fired, ...]]:
    """Every alarm of that moment that has not been heard."""
    fired: list[Fired] = []
    for alarm in ALARMS:
        if moment not in alarm.moments or alarm.name in watch.said:
            continue
        measured = alarm.says(view)
        if measured is not None:
            watch = replace(watch, said=(*watch.said, alarm.name))
            fired.append(
                Fired(step=step, alarm=alarm.name, title=alarm.title, measured=measured,
                      cure=alarm.cure)
            )  # fmt: skip
    return watch, tuple(fired)


_OF_PAIRS = ("log_ratio_chosen", "log_ratio_rejected", "margin", "accuracy")
_OF_UPDATES = (
    *_OF_PAIRS, "logp_chosen", "kl", "entropy", "distinct_samples", "informative_pairs",
    "settled_pairs", "unlikely_pairs", "alike_pairs", "sampler_gap",
    "sampler_effective_sample_size", "value_offset",
)  # fmt: skip
_OF_EVALUATIONS = {"kl": "eval_kl", "entropy": "eval_entropy_per_token", "reward": "eval_reward"}
_BY_GOLD = {
    "gold": "eval_reward:", "agreement": "eval_agreement:", "agreement_far": "eval_agreement_far:",
}  # fmt: skip
"""How the names of figures by a gold reward begin."""


def _evaluated(metrics: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's figures by the names that alarms know; of several golds, the first."""
    known = {n: metrics.get(at) for n, at in _OF_EVALUATIONS.items()}
    for name, begins in _BY_GOLD.items():
        at = next((key for key in metrics if key.startswith(begins)), "")
        known |= {f"{name}{end}": metrics.get(f"{at}{end}") for end in ("", "_low", "_high")}
    return {name: float(x) for name, x in known.items() if x is not None and is_number(x)}
