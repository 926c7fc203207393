"""What is wrong with preference data before anything is trained on it: facts of each row.

Counts and masks only; intervals are the caller's, over `distinct_prompts` and not over rows.
"""

from collections.abc import Sequence

from torch import Tensor

from preftune.data import near
from preftune.data.findings import Finding, Health, bools, finding
from preftune.data.format_faults import Decode, format_faults
from preftune.data.judgements import circles, comparisons, judgements, labels
from preftune.data.rows import Rows
from preftune.data.shortcuts import rules_of, single_source

SAME_BEGINNING = 0.95
"""Share of the longer response's tokens."""


def health(
    rows: Rows,
    *,
    held_out: Rows | None = None,
    reference_logp: Tensor | None = None,
    decode: Decode | None = None,
    end_ids: Sequence[int] = (),
    bos_id: int | None = None,
) -> Health:
    """Everything that the data tell of their own faults.

    Args:
        held_out: M rows for evaluation, whose prompts should not be in `rows`.
        reference_logp: [N, 2] sums over the tokens of chosen and rejected.
        decode: ids to text without special tokens (`Renderer.decode`): finds role markers.
        end_ids: tokens that end a response; without them only `rows.finished` is asked.
        bos_id: None: whether it is doubled cannot be told.

    Raises:
        ValueError: `reference_logp` has another shape, holds NaN, or the rows are no pairs.
    """
    count = len(rows)
    prompts = near.numbered(map(tuple, rows.prompts))
    texts = iter(near.numbered(tuple(ids) for r in rows.responses for ids in r))
    responses = [tuple(next(texts) for _ in r) for r in rows.responses]
    found = [*_alike(rows, prompts, responses), *format_faults(rows, end_ids, bos_id, decode)]
    compared = comparisons(rows, prompts, responses)
    if compared is not None:
        found += judgements(rows, *compared)
    rules: dict[str, Tensor] = {}
    if rows.kind == "pairs":
        pairs = [(p, *r) for p, r in zip(prompts, responses, strict=True)]
        found += [*circles(rows, pairs), *_unlike(rows), *labels(rows), single_source(rows)]
        rules = rules_of(rows, prompts, reference_logp)
    elif reference_logp is not None:
        raise ValueError(f"reference_logp is for pairs, and these rows are {rows.kind}")
    seen = None
    if held_out is not None:
        overlap, seen = _overlap(rows, held_out)
        found += overlap
    findings = {f.name: f for f in found}
    return Health(
        rows=count,
        distinct_rows=count - (findings["duplicates"].count or 0),
        distinct_prompts=len(set(prompts)),
        findings=findings,
        rules=rules,
        held_out_seen=seen,
    )


def _alike(
    rows: Rows, prompts: Sequence[int], responses: Sequence[tuple[int, ...]]
) -> list[Finding]:
    """Rows that repeat earlier ones; a completion with another label repeats none."""
    label = map(str, rows.columns.get("label", [None] * len(rows)))
    whole = near.numbered(zip(prompts, responses, strict=True))
    first = near.firsts(near.numbered(zip(whole, label, strict=True)))
    asked = near.firsts(prompts)
    alone = sorted(set(near.firsts(whole)))  # near ones are looked for among these
    texts = near.trimmed(rows.prompts)
    parts: list[Sequence[Sequence[int]]] = [[texts[i] for i in alone]]
    if responses:
        parts += [[rows.responses[i][k] for i in alone] for k in range(len(responses[0]))]
    like = [""] * len(rows)
    for i, j in zip(alone, near.near_earlier(parts), strict=True):
        if j >= 0:
            like[i] = rows.where[alone[j]]
    return [
        finding(
            "duplicates",
            rows,
            bools([i != f for i, f in enumerate(first)]),
            like=[rows.where[f] for f in first],
        ),
        finding(
            "repeated_prompts",
            rows,
            bools([i != f for i, f in enumerate(asked)]),
            like=[rows.where[f] for f in asked],
        ),
        finding("near_duplicates", rows, bools([bool(x) for x in like]), like=like),
    ]


def _unlike(rows: Rows) -> list[Finding]:
    """Pairs whose two responses are the same, or nearly so from the beginning."""
    same = [near.common(a, b) / max(len(a), len(b), 1) for a, b in rows.responses]
    equal = bools([a == b for a, b in rows.responses])
    close = bools([s >= SAME_BEGINNING for s in same]) & ~equal
    ends = bools([a != b for a, b in rows.finished])
    return [
        finding("identical", rows, equal),
        finding("same_beginning", rows, close),
        finding("unlike_ends", rows, ends),
    ]


def _overlap(rows: Rows, held_out: Rows) -> tuple[list[Finding], Tensor]:
    """Rows whose prompt is held out, and [M] of the held-out rows whether theirs is in the rows."""
    texts = near.trimmed([*rows.prompts, *held_out.prompts])
    numbers = near.numbered(map(tuple, [*rows.prompts, *held_out.prompts]))
    n = len(rows)
    mine, theirs = numbers[:n], numbers[n:]
    place = dict(zip(reversed(theirs), reversed(held_out.where), strict=True))
    text = dict(zip(numbers, texts, strict=True))
    here, there = list(dict.fromkeys(mine)), list(place)
    left, right = [[text[k] for k in here]], [[text[k] for k in there]]
    close = {
        k: place[there[j]]
        for k, j in zip(here, near.near_other(left, right), strict=True)
        if j >= 0
    }
    known = set(here) | {
        k for k, j in zip(there, near.near_other(right, left), strict=True) if j >= 0
    }
    exact = bools([k in place for k in mine])
    nearly = bools([k in close for k in mine]) & ~exact
    found = [
        finding("overlap", rows, exact, like=[place.get(k, "") for k in mine]),
        finding("near_overlap", rows, nearly, like=[close.get(k, "") for k in mine]),
    ]
    return found, bools([k in known for k in theirs])
