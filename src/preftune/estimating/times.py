"""Seconds of what was counted, at the rates of a machine."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from preftune.automatic import RATES
from preftune.estimating.counts import Counts, Rehearsal, Update
from preftune.estimating.hollow import Draw, Log
from preftune.sampling.local import MAX_ROWS

WIDE = 0.15
"""A total is given as so much less and more of what was found, at least."""
_READ = {"cpu": 1e10, "cuda": 2e12}
"""Bytes a second, roughly, at which decoding reads the weights."""
_WRITTEN = 2e8
"""Bytes a second, roughly, at which a model or checkpoint is written, checked and synchronised."""
START = 3.0
"""Seconds, roughly, of starting Python with its libraries."""
_LOAD = 10.0
"""Seconds, roughly, of that and of loading model and data."""
_REPORT = 1.0
"""Seconds of the report."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of each thing that a run does many times."""

    train: float
    """A token of a training pass, forward and backward."""
    step: float
    """Clipping the gradient, and AdamW."""
    forward: float
    """A token of a pass without gradients."""
    prefill: float
    """A token of a prompt that is sampled to."""
    decode_step: float
    """A step of decoding, however many rows there are."""
    decode_row: float
    """A row of it."""
    reward: float = 0.0
    """A response that is judged."""
    idle: float = 0.0
    """What is left of an update."""
    load: float = _LOAD
    """Until the first update, or what comes before it."""
    written: float = _WRITTEN
    """Bytes a second."""
    spread: float = WIDE
    """How far the same work differed while it was timed, as a share."""
    measured: bool = False


def rough(of: Rehearsal) -> Rates:
    """Rates by floating-point operations and bytes read: right within a factor of a few."""
    device = of.model.trunk.device.type
    weights = sum(p.numel() for p in of.model.trunk.model.parameters())
    trained = sum(p.numel() for p in of.parts.model.parameters())
    rate = RATES.get(device, 1e12)
    read = _READ.get(device, _READ["cpu"])
    forward = 2 * weights / rate
    return Rates(
        train=3 * forward if trained == weights else 2 * forward, forward=forward, prefill=forward,
        step=28 * trained / read, decode_step=2 * weights / read, decode_row=2 * forward,
        spread=1.0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A line of the table: a kind of work over the whole run."""

    seconds: float
    tokens: int
    """That go through a model."""


def stages(counts: Counts, rates: Rates) -> dict[str, Stage]:
    """Seconds and tokens of a whole run, by kind of work."""
    scale = counts.scale()
    each = counts.updates

    def over(what: Callable[[Update], float]) -> float:
        return scale * sum(what(u) for u in each)

    def passes(trains: bool) -> int:
        return round(over(lambda u: _tokens(u.done, trains)))

    draws = [d for u in each for d in u.done.draws]
    prompt = round(scale * sum(d.prompt for d in draws))
    decoded = round(scale * sum(d.tokens for d in draws))
    found = {
        "load": Stage(seconds=rates.load, tokens=0),
        "reference": _stage(counts.cache, rates),
        "prefill": Stage(seconds=rates.prefill * prompt, tokens=prompt),
        "decode": Stage(seconds=scale * sum(_decoding(d, rates) for d in draws), tokens=decoded),
        "score": Stage(seconds=rates.forward * passes(False), tokens=passes(False)),
        "reward": Stage(seconds=rates.reward * over(lambda u: u.judged), tokens=0),
        "train": Stage(
            seconds=rates.train * passes(True) + rates.step * counts.steps, tokens=passes(True)
        ),
        "other": Stage(seconds=rates.idle * counts.steps, tokens=0),
    }
    if counts.evaluations:
        found["evaluate"] = _evaluation(counts, rates)
    written = counts.model_bytes + counts.checkpoints * counts.checkpoint_bytes
    found["save"] = Stage(seconds=written / rates.written + _REPORT, tokens=0)
    return {name: s for name, s in found.items() if s.seconds or s.tokens}


def _tokens(log: Log, trains: bool) -> int:
    return sum(p.tokens for p in log.passes if p.trains == trains)


def _decoding(draw: Draw, rates: Rates) -> float:
    """Seconds: where more rows are asked for than are decoded together, steps add up."""
    turns = max(1.0, draw.rows / MAX_ROWS)
    return rates.decode_step * draw.steps * turns + rates.decode_row * draw.tokens


def _stage(log: Log, rates: Rates) -> Stage:
    """Passes without gradients, and draws."""
    forward, prompt = _tokens(log, False), sum(d.prompt for d in log.draws)
    seconds = rates.forward * forward + rates.prefill * prompt
    seconds += sum(_decoding(d, rates) for d in log.draws)
    return Stage(seconds=seconds, tokens=forward + prompt + sum(d.tokens for d in log.draws))


def _evaluation(counts: Counts, rates: Rates) -> Stage:
    parts: list[tuple[int, Log]] = [
        (1, counts.baseline), (counts.evaluations - 1, counts.evaluation),
        (1, counts.last_evaluation),
    ]  # fmt: skip
    found = [(n, _stage(log, rates)) for n, log in parts]
    answered = sum(n * sum(d.rows for d in log.draws) for n, log in parts)
    seconds = sum(n * s.seconds for n, s in found) + counts.evaluations * counts.figures
    return Stage(
        seconds=seconds + answered * rates.reward, tokens=sum(n * s.tokens for n, s in found)
    )


def total(found: Iterable[Stage], rates: Rates) -> tuple[float, float, float]:
    """Seconds of a run, and the least and the most that it may be expected to take."""
    seconds = sum(s.seconds for s in found)
    spread = max(WIDE, rates.spread)
    return seconds, seconds / (1 + spread), seconds * (1 + spread)


def spread_of(times: Iterable[float]) -> float:
    """How far the slowest is from the fastest, as a share of the fastest, halved."""
    found = list(times)
    return (max(found) / min(found) - 1) / 2 if len(found) > 1 else 0.0
