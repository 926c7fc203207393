"""What a run has trained on, drawn and had judged so far, in responses, told from its sources."""

from preftune import loop
from preftune.collecting import Source
from preftune.rounds import Group
from preftune.sources import Pool, Reference

COUNTS = ("trained", "drawn", "judged")
"""Responses, over the run so far."""


def counts(run: loop.State) -> dict[str, float]:
    """`COUNTS` of each run of a study: the same for all."""
    return {
        "trained": sum(map(_trained, run.groups)),
        "drawn": float(sum(_drawn(g) for g in run.groups)),
        "judged": float(sum(_of_reference(g) or g.queries for g in run.groups)),
    }


def _trained(group: Group) -> float:
    """Responses that its minibatches computed so far: of each prompt those that some item points
    at, alike in all rounds."""
    current = group.round
    if current is None or group.idle:
        return 0.0
    pointed = sum(b.index.shape[-2:].numel() for b in current.batches)
    used = min(current.samples.tokens.shape[-2], pointed)
    before = (group.cursor.drawn - current.samples.row.shape[-1]) * group.source.passes
    return used * float(before + sum(len(m) for m in current.minibatches[: current.taken]))


def _drawn(group: Group) -> int:
    return group.cursor.drawn * _fresh(group.source) + _of_reference(group)


def _fresh(source: Source) -> int:
    """Own samples to a prompt."""
    if isinstance(source, Pool):
        return sum(_fresh(m) for m in source.members)
    return source.num_responses if source.on_policy else 0


def _of_reference(group: Group) -> int:
    """Drawn once and kept (and judged once, though the loop asks each epoch anew)."""
    members = group.source.members if isinstance(group.source, Pool) else (group.source,)
    width = sum(m.num_responses for m in members if isinstance(m, Reference))
    return len(group.kept) * width
