"""Texts of tokens that are alike: equal, nearly equal, or compared in both orders.

Near: texts in parts (prompt, chosen, rejected) are near when every part is, by the Jaccard index
of the sets of its 3-token shingles, at least 0.9. Candidates come from MinHash: 12 bands of 6
minima, shared out over the parts; texts that agree in a whole band are compared exactly, so no
text is called near that is not. Seeds are fixed.

Miss rate: two texts whose parts all have Jaccard index J are missed with probability
(1 - J^6)^12: 1.1e-4 at 0.9, 4e-8 at 0.95. Beyond that, a text is compared with the 8 texts before
it in a bucket, so some are missed where more than 8 texts agree in a band and not as a whole. One
token changed in a part of n tokens leaves an index of about 1 - 6 / n: in parts under 60 tokens
only changes at the ends, or none, are near.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

Text = Sequence[int]

NEAR = 0.9
"""Least Jaccard index of near texts."""
SHINGLE = 3
"""Tokens."""
BANDS = 12
MINIMA = 6
"""A band, all parts together: divisible by 1, 2 and 3 parts."""
LOOK_BACK = 8
"""Texts of a bucket that one is compared with: the time stays linear in the number of texts."""
HOPELESS = 0.5
"""Share of equal minima below which a part is not compared: at an index of 0.9, 24 minima fall
below it once in ten million."""
TEMPLATE = 20
"""Different prompts that begin (or end) alike do so by a template, which is not what they ask."""
_CHUNK = 2048  # texts hashed together
_PAD = -1  # fills texts shorter than a shingle; no token has it


def numbered(keys: Iterable[Hashable]) -> list[int]:
    """A number for each key, equal where the keys are: 0, 1, ... by first appearance."""
    table: dict[Hashable, int] = {}
    return [table.setdefault(key, len(table)) for key in keys]


def firsts(numbers: Sequence[int]) -> list[int]:
    """For each place the first place with the same number."""
    place: dict[int, int] = {}
    return [place.setdefault(number, i) for i, number in enumerate(numbers)]


def near_earlier(parts: Sequence[Sequence[Text]]) -> list[int]:
    """For each text the first earlier one found near it, or -1.

    Args:
        parts: 1, 2 or 3 lists of N; part p of text n is `parts[p][n]`.
    """
    return _nearest(parts, None)


def near_other(parts: Sequence[Sequence[Text]], others: Sequence[Sequence[Text]]) -> list[int]:
    """For each text the first of the others found near it, or -1; arguments as above."""
    return _nearest(parts, others)


def _nearest(parts: Sequence[Sequence[Text]], others: Sequence[Sequence[Text]] | None) -> list[int]:
    if MINIMA % len(parts):
        raise ValueError(f"{len(parts)} parts do not share {MINIMA} minima a band evenly")
    found = [-1] * len(parts[0])
    if not parts[0] or (others is not None and not others[0]):
        return found
    mine = [_minima(texts, seed, MINIMA // len(parts)) for seed, texts in enumerate(parts)]
    theirs = mine
    if others is not None:
        theirs = [_minima(texts, seed, MINIMA // len(parts)) for seed, texts in enumerate(others)]
    pairs = _candidates(_keys(mine), None if others is None else _keys(theirs))
    for a, b in zip(mine, theirs, strict=True):
        pairs = pairs[(a[pairs[:, 0]] == b[pairs[:, 1]]).mean((1, 2)) >= HOPELESS]
    for i, j in pairs.tolist():  # sorted, so the first that is near is the earliest
        if found[i] < 0 and all(
            jaccard(a[i], b[j]) >= NEAR for a, b in zip(parts, others or parts, strict=True)
        ):
            found[i] = j
    return found


def jaccard(a: Text, b: Text) -> float:
    """Jaccard index of the shingles of two texts."""
    x, y = _shingles(a), _shingles(b)
    return len(x & y) / len(x | y)


def _padded(text: Text) -> list[int]:
    return [*text, *[_PAD] * (SHINGLE - len(text))]


def _shingles(text: Text) -> set[tuple[int, ...]]:
    ids = _padded(text)
    return set(zip(*(ids[k:] for k in range(SHINGLE)), strict=False))


def _minima(texts: Sequence[Text], seed: int, width: int) -> np.ndarray:
    """The least hash of each text's shingles under each of the hash functions, [N, BANDS, width].

    The seed is the part's number, so that parts take different functions.
    """
    generator = np.random.default_rng(seed)
    factors = generator.integers(0, 2**63, BANDS * width, dtype=np.uint64) * 2 + 1
    out = np.empty((len(texts), len(factors)), np.uint32)
    for start in range(0, len(texts), _CHUNK):
        hashes, begins = _hashes(texts[start : start + _CHUNK])
        for k, factor in enumerate(factors):
            least = np.minimum.reduceat(_mixed(hashes * factor), begins)
            out[start : start + _CHUNK, k] = least
    return out.reshape(len(texts), BANDS, width)


def _hashes(texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each shingle of each text, one after the other, and where each text begins."""
    padded = [_padded(text) for text in texts]
    sizes = np.array([len(ids) for ids in padded])
    flat = np.fromiter(chain.from_iterable(padded), np.int64, int(sizes.sum())).astype(np.uint64)
    factors = np.random.default_rng(99).integers(1, 2**63, SHINGLE, dtype=np.uint64) * 2 + 1
    last = len(flat) - SHINGLE + 1
    rolled = sum((flat[k : last + k] * f for k, f in enumerate(factors)), np.uint64(0))
    within = np.ones(len(flat), bool)
    for k in range(1, SHINGLE):  # a shingle that would run on into the next text
        within[np.cumsum(sizes) - k] = False
    begins = np.cumsum(sizes - SHINGLE + 1) - (sizes - SHINGLE + 1)
    return np.asarray(rolled)[within[:last]], begins


