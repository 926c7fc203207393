"""Rates of this machine: the model itself does a little of what it will do, without being moved.

What is timed is the run's own: rounds, gradients, the optimizer's step, decoding. The first of
everything is thrown away; it is slower.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from preftune import automatic, building, phases
from preftune.config import Config
from preftune.estimating.counts import Counts, Rehearsal, asks_a_judge, counted_reward
from preftune.estimating.hollow import Draw, observed
from preftune.estimating.times import START, Rates, spread_of
from preftune.gradient import gradient
from preftune.method import Method, configure
from preftune.numerics import stream_key, uniform
from preftune.optimizer import make
from preftune.parts import Parts, blocks_are, make_world
from preftune.policies.scoring import sizes
from preftune.policies.transformer import Transformer
from preftune.preparing import prepare
from preftune.rounds import Group, World, group_terms
from preftune.sampling.local import MAX_ROWS
from preftune.terms import trimmed

TIMED = 3
"""Updates that are timed, behind one that is not."""
LONGEST = 64
"""Tokens of a response in the probe, at most."""
_NARROW = 4
"""Rows are decoded a second time, a fourth of them, to tell what a step and what a row costs."""
_FEW_TOKENS = 4096
"""Of an update in the probe, about, at most; a micro-batch where that is more."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a probe found."""

    rates: Rates
    lengths: Sequence[int]
    """Of responses that were drawn; empty where the run draws none."""
    finished: Sequence[bool]
    seconds: float
    """That it took."""


@dataclass
class _Timing:
    """One update's."""

    seconds: dict[str, float]
    tokens: int
    """Of its training passes, by layout."""
    forward: int
    """Of its passes without gradients."""
    step: float
    judged: int
    idle: float


