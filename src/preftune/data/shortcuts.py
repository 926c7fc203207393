"""How far a preference can be told without reading: by length, likelihood, or who wrote it."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.data.findings import Finding, bools, finding, unknown
from preftune.data.rows import Rows

SEEN = 5
"""Responses of a source before "it never lost" says something: by chance one in 2^5."""
_NONE = (None, None)


def _sources(rows: Rows) -> list[tuple[Any, Any]] | None:
    """Who wrote chosen and rejected, by the columns that tell them apart with fewest names.

    Two columns (chosen_model, rejected_model), or one with both ({"chosen": ..., "rejected": ...}
    or a list of two). Text only; (None, None) where a row has none.
    """
    found = []
    for name, column in rows.columns.items():
        other = rows.columns.get(name.replace("chosen", "rejected"), column)
        both = map(_both, column) if other is column else zip(column, other, strict=True)
        pairs = [(a, b) if isinstance(a, str) and isinstance(b, str) else _NONE for a, b in both]
        if any(a != b for a, b in pairs):
            found.append(pairs)
    return min(found, key=lambda pairs: len({x for pair in pairs for x in pair}), default=None)


def _both(value: Any) -> tuple[Any, Any]:
    if isinstance(value, dict):
        return value.get("chosen"), value.get("rejected")
    return tuple(value) if isinstance(value, (list, tuple)) and len(value) == 2 else _NONE


def single_source(rows: Rows) -> Finding:
    """Pairs of a writer that only ever wins and one that only ever loses."""
    sources = _sources(rows)
    if sources is None:
        return unknown("single_source")
    won, lost = Counter(a for a, _ in sources), Counter(b for _, b in sources)
    mask = [
        a is not None and won[a] >= SEEN and lost[b] >= SEEN and not lost[a] and not won[b]
        for a, b in sources
    ]
    return finding("single_source", rows, bools(mask))


def rules_of(rows: Rows, prompts: Sequence[int], logp: Tensor | None) -> dict[str, Tensor]:
    """Rules that read nothing, each [N] of 1 (prefers the chosen), 0 or 1/2."""
    sizes = torch.tensor([[len(ids) for ids in r] for r in rows.responses]).reshape(-1, 2)
    ended = torch.tensor(rows.finished, dtype=torch.long).reshape(-1, 2)
    longer = _wins(sizes - ended)
    rules = {"longer": longer, "shorter": 1 - longer, "finished": _wins(ended)}
    if logp is not None:
        if logp.shape != (len(rows), 2) or bool(logp.isnan().any()):
            raise ValueError(
                f"reference_logp: {tuple(logp.shape)}, NaN: {bool(logp.isnan().any())}; "
                f"wanted are sums ({len(rows)}, 2) without NaN"
            )
        logp = logp.detach().double().cpu()
        rules["reference_logp"] = _wins(logp)
        rules["reference_logp_per_token"] = _wins(logp / sizes.clamp(min=1))
    sources = _sources(rows)
    if sources is not None:
        halves = random.Random(0).choices((0, 1), k=max(prompts, default=0) + 1)
        rules["source"] = _by_source(sources, [halves[p] for p in prompts])
    return rules


def _wins(values: Tensor) -> Tensor:
    """Of [N, 2], [N] float64: 1 where the first is larger, 1/2 where they are equal."""
    return (values[:, 0] > values[:, 1]).double() + 0.5 * (values[:, 0] == values[:, 1])


def _by_source(sources: Sequence[tuple[Any, Any]], half: Sequence[int]) -> Tensor:
    """The one whose writer wins more often among the prompts of the other half.

    Fitted on the same pairs the rule would know each rare writer by heart. Where writers are equal
    it falls a little below 1/2: who won more in one half won less in the other.
    """
    won, made = Counter(), Counter()
    for (a, b), h in zip(sources, half, strict=True):
        won[h, a] += 1
        made.update([(h, a), (h, b)])

    def rate(name: Any, h: int) -> float:
        key = (1 - h, name)
        return won[key] / made[key] if name is not None and made[key] else 0.5

    pairs = [[rate(a, h), rate(b, h)] for (a, b), h in zip(sources, half, strict=True)]
    return _wins(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2))