def _mixed(x: np.ndarray) -> np.ndarray:
    """The upper half of a product, after one more round: low bits alone would keep their order."""
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (x >> np.uint64(32)).astype(np.uint32)


def _keys(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One number a band of all parts' minima, [N, BANDS]."""
    minima = np.concatenate(parts, -1).astype(np.uint64)
    factors = np.random.default_rng(98).integers(1, 2**63, minima.shape[-1], dtype=np.uint64)
    return (minima * (factors * 2 + 1)).sum(-1, dtype=np.uint64)


def _candidates(keys: np.ndarray, others: np.ndarray | None) -> np.ndarray:
    """Pairs (text, other) that agree in a band, sorted, [P, 2]; without others, other < text."""
    theirs = keys if others is None else others
    coded = [np.empty(0, np.int64)]
    for band in range(BANDS):
        order = np.argsort(theirs[:, band], kind="stable")
        ordered, wanted = theirs[order, band], keys[:, band]
        behind = np.searchsorted(ordered, wanted, side="right")
        if others is None:  # stable: what stands before a text in its bucket is earlier
            behind[order] = np.arange(len(order))
        for back in range(1, LOOK_BACK + 1):
            at = np.maximum(behind - back, 0)
            hit = np.flatnonzero((behind >= back) & (ordered[at] == wanted))
            coded.append(hit * len(theirs) + order[at[hit]])
    return np.stack(np.divmod(np.unique(np.concatenate(coded)), len(theirs)), -1)


def trimmed(prompts: Sequence[Text]) -> list[list[int]]:
    """Prompts without what a template put at their beginning and end.

    System prompts are often longer than questions, and would make all questions near. Where less
    than a shingle is left, a number of that prompt's own stands for it: it is near itself only.
    """
    unique = sorted({tuple(p) for p in prompts})
    head = _shared(unique)
    tail = _shared(sorted(p[::-1] for p in unique))
    cut: dict[tuple[int, ...], list[int]] = {}
    for k, p in enumerate(unique):
        rest = list(p[head[p] : max(head[p], len(p) - tail[p[::-1]])])
        cut[p] = rest if len(rest) >= SHINGLE else [_PAD - 1 - k]
    return [cut[tuple(p)] for p in prompts]


def _shared(ordered: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Of each of some sorted texts, how much of its beginning TEMPLATE or more of them have."""
    size = np.zeros(len(ordered), np.int64)
    for i in range(len(ordered) - TEMPLATE + 1):
        group = size[i : i + TEMPLATE]
        np.maximum(group, common(ordered[i], ordered[i + TEMPLATE - 1]), out=group)
    return dict(zip(ordered, size.tolist(), strict=True))


def common(a: Text, b: Text) -> int:
    """Tokens of the common beginning of two texts."""
    for k, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return k
    return min(len(a), len(b))


def minority(keys: Sequence[Hashable], sides: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Of comparisons with a result each: repeated, contradicted, outvoted, each [N] bool.

    Args:
        keys: what is compared; equal keys are one comparison made again.
        sides: its result.

    Returns:
        Whether the comparison was made several times; whether both results occur; and whether
        this is the rarer result (of two equally frequent ones that which came later).
    """
    votes = Counter(zip(keys, sides, strict=True))
    lead: dict[Hashable, bool] = {}
    for key, side in zip(keys, sides, strict=True):
        held = lead.setdefault(key, side)
        if votes[key, not held] > votes[key, held]:
            lead[key] = not held
    made = Counter(keys)
    repeated = torch.tensor([made[key] > 1 for key in keys], dtype=torch.bool)
    both = [votes[key, not side] > 0 for key, side in zip(keys, sides, strict=True)]
    lost = [lead[key] != side for key, side in zip(keys, sides, strict=True)]
    contradicted = torch.tensor(both, dtype=torch.bool)
    return repeated, contradicted, contradicted & torch.tensor(lost, dtype=torch.bool)


def cyclic(edges: Sequence[tuple[Hashable, Hashable]]) -> Tensor:
    """Which edges "first is better than second" stand on a cycle, [E] bool; linear time.

    An edge from a node to itself stands on none here.
    """
    ahead, back = defaultdict(list), defaultdict(list)
    for a, b in edges:
        ahead[a].append(b)
        back[b].append(a)
    # Kosaraju: nodes in the reverse order of being left, then floods against the arrows.
    part: dict[Hashable, int] = {}
    for number, node in enumerate(reversed(_left(list(ahead), ahead))):
        flood = [] if node in part else [node]
        while flood:
            at = flood.pop()
            if at not in part:
                part[at] = number
                flood += back[at]
    return torch.tensor([a != b and part[a] == part[b] for a, b in edges], dtype=torch.bool)


def _left(
    starts: Sequence[Hashable], ahead: Mapping[Hashable, Sequence[Hashable]]
) -> list[Hashable]:
    """Nodes in the order in which a depth-first walk leaves them."""
    seen, out = set(), []
    for start in starts:
        if start in seen:
            continue
        seen.add(start)
        stack = [(start, iter(ahead.get(start, ())))]
        while stack:
            new = next((node for node in stack[-1][1] if node not in seen), None)
            if new is None:
                out.append(stack.pop()[0])
            else:
                seen.add(new)
                stack.append((new, iter(ahead.get(new, ()))))
    return out
