"""The loop over updates, for every row of the table on every scale of problem.

    refill spent sources -> one minibatch of each -> gradient -> step -> log, evaluate, save

It knows no method by name: what a row does is in its terms.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from preftune.errors import GuardStop
from preftune.measures import Measures, numbers
from preftune.method import Method
from preftune.optimizer import Optimizer, make
from preftune.phases import Recorder, phase, recording
from preftune.policies.scoring import micro_batches, sizes
from preftune.rounds import Group, World, group_terms, next_minibatch, refill
from preftune.samples import Batch, Samples
from preftune.terms import count, loss_sum, narrow, trimmed

Metrics = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the loop updates; what an update is, is the row's."""

    max_steps: int
    learning_rate: float | tuple[float, ...]
    """One, or one a run of a study."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    log_every: int = 1
    eval_every: int | None = None
    save_every: int | None = None


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens outside the loop. Each may be left out."""

    log: Callable[[int, Metrics], None] = lambda step, metrics: None
    evaluate: Callable[[int], Metrics] | None = None
    save: Callable[["State"], None] | None = None
    warn: Callable[[str], None] = lambda message: None
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
    warned: set[str] = field(default_factory=set)


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


@dataclass
class Found:
    """What a gradient came with."""

    loss: Tensor | None
    """[*R], float64; None where no item remains in any run."""
    items: Tensor
    """[*R]: some item remains in this run."""
    measures: Measures


def gradient(
    groups: Sequence[Group],
    world: World,
    version: int,
    given: Samples | None = None,
    measure: bool = True,
) -> Found:
    """Accumulate one update's gradient in the policy's parameters.

    Each term is normalised by its own count over the whole minibatch, known before the first
    forward, so the size of the micro-batches does not matter.
    """
    shape = world.policy.batch_shape
    total, found = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    measures = Measures(shape, on=measure)
    for group in sorted(groups, key=lambda g: not g.leads):  # it brings the reference along
        if group.round is None or group.round.spent:
            refill(group, world, version, given)
    work = []
    for group in groups:
        samples, labelled = next_minibatch(group)
        measures.minibatch(group, samples, labelled, version)
        samples, labelled = narrow(samples, labelled)
        counts = [count(t, samples, b) for t, b in zip(group.terms, labelled, strict=True)]
        left = torch.stack(counts).amax(0) > 0
        if not bool(left.any()):
            continue
        found = found if group.idle else found | left
        parts = micro_batches(samples, world.micro_batch_tokens)
        for index in parts:
            part, items = samples, labelled
            if len(parts) > 1:
                part, items = samples.take(index), [b.take(index) for b in labelled]
            work.append((group, *trimmed(part, items), counts))
    if not shape:
        # most memory is taken by the largest: it goes first, while there are no gradients yet
        work.sort(key=lambda w: -sum(sizes(w[1])))
    for group, part, items, counts in work:
        with phase("train", 0 if shape else sum(sizes(part))):
            total = total + _micro_batch(group, world, part, items, counts, measures)
    return Found(total if bool(found.any()) else None, found, measures)


def _micro_batch(
    group: Group,
    world: World,
    samples: Samples,
    labelled: list[Batch],
    counts: list[Tensor],
    measures: Measures,
) -> Tensor:
    """Forward and backward pass of some of a minibatch's prompts; its share of the loss, [*R]."""
    with torch.set_grad_enabled(not group.idle):
        now = world.policy.outputs(samples, group.outputs)
        measures.outputs(group, samples, now)
        dtype = next(iter(now.values())).dtype
        loss = torch.zeros(world.policy.batch_shape, dtype=dtype)
        for i, (term, batch, n) in enumerate(zip(group.terms, labelled, counts, strict=True)):
            summed, arguments = loss_sum(term, samples, batch, now)
            mean = summed / n.clamp(min=1).to(dtype)
            measures.term(group, i, samples, batch, arguments, mean)
            loss = loss + group.factor(i) * mean if not term.idle else loss
    if not group.idle:
        loss.sum().backward()
    return loss.detach().double()


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
    measure = measure or any(t.max_ratio is not None for g in run.groups for t in g.terms)
    found = gradient(run.groups, run.world, run.version, measure=measure)
    metrics: Metrics = found.measures.result() if measure else {}
    metrics |= _so_far(run.groups)
    rate = learning_rate(settings, run.step)
    metrics |= {"loss": None, "learning_rate": numbers(rate)}
    if found.loss is not None:
        with phase("train"):
            norm = run.optimizer.clip(settings.max_grad_norm)
        metrics |= {"loss": _shown(found.loss, found.items), "grad_norm": _shown(norm, found.items)}
        _guard(run, found.loss, norm)
        active = found.items & ~run.stopped & ~found.measures.skipped()
        with phase("train"):
            run.optimizer.step(rate, active)
        if bool(active.any()):
            run.version += not run.world.policy.batch_shape
            _follow(run)
    run.version += bool(run.world.policy.batch_shape)  # of a run, whatever the others do
    run.step += 1
    return metrics


def _shown(value: Tensor, items: Tensor) -> Any:
    """A run without any item has no loss and no gradient."""
    return numbers(value.masked_fill(~items, torch.nan)) if value.ndim else float(value)


def _guard(run: State, loss: Tensor, norm: Tensor) -> None:
    """Stop a run whose loss or gradient is not finite; all runs stopped, stop the program."""
    bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
    run.stopped |= bad
    if bool(run.stopped.all()):
        raise GuardStop(
            f"step {run.step + 1}: the loss is {numbers(loss)} "
            f"and the gradient norm {numbers(norm)}. "
            "Lower learning_rate, or look at the batch's rewards and lengths."
        )


def _so_far(groups: Iterable[Group]) -> Metrics:
    """Counts over the run: what the reward was asked."""
    asked = sum(g.queries for g in groups)
    return {"reward_queries": asked} if asked else {}


def _follow(run: State) -> None:
    """A reference that is the moving average of the policy."""
    if run.method.reference_update == "ema":
        assert run.world.reference is not None, "reference_update needs a reference"
        run.world.reference.follow(run.world.policy, run.method.ema_decay)


def advance(run: State, settings: Settings, hooks: Hooks) -> None:
    """Update until `max_steps` or until `hooks.stop`, calling the hooks."""
    if run.step == 0 and hooks.evaluate and settings.eval_every:
        hooks.log(0, hooks.evaluate(0))
    while run.step < settings.max_steps:
        step, last = run.step + 1, run.step + 1 == settings.max_steps
        logged = step % settings.log_every == 0 or last
        metrics = update(run, settings, measure=logged)
        if metrics["loss"] is None and "ties" not in run.warned:
            run.warned.add("ties")
            hooks.warn(
                f"step {step}: no item remained (all rewards tied), so no update was made. "
                "Sample more responses a prompt, raise the temperature, or use a finer reward."
            )
        if hooks.evaluate and settings.eval_every and (step % settings.eval_every == 0 or last):
            metrics |= hooks.evaluate(step)
        if logged:
            hooks.log(step, metrics)
        if hooks.save and settings.save_every and (step % settings.save_every == 0 or last):
            hooks.save(run)
        if hooks.stop():
            return
