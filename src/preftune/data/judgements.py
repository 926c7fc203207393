"""Verdicts that contradict each other, run in circles, or disagree with the numbers beside them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.data import near
from preftune.data.findings import Finding, finding, unknown
from preftune.data.rows import Rows

ANNOTATORS = ("annotator", "annotator_id", "worker", "worker_id", "labeler", "rater", "judge")

Comparisons = tuple[list[tuple[int, ...]], list[bool]]


def comparisons(
    rows: Rows, prompts: Sequence[int], responses: Sequence[tuple[int, ...]]
) -> Comparisons | None:
    """What each row judges, and its verdict: which of a pair wins, or a completion's label."""
    if rows.kind == "pairs":
        keys = [(p, *sorted(r)) for p, r in zip(prompts, responses, strict=True)]
        return keys, [r[0] <= r[1] for r in responses]
    labels = rows.columns.get("label")
    if rows.kind == "completions" and labels and None not in labels:
        keys = [(p, *r) for p, r in zip(prompts, responses, strict=True)]
        return keys, [bool(x) for x in labels]
    return None


def judgements(rows: Rows, keys: list[tuple[int, ...]], sides: list[bool]) -> list[Finding]:
    """Verdicts that contradict each other, and the least share of wrong ones."""
    repeated, both, outvoted = near.minority(keys, sides)
    # Rows copied with all their columns are one judgement; alone they tell of no agreement.
    columns = (str(row) for row in zip(keys, sides, *rows.columns.values(), strict=True))
    again = int(repeated.sum()) if len(set(columns)) > len(set(keys)) else 0
    noise = finding("noise", rows, outvoted, of=again) if again else unknown("noise")
    found = [finding("contradictions", rows, both), noise]
    who = next((rows.columns[name] for name in ANNOTATORS if name in rows.columns), None)
    if who is not None:
        found.append(_disagreement(rows, keys, sides, who))
    return found


def _disagreement(
    rows: Rows, keys: Sequence[tuple[int, ...]], sides: Sequence[bool], who: Sequence[Any]
) -> Finding:
    """Each annotator's last verdict against the first annotator's of the same comparison."""
    first: dict[tuple[int, ...], int] = {}
    last: dict[tuple[tuple[int, ...], str], int] = {}
    for i, (key, name) in enumerate(zip(keys, who, strict=True)):
        if name is not None:
            first.setdefault(key, i)
            last[key, str(name)] = i
    differ, asked = torch.zeros(len(rows), dtype=torch.bool), 0
    for (key, name), i in last.items():
        if name != str(who[first[key]]):
            asked += 1
            differ[i] = sides[i] != sides[last[key, str(who[first[key]])]]
    return finding("disagreement", rows, differ, of=asked) if asked else unknown("disagreement")


def circles(rows: Rows, pairs: Sequence[tuple[int, ...]]) -> list[Finding]:
    """Circles of three and more, among comparisons that were not decided both ways."""
    known = set(pairs)
    edges = [((p, a), (p, b)) for p, a, b in pairs]
    plain = [i for i, (p, a, b) in enumerate(pairs) if (p, b, a) not in known]
    mask = torch.zeros(len(rows), dtype=torch.bool)
    mask[plain] = near.cyclic([edges[i] for i in plain])
    return [finding("cycles", rows, mask)]


def labels(rows: Rows) -> list[Finding]:
    """What numbers say against the order of the pair; rows without numbers are not counted."""
    margins = [
        _column(rows, "score_chosen") - _column(rows, "score_rejected"),
        _column(rows, "margin"),
        _column(rows, "probability") - 0.5,
    ]
    said = torch.stack(margins)
    told = int((~said.isnan()).any(0).sum())
    if not told:
        return [unknown("ties"), unknown("inverted")]
    return [
        finding("ties", rows, (said == 0).any(0), of=told),
        finding("inverted", rows, (said < 0).any(0), of=told),
    ]


def _column(rows: Rows, name: str) -> Tensor:
    """The numbers of a column, [N] float64; NaN where there is none."""
    values = rows.columns.get(name, [None] * len(rows))
    numbers = [float(v) if isinstance(v, (bool, int, float)) else math.nan for v in values]
    return torch.tensor(numbers, dtype=torch.float64)
