"""The loop over updates, for every row of the table on every scale of problem.

    refill spent sources -> one minibatch of each -> gradient -> step -> log, evaluate, save

It knows no method by name: what a row does is in its terms.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from preftune import alarms
from preftune.errors import GuardStop, UserError
from preftune.gradient import Found, gradient
from preftune.measures import numbers
from preftune.method import Method
from preftune.optimizer import Optimizer, make
from preftune.phases import Recorder, phase, recording
from preftune.rounds import Group, World, group_terms
from preftune.stopping import Plateau

Metrics = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the loop updates; what an update is, is the row's."""

    max_steps: int
    learning_rate: float | tuple[float, ...]
    """One, or one a run of a study."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.1
    warmup_steps: int | None = None
    """In place of the ratio."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    log_every: int = 1
    eval_every: int | None = None
    save_every: int | None = None
    max_skipped: int = 0
    """Updates that may be left out because the loss or the gradient is not finite."""
    best_by: str | None = None
    """A figure of the evaluations; the checkpoint where it is highest is kept (`-name`: lowest)."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens outside the loop. Each may be left out."""

    log: Callable[[int, Metrics], None] = lambda step, metrics: None
    evaluate: Callable[[int, bool], Metrics] | None = None
    """At a step; True: the run's last, where an evaluation is a full one."""
    save: Callable[["State"], None] | None = None
    alarm: Callable[[alarms.Fired], None] = lambda fired: None
    after: Callable[["State"], None] = lambda state: None
    """After each step and what follows it."""
    ready: Callable[["State"], bool] = lambda state: True
    """Asked before each update, and waited for; False: its data will not come, so the run ends."""
    stop: Callable[[], bool] = lambda: False
    """Asked after each step: end here, with everything in order for a checkpoint."""


@dataclass
class State:
    """A method under way: all that changes while it runs."""

    method: Method
    world: World
    groups: list[Group]
    optimizer: Optimizer
    stopped: Tensor
    """[*R]: runs of a study that were not finite and stay as they were before; the others go on."""
    step: int = 0
    version: int = 0
    """Optimizer steps taken (an update without any item makes none; of a study, all updates)."""
    seconds: float = 0.0
    watch: alarms.Watch = field(default_factory=alarms.Watch)
    skipped: int = 0
    """Updates left out because they were not finite."""
    best: tuple[int, float] | None = None
    """Step and value of `best_by`, negative where less is better."""
    plateau: Plateau = field(default_factory=Plateau)
    """Of the reward, where the row has patience."""
    pending: Metrics | None = None
    """Figures of the last update, while it is not evaluated and logged."""
    identity: dict[str, str] = field(default_factory=dict)
    """Hashes of the weights that do not change, by whose they are, and of the rows."""
    torn: bool = False
    """What stands is of no step: an update failed in its middle, or other weights were taken."""


def start(method: Method, world: World, settings: Settings) -> State:
    """A run at step 0."""
    shape = world.policy.batch_shape
    return State(
        method=method, world=world, groups=group_terms(method),
        optimizer=make(world.policy.parameters(), shape, settings.weight_decay),
        stopped=torch.zeros(shape, dtype=torch.bool),
    )  # fmt: skip