def probe(
    config: Config, of: Rehearsal, counts: Counts, overrides: Mapping[str, Any] | None = None
) -> Probed:
    """Load the run's parts, and time a few updates.

    Raises:
        UserError: what `preparing.prepare` raises.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        apart = config.model_copy(
            update={"output": str(Path(place) / "run"), "judge": None, "resume": False}
        )
        reward = counted_reward if asks_a_judge(config) else None
        parts = prepare(apart, overrides=overrides, reward=reward)
        load = time.perf_counter() - began
        recomputed = blocks_are(of.parts, of.settings)["activation_checkpointing"]
        automatic.apply(parts.model.trunk, compiled=False, recomputed=recomputed)
        with _short(parts):
            timed, world = _updates(parts, counts)
            forward = _forward(parts, world)
            drawn = _drawing(parts, counts)
    rates = Rates(
        train=_rate([(t.seconds.get("train", 0.0), t.tokens) for t in timed]),
        step=median(t.step for t in timed), forward=forward,
        prefill=drawn.prefill, decode_step=drawn.step, decode_row=drawn.row,
        reward=_rate([(t.seconds.get("reward", 0.0), t.judged) for t in timed]),
        idle=median(t.idle for t in timed), load=START + load,
        spread=spread_of(t.seconds.get("train", 0.0) / max(1, t.tokens) for t in timed),
        measured=True,
    )  # fmt: skip
    return Probed(
        rates=rates, lengths=drawn.lengths, finished=drawn.finished,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _rate(found: Sequence[tuple[float, int]]) -> float:
    """Seconds of each: the median over the updates."""
    rates = [seconds / number for seconds, number in found if number]
    return median(rates) if rates else 0.0


@contextmanager
def _short(parts: Parts) -> Iterator[None]:
    """Responses of few tokens, inside."""
    policies = [p for p in (parts.model, parts.reference) if isinstance(p, Transformer)]
    before = [p.decoding for p in policies]
    for policy, decoding in zip(policies, before, strict=True):
        most = min(decoding.max_new_tokens, LONGEST)
        policy.decoding = replace(decoding, max_new_tokens=most)
    try:
        yield
    finally:
        for policy, decoding in zip(policies, before, strict=True):
            policy.decoding = decoding


def _fewer(parts: Parts, world: World, counts: Counts) -> tuple[Method, World]:
    """The row and its world with updates of few prompts, where the run's are large."""
    tokens = max((u.tokens.get("train", 0) for u in counts.updates), default=0)
    most = max(_FEW_TOKENS, world.micro_batch_tokens or 0)
    method = parts.method
    if tokens > most:
        world = replace(world, batch_size=max(1, world.batch_size * most // tokens))
    rounds = [t.source.prompts_per_round for t in method.terms]
    if any(r is not None for r in rounds):
        groups = group_terms(method)
        number = max(g.prompts_per_update(world.batch_size, g.source.num_responses) for g in groups)
        method = configure(method, {"prompts_per_round": number})
    return method, world


def _updates(parts: Parts, counts: Counts) -> tuple[list[_Timing], World]:
    """Updates from fresh rounds, at a rate of 0: nothing is moved."""
    method, world = _fewer(parts, make_world(parts), counts)
    groups = group_terms(method)
    optimizer = make(world.policy.parameters(), (), 0.0)
    timed = [_update(groups, world, optimizer, version) for version in range(1 + TIMED)]
    return timed[1:], world


def _update(groups: list[Group], world: World, optimizer: Any, version: int) -> _Timing:
    before = sum(g.queries for g in groups)
    for group in groups:
        group.round = None
    optimizer.zero_grad()
    with phases.recording() as spent:
        began = time.perf_counter()
        found = gradient(groups, world, version)
        taken = time.perf_counter() - began
    began = time.perf_counter()
    with phases.recording() as stepped, phases.phase("train"):
        if found.loss is not None:
            optimizer.clip(1.0)
            optimizer.step(0.0, found.items)
    read = [trimmed(m.samples, m.labelled)[0] for m in found.minibatches if not m.group.idle]
    return _Timing(
        seconds=dict(spent.seconds), tokens=sum(_size(world.policy, s) for s in read),
        forward=spent.tokens.get("score", 0), step=stepped.seconds["train"],
        judged=sum(g.queries for g in groups) - before,
        idle=max(0.0, taken - sum(spent.seconds.values())),
    )  # fmt: skip


def _size(model: Any, samples: Any) -> int:
    """Tokens of a minibatch as the model is given them."""
    s = samples
    layout = model.trunk.layout(s.prompt, s.prompt_mask, s.tokens, s.mask)
    return layout.input_ids.numel()


def _forward(parts: Parts, world: World) -> float:
    """Seconds a token of a pass without gradients, by the reference where there is one."""
    groups = group_terms(parts.method)
    group = next((g for g in groups if not g.source.draws), None)
    rows = parts.data if group is not None else parts.prompts
    assert rows is not None, "checked by prepare"
    few = torch.arange(min(len(rows), 4 * world.batch_size))
    samples = rows.samples(few) if rows.kind != "prompts" else _as_responses(rows, few)
    budget = world.micro_batch_tokens or _FEW_TOKENS
    total = torch.tensor(sizes(samples)).cumsum(0)
    samples = samples.take(torch.arange(max(1, int((total <= budget).sum()))))
    model = parts.reference or parts.model
    names = frozenset({"logp"} if isinstance(model, Transformer) else {"score"})
    times = []
    for _ in range(TIMED):
        began = time.perf_counter()
        with torch.no_grad():
            for out in model.outputs(samples, names).values():
                out.sum().item()
        times.append(time.perf_counter() - began)
    return median(times[1:]) / max(1, _size(model, samples))


def _as_responses(rows: Any, few: torch.Tensor) -> Any:
    """Prompts alone, of which the second half stands for a response."""
    from preftune.samples import Samples, pad_stack

    halves = [rows.prompts[int(i)] for i in few]
    prompt, prompt_mask = pad_stack(
        [torch.tensor(p[: -(len(p) // 2) or None]) for p in halves], left=True
    )
    tokens, mask = pad_stack([torch.tensor(p[len(p) - max(1, len(p) // 2) :]) for p in halves])
    shape = (len(halves), 1)
    return Samples(
        prompt=prompt, prompt_mask=prompt_mask, tokens=tokens.unsqueeze(1), mask=mask.unsqueeze(1),
        finished=torch.ones(shape, dtype=torch.bool), origin=torch.zeros(shape, dtype=torch.long),
        row=few,
    )  # fmt: skip


@dataclass(kw_only=True)
class _Drawn:
    """Seconds of sampling, and how long the answers were."""

    prefill: float = 0.0
    step: float = 0.0
    row: float = 0.0
    lengths: Sequence[int] = ()
    finished: Sequence[bool] = ()


def _drawing(parts: Parts, counts: Counts) -> _Drawn:
    """Draw as many rows together as the run will, and fewer."""
    logs = [*(u.done for u in counts.updates), counts.baseline, counts.last_evaluation]
    draws = [d for log in logs for d in log.draws]
    if not draws or not isinstance(parts.model, Transformer):
        return _Drawn()
    of_updates = [d for u in counts.updates for d in u.done.draws] or draws
    typical = sorted(of_updates, key=lambda d: d.rows)[len(of_updates) // 2]
    each = max(1, typical.rows // typical.prompts)
    wide = max(1, min(typical.rows, MAX_ROWS) // each)
    rows = parts.prompts if parts.prompts is not None else parts.held_out
    assert rows is not None, "something is sampled to"
    policy = parts.model
    found, out = [], _Drawn()
    asked = rows if policy.controls is None else building.Asked(rows, policy)
    for number in (1, wide, max(1, wide // _NARROW)):
        index = torch.arange(min(number, len(rows)))
        with phases.recording() as spent:
            drawn = policy.sample(*asked.prompts_only(index), each, _stream, 0)
        length = drawn.lengths()
        one = Draw(
            prompts=len(index), rows=length.numel(), prompt=int(drawn.prompt_mask.sum()),
            steps=int(length.max()) - 1, tokens=int(length.sum()) - length.numel(), longest=0,
            most=0,
        )  # fmt: skip
        found.append((one, spent.seconds.get("decode", 0.0)))
        if number == wide:
            out.prefill = spent.seconds["prefill"] / one.prompt
            out.lengths = length.flatten().tolist()
            out.finished = drawn.finished.flatten().tolist()
    out.step, out.row = fitted(found[1:] or found)
    return out


def fitted(found: Sequence[tuple[Draw, float]]) -> tuple[float, float]:
    """Seconds of a step and of a row in it, none negative, from a wide and a narrow draw."""
    (wide, long), (narrow, short) = found[0], found[-1]
    determinant = wide.steps * narrow.tokens - narrow.steps * wide.tokens
    if determinant:
        step = (long * narrow.tokens - short * wide.tokens) / determinant
        row = (wide.steps * short - narrow.steps * long) / determinant
        if step >= 0 and row >= 0:
            return step, row
    return long / max(1, wide.steps), 0.0


_KEY = stream_key(0, "estimate")


def _stream(t: int, shape: tuple[int, ...]) -> torch.Tensor:
    return uniform(_KEY, t, torch.arange(shape[0])[:, None], torch.arange(shape[1]))


def lengths_of(found: Probed, most: int) -> Any:
    """How long responses will be, as the probe's were."""
    return observed(found.lengths, found.finished, most) if found.lengths else None
