"""`preftune estimate`: what a run will take, put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from preftune.config import Config
from preftune.errors import UserError
from preftune.estimating import advice, probing, times
from preftune.estimating.counts import MOST, Counts, Rehearsal, asks_a_judge, counted, rehearsal
from preftune.estimating.memory import Memory, memory
from preftune.estimating.times import Rates, Stage
from preftune.parts import blocks_are


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory and time of a run, and what to change where it will not fit."""

    counts: Counts
    memory: Memory
    stages: dict[str, Stage]
    rates: Rates
    seconds: tuple[float, float, float]
    """Expected, least, most."""
    facts: dict[str, Any]
    changes: list[advice.Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        value, low, high = self.seconds
        return {
            "fits": self.memory.fits,
            "memory": {
                "peak": self.memory.peak, "free": self.memory.free, "parts": self.memory.parts,
                "stages": self.memory.stages, "fixed": self.memory.fixed,
            },
            "time": {
                "seconds": value, "low": low, "high": high, "measured": self.rates.measured,
                "stages": {
                    name: {"seconds": s.seconds, "tokens": s.tokens}
                    for name, s in self.stages.items()
                },
            },
            "disk": {
                "model": self.counts.model_bytes, "checkpoint": self.counts.checkpoint_bytes,
                "checkpoints": self.counts.kept_checkpoints,
            },
            "facts": self.facts,
            "changes": [c.as_json() for c in self.changes],
            "notes": self.notes,
        }  # fmt: skip


def estimate(
    config: Config,
    *,
    overrides: Mapping[str, Any] | None = None,
    probes: bool = True,
    note: Callable[[str], None] = lambda message: None,
) -> Estimate:
    """Memory and time of the run that `train` would make of these settings.

    Nothing is loaded where the run will not fit.

    Args:
        overrides: dotted paths below `terms`.
        probes: time the model itself; else rates are taken from a table.
        note: told at once what is about to be done.
    Raises:
        UserError: what `train` would refuse.
    """
    of = rehearsal(config, overrides)
    counts = counted(of)
    found = memory(of, counts)
    notes = [*of.parts.notes, *_caveats(config, of)]
    rates, assumed = times.rough(of), _assumed(of, counts)
    changes: list[advice.Change] = []
    if not found.fits:
        note("it will not fit: looking for what would")
        changes = advice.changes(config, of, found, overrides)
    elif probes:
        note("it fits: timing the model itself")
        try:
            probed = probing.probe(config, of, counts, overrides)
        except UserError as error:
            notes.append(f"not timed, so the times are rough: {error}")
        else:
            rates = probed.rates
            if probed.lengths:
                mean = sum(probed.lengths) / len(probed.lengths)
                most = of.model.decoding.max_new_tokens  # type: ignore[union-attr]
                counts = counted(of, probing.lengths_of(probed, most))
                found = memory(of, counts)
                assumed = {
                    "of": len(probed.lengths),
                    "mean": mean,
                    "finished": sum(probed.finished) / len(probed.finished),
                }
    if not rates.measured:
        notes.append("times are of a table of rates: right within a factor of a few")
    stages = times.stages(counts, rates)
    return Estimate(
        counts=counts, memory=found, stages=stages, rates=rates,
        seconds=times.total(stages.values(), rates), facts=_facts(of, counts, assumed),
        changes=changes, notes=notes,
    )  # fmt: skip


def _assumed(of: Rehearsal, counts: Counts) -> dict[str, Any] | None:
    """How long responses are taken to be, where any are drawn."""
    logs = [*(u.done for u in counts.updates), counts.last_evaluation]
    if not any(log.draws for log in logs):
        return None
    most = of.model.decoding.max_new_tokens  # type: ignore[union-attr]
    return {"of": 0, "mean": max(1, most // 2), "finished": None}


def _facts(of: Rehearsal, counts: Counts, assumed: dict[str, Any] | None) -> dict[str, Any]:
    """What the figures stand on."""
    blocks = blocks_are(of.parts, of.settings)
    trained = sum(p.numel() for p in of.parts.model.parameters())
    weights = sum(p.numel() for p in of.model.trunk.model.parameters())
    return {
        "method": of.parts.method.name, "model": of.parts.config.model,
        "device": of.model.trunk.device.type, "weights": weights, "trained": trained,
        "updates": counts.steps, "counted_updates": len(counts.updates),
        "micro_batch_tokens": of.parts.micro_batch_tokens, **blocks,
        "evaluations": counts.evaluations, "responses": assumed,
    }  # fmt: skip


def _caveats(config: Config, of: Rehearsal) -> list[str]:
    """What the figures leave out."""
    found = []
    if of.settings.max_steps > MOST:
        found.append(f"the first {MOST} updates were counted; the others are taken to be like them")
    if asks_a_judge(config) or config.judge is not None:
        found.append("a judge is not asked here: its time is not in the figures")
    if blocks_are(of.parts, of.settings)["compile"]:
        found.append("blocks will be compiled: a minute more at first, and up to a tenth faster")
    if not of.model.trunk.packing and config.packing is not False:
        found.append("rows will be padded: the model cannot take packed ones")
    if of.parts.micro_batch_tokens is None:
        found.append("no limit on a micro-batch")
    return found