def rate_factor(settings: Settings, step: int) -> float:
    """Of the learning rate in update `step` (from 0): linear warm-up, then the schedule to 0."""
    warmup = math.ceil(settings.warmup_ratio * settings.max_steps)
    if settings.warmup_steps is not None:
        warmup = min(settings.warmup_steps, settings.max_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, settings.max_steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return factor[settings.lr_schedule]


def learning_rate(settings: Settings, step: int) -> float | Tensor:
    """The rate of update `step` (from 0), [R] where each run has its own."""
    base, factor = settings.learning_rate, rate_factor(settings, step)
    if isinstance(base, tuple):
        return torch.tensor(base, dtype=torch.float64) * factor
    return base * factor


def update(run: State, settings: Settings, measure: bool = True) -> Metrics:
    """One update of the policy.

    Args:
        measure: False leaves out the metrics that cost time.

    Raises:
        GuardStop: the loss or the gradient is not finite (the weights are left as they were); in a
            study, that of every run.
    """
    began = time.perf_counter()
    with recording() as spent:
        metrics = _update(run, settings, measure)
    taken = time.perf_counter() - began
    run.seconds += taken
    return (
        metrics
        | ({} if run.world.policy.batch_shape else _times(spent, taken))
        | {"seconds": run.seconds}
    )


OF_TIME = ("seconds_", "tokens_per_second_")
"""How the names of an update's times begin."""


def _times(spent: Recorder, taken: float) -> Metrics:
    """Seconds of each phase of an update and of what is left, and tokens a second."""
    out: Metrics = {f"seconds_{name}": seconds for name, seconds in spent.seconds.items()}
    out["seconds_idle"] = taken - sum(spent.seconds.values())
    for name in ("decode", "train"):
        if spent.tokens.get(name):
            seconds = spent.seconds[name] + (spent.seconds.get("prefill", 0) * (name == "decode"))
            out[f"tokens_per_second_{name}"] = spent.tokens[name] / seconds
    return out


def _update(run: State, settings: Settings, measure: bool) -> Metrics:
    """`update` without its times."""
    run.optimizer.zero_grad()
    undo = _remember(run.groups)
    try:
        metrics, active = _planned(run, settings, measure)
    except Exception:  # a reward that fails, say: the run stands where it was before this update
        undo()
        # but for a reference that moves at rounds, which may have moved
        run.torn = run.method.reference_update == "round"
        raise
    run.torn = True  # until all of it is done
    if active is not None:
        with phase("train"):
            run.optimizer.step(learning_rate(settings, run.step), active)
        if bool(active.any()):
            run.version += not run.world.policy.batch_shape
            _follow(run)
    run.version += bool(run.world.policy.batch_shape)  # of a run, whatever the others do
    run.step += 1
    run.torn = False
    return metrics


def _planned(run: State, settings: Settings, measure: bool) -> tuple[Metrics, Tensor | None]:
    """The gradient of an update, its metrics, and [*R] the runs that it moves; None: no loss."""
    measure = measure or any(t.max_ratio is not None for g in run.groups for t in g.terms)
    found = gradient(run.groups, run.world, run.version, measure=measure)
    run.world = replace(run.world, micro_batch_tokens=found.micro_batch_tokens)
    metrics: Metrics = found.measures.result() if measure else {}
    metrics |= _so_far(run)
    metrics |= {"loss": None, "learning_rate": numbers(learning_rate(settings, run.step))}
    if found.loss is None:
        return metrics, None
    with phase("train"):
        norm = run.optimizer.clip(settings.max_grad_norm)
    metrics |= {"loss": _shown(found.loss, found.items), "grad_norm": _shown(norm, found.items)}
    sound = _sound(run, settings, found, norm)
    return metrics, found.items & sound & ~run.stopped & ~found.measures.skipped()


def _remember(groups: Iterable[Group]) -> Callable[[], None]:
    """What puts sources back to where they are now. A round is never changed but for its count."""
    now = [
        (
            g,
            replace(g, cursor=replace(g.cursor), kept=dict(g.kept), states=list(g.states)),
            g.round.taken if g.round else 0,
        )
        for g in groups
    ]

    def undo() -> None:
        for group, before, taken in now:
            for name in ("cursor", "kept", "states", "round", "queries"):
                setattr(group, name, getattr(before, name))
            if group.round is not None:
                group.round.taken = taken

    return undo


def _shown(value: Tensor, items: Tensor) -> Any:
    """A run without any item has no loss and no gradient."""
    return numbers(value.masked_fill(~items, torch.nan)) if value.ndim else float(value)


def _sound(run: State, settings: Settings, found: Found, norm: Tensor) -> Tensor:
    """[*R]: the loss and the gradient are finite. A run of a study stops where they are not; a
    single one leaves the update out if it may."""
    assert found.loss is not None, "there is no gradient without a loss"
    sound = torch.isfinite(found.loss) & torch.isfinite(norm)
    if bool(sound.all()):
        return sound
    if not run.world.policy.batch_shape and run.skipped < settings.max_skipped:
        run.skipped += 1
        return sound
    run.stopped |= ~sound
    if bool(run.stopped.all()):
        raise GuardStop(
            f"step {run.step + 1}: the loss is {numbers(found.loss)} "
            f"and the gradient norm {numbers(norm)}. "
            "Lower learning_rate, or look at the batch's rewards and lengths.",
            details=_of_batch(run, found, norm),
        )
    return sound


def _of_batch(run: State, found: Found, norm: Tensor) -> dict[str, Any]:
    """What is to be known of an update that was not finite."""
    weights = [n for n, p in run.world.policy.named_parameters() if not p.isfinite().all()]
    batch = [
        {
            "source": type(m.group.source).__name__,
            "rows": m.samples.row.tolist(),
            "tokens": m.samples.lengths().tolist(),
            "reward": None if m.samples.reward is None else m.samples.reward.tolist(),
        }
        for m in found.minibatches
    ]
    return {
        "step": run.step + 1, "loss": numbers(found.loss), "grad_norm": numbers(norm),
        "weights_not_finite": weights, "batch": batch,
    }  # fmt: skip


def _so_far(run: State) -> Metrics:
    """Counts over the run: what the reward was asked, and what was left out."""
    asked = sum(g.queries for g in run.groups)
    counts = {"reward_queries": asked, "updates_not_finite": run.skipped}
    return {name: n for name, n in counts.items() if n}


def _follow(run: State) -> None:
    """A reference that is the moving average of the policy."""
    if run.method.reference_update == "ema":
        assert run.world.reference is not None, "reference_update needs a reference"
        run.world.reference.follow(run.world.policy, run.method.ema_decay)


def advance(run: State, settings: Settings, hooks: Hooks) -> None:
    """Update until `max_steps` or until `hooks.stop`, calling the hooks."""
    if run.step == 0 and hooks.evaluate and settings.eval_every:
        found = hooks.evaluate(0, False)
        _judged_by(settings, found)
        hooks.log(0, found)
        _sound_alarms(run, hooks, alarms.after_evaluation(run.watch, 0, found))
    while run.pending is not None or not at_end(run, settings):
        if run.pending is None:
            if not hooks.ready(run):
                if not hooks.stop():
                    _out_of_data(run, settings, hooks)
                return
            measure = _is_logged(run.step + 1, settings) or run.method.patience is not None
            run.pending = update(run, settings, measure=measure)
            run.plateau = run.plateau.after(run.pending.get("reward"))
            _sound_alarms(run, hooks, alarms.after_update(run.watch, run.step, run.pending))
        _after(run, settings, hooks, run.pending)
        hooks.after(run)
        if hooks.stop():
            return


def _out_of_data(run: State, settings: Settings, hooks: Hooks) -> None:
    """The end of a run whose data did not go on: what it is worth, and all that is needed to go on
    when there are more."""
    found: Metrics = {}
    if hooks.evaluate and settings.eval_every:
        found = hooks.evaluate(run.step, True)
        _is_best(run, settings, found)
    hooks.log(run.step, found | {"ended": "data"})
    if found:
        _sound_alarms(run, hooks, alarms.after_evaluation(run.watch, run.step, found))
    if hooks.save:
        hooks.save(run)


def at_end(run: State, settings: Settings) -> bool:
    """At its last step, or at a plateau that a row with patience ends on. Runs of a study have
    rewards of their own, and none ends before the others."""
    return run.step >= settings.max_steps or run.plateau.reached(run.method.patience)


def _sound_alarms(
    run: State, hooks: Hooks, found: tuple[alarms.Watch, tuple[alarms.Fired, ...]]
) -> None:
    """Keep what is watched, and say what is new."""
    run.watch, fired = found
    for alarm in fired:
        hooks.alarm(alarm)


def _is_logged(step: int, settings: Settings) -> bool:
    return step % settings.log_every == 0 or step == settings.max_steps


def _after(run: State, settings: Settings, hooks: Hooks, metrics: Metrics) -> None:
    """What follows an update: evaluation, which may fail and be repeated, the log, a checkpoint."""
    step, last = run.step, at_end(run, settings)
    better, found = False, {}
    if hooks.evaluate and settings.eval_every and (step % settings.eval_every == 0 or last):
        found = hooks.evaluate(step, last)
        better = _is_best(run, settings, found)
        metrics = metrics | found
    if step < settings.max_steps and last:
        metrics = metrics | {"ended": "plateau"}
    if _is_logged(step, settings) or last:
        hooks.log(step, metrics)
    run.pending = None
    if found:
        _sound_alarms(run, hooks, alarms.after_evaluation(run.watch, step, found))
    due = settings.save_every and (step % settings.save_every == 0 or last)
    if hooks.save and (due or better):
        hooks.save(run)


def _is_best(run: State, settings: Settings, evaluated: Metrics) -> bool:
    """Whether this evaluation is the best so far; the run keeps it."""
    value = _judged_by(settings, evaluated)
    if value is None or (run.best is not None and value <= run.best[1]):
        return False
    run.best = run.step, value
    return True


def _judged_by(settings: Settings, evaluated: Metrics) -> float | None:
    """The figure that checkpoints are chosen by, negative where less of it is better."""
    if settings.best_by is None:
        return None
    name = settings.best_by.removeprefix("-")
    found = evaluated.get(name, evaluated.get(f"eval_{name}"))
    if found is None:
        known = (k for k, v in evaluated.items() if isinstance(v, int | float))
        names = ", ".join(sorted(k.removeprefix("eval_") for k in known))
        raise UserError(f"best_by '{settings.best_by}': evaluations have {names or 'no figure'}.")
    return -float(found) if settings.best_by.startswith("-") else float(found)
