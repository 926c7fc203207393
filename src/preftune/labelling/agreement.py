"""What judgements say together: who wins, and how far annotators agree."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from preftune.figures import Figure, interval
from preftune.labelling.book import Judgement, Pair


def by_pair(judged: Iterable[Judgement]) -> dict[int, list[Judgement]]:
    """Judgements of each pair, skips left out."""
    found: dict[int, list[Judgement]] = defaultdict(list)
    for said in judged:
        if said.choice != "skip":
            found[said.pair].append(said)
    return dict(found)


def share_alike(judged: Iterable[Judgement]) -> Figure | None:
    """Share of pairs of annotators who say the same of a pair of responses, mean over the pairs
    that two or more have judged, with a 95 % interval; None where there are fewer than two."""
    shares = []
    for said in by_pair(judged).values():
        counts = Counter(s.choice for s in said)
        n = len(said)
        if n > 1:
            shares.append(sum(c * (c - 1) for c in counts.values()) / (n * (n - 1)))
    return interval(torch.tensor(shares)[:, None]) if len(shares) > 1 else None


def alpha(judged: Iterable[Judgement]) -> float | None:
    """Krippendorff's alpha for nominal labels: 1 is full agreement, 0 that of chance.

    None where nobody differs in what they say at all, or nothing was judged twice.
    """
    units = [[s.choice for s in said] for said in by_pair(judged).values() if len(said) > 1]
    totals = Counter(choice for unit in units for choice in unit)
    n = sum(totals.values())
    expected = n * n - sum(c * c for c in totals.values())
    if not expected:
        return None
    observed = sum(
        (len(unit) ** 2 - sum(c * c for c in Counter(unit).values())) / (len(unit) - 1)
        for unit in units
    )
    return 1 - (n - 1) * observed / expected


def win_rate(pairs: Mapping[int, Pair], judged: Iterable[Judgement], writer: str) -> Figure | None:
    """How often the responses of one of two models win (ties half), mean over prompts with a 95 %
    interval over them; None where nothing was judged."""
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for of, said in by_pair(judged).items():
        pair = pairs[of]
        for s in said:
            own = pair.writers.index(writer)
            won = 0.5 if s.choice == "tie" else float((s.choice == "second") == bool(own))
            by_prompt[pair.row].append(won)
    if not by_prompt:
        return None
    return interval(torch.tensor([sum(w) / len(w) for w in by_prompt.values()])[:, None])


def summary(
    pairs: Mapping[int, Pair], judged: Sequence[Judgement], writers: Sequence[str]
) -> dict[str, Any]:
    """Everything that is told at the end of a session."""
    choices = Counter(s.choice for s in judged)
    left = [float((s.choice == "second") == bool(s.left)) for s in judged if s.choice in _DECIDED]
    out: dict[str, Any] = {
        "judgements": len(judged), "pairs": len({s.pair for s in judged}),
        "preferences": choices["first"] + choices["second"], "ties": choices["tie"],
        "skipped": choices["skip"], "annotators": dict(Counter(s.annotator for s in judged)),
        "left_chosen": interval(torch.tensor(left)[:, None]) if len(left) > 1 else None,
        "agreement": share_alike(judged), "alpha": alpha(judged),
    }  # fmt: skip
    if len(writers) == 2:
        out["win_rate"] = {writers[0]: win_rate(pairs, judged, writers[0])}
    return out


_DECIDED = ("first", "second")
