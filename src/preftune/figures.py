"""Estimators: from numbers a response to figures with intervals. No model is run here.

Shapes: N prompts, K responses a prompt, m reference samples a prompt. Intervals are 95 % bootstrap
intervals over prompts, from one seed of training "this run only"; a comparison of two policies on
the same prompts is paired.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Figure = dict[str, float | None]
"""value, low, high; the ends are None where one prompt gives no interval."""
Figures = dict[str, Figure]
RESAMPLES = 2000
REFITS = 400
"""Resamples of what is fitted anew in each."""
CHUNK = 2**22
"""Numbers held at once while resampling."""
SIZES = (1, 2, 4, 8, 16, 32, 64)
"""n of best-of-n that are shown."""
LEAST_JUDGED = 8
"""Pairs that an agreement is told from."""
LEAST_KL = 0.01
"""Nats below which best-of-n gains nothing that a share could be taken of."""


def _weights(count: int, resamples: int, seed: int, width: int = 1) -> Iterator[np.ndarray]:
    """How often each of `count` prompts is in a resample, [b, count], by chunks."""
    generator = np.random.default_rng(seed)
    size = max(1, CHUNK // (count * width))
    for start in range(0, resamples, size):
        b = min(size, resamples - start)
        picks = generator.integers(0, count, (b, count)) + count * np.arange(b)[:, None]
        yield np.bincount(picks.ravel(), minlength=b * count).reshape(b, count).astype(float)


def _resampled(columns: np.ndarray, seed: int) -> np.ndarray:
    """Means of the columns [N, C] in each resample, [RESAMPLES, C]."""
    count = len(columns)
    return np.concatenate([w @ columns / count for w in _weights(count, RESAMPLES, seed)])


def _figure(value: float, resampled: np.ndarray | None) -> Figure:
    """The value and the middle 95 % of what was resampled, if all of it is finite."""
    if resampled is None or not np.isfinite(resampled).all():
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def _by_prompt(values: Tensor) -> np.ndarray:
    """[N, K] to means [N]."""
    return values.double().mean(-1).cpu().numpy()


def interval(values: Tensor, seed: int = 0) -> Figure:
    """Mean of [N, K] and its 95 % bootstrap interval over the N prompts (None for one prompt)."""
    by_prompt = _by_prompt(values)
    mean = float(by_prompt.mean())
    if len(by_prompt) < 2:
        return {"value": mean, "low": None, "high": None}
    if by_prompt.min() == by_prompt.max():
        return {"value": mean, "low": mean, "high": mean}
    return _figure(mean, _resampled(by_prompt[:, None], seed)[:, 0])


def paired(mine: Tensor, other: Tensor, seed: int = 0) -> Figure:
    """Mean of mine [N, K] - other [N, J] on the same N prompts, resampled together."""
    assert len(mine) == len(other), f"{len(mine)} and {len(other)} prompts cannot be paired"
    return interval((mine.double().mean(-1) - other.double().mean(-1))[:, None], seed)


def ratio(numerator: Tensor, denominator: Tensor, seed: int = 0) -> Figure:
    """Sum of numerator [N] over sum of denominator [N] (> 0), units resampled together."""
    columns = torch.stack([numerator, denominator], -1).double().cpu().numpy()
    value = float(columns[:, 0].sum() / columns[:, 1].sum())
    if len(columns) < 2:
        return {"value": value, "low": None, "high": None}
    means = _resampled(columns, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _figure(value, means[:, 0] / means[:, 1])


def clustered(values: Tensor, cluster: Tensor, keep: Tensor | None = None, seed: int = 0) -> Figure:
    """Mean of values [n] (where `keep`), those of one cluster [n] resampled together."""
    keep = torch.ones_like(values) if keep is None else keep
    count = int(cluster.max()) + 1

    def sums(x: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add(0, cluster, x.double())

    return ratio(sums(values * keep), sums(keep), seed)


def wins(mine: Tensor, other: Tensor) -> Tensor:
    """1, ½ or 0 where mine [...] is the higher, the same or the lower."""
    return 0.5 * (1 + torch.sign(mine.double() - other.double()))


def agreement(by: Sequence[Tensor], gold: Sequence[Tensor], kl: Tensor, seed: int = 0) -> Figures:
    """How often a reward and a gold reward prefer the same one of a policy's answer and another's.

    A reward is right where its makers' data were; a policy that follows it goes elsewhere. So the
    pairs are also told apart by how far the policy's answer is from the reference: `near` and `far`
    are the halves below and above the median.

    Args:
        by, gold: of each reward, mine [N, K] and the other's [N, J] on the same prompts.
        kl: [N, K], nats of my answers from the reference.

    Returns:
        agreement, agreement_near, agreement_far; prompts are resampled. One with fewer than
        `LEAST_JUDGED` pairs that the gold reward tells apart is left out.
    """
    judged, truth = ((m.double()[..., None] - o.double()[:, None]).sign() for m, o in (by, gold))
    right, told = 0.5 * (1 + judged * truth), truth != 0
    prompt = torch.arange(len(kl))[:, None, None].expand(truth.shape)
    far = (kl > kl.median())[..., None].expand(truth.shape)
    halves = {"": torch.ones_like(told), "_near": ~far, "_far": far}
    return {
        f"agreement{name}": clustered(
            right.flatten(), prompt.flatten(), (told & of).flatten(), seed
        )
        for name, of in halves.items()
        if int((told & of).sum()) >= LEAST_JUDGED
    }


def length_controlled(won: Tensor, difference: Tensor, seed: int = 0) -> Figure | None:
    """Win rate at equal length: logit P(win) = a + b x difference, read at difference 0.

    Args:
        won: [N, K], 1, ½ or 0 (or any share).
        difference: [N, K], my tokens less the other's.

    Returns:
        the rate with its interval, the fit redone in each resample; None where all of mine are
        longer, or all shorter: then equal length is nowhere near, and the fit would only guess.
    """
    y, x = won.double().cpu().numpy(), difference.double().cpu().numpy()
    if x.min() > 0 or x.max() < 0:
        return None
    x = x / (np.sqrt((x**2).mean()) or 1.0)
    count, width = y.shape
    value = float(_rates(y.ravel(), x.ravel(), np.ones((1, y.size)))[0])
    if count < 2:
        return {"value": value, "low": None, "high": None}
    refits = [
        _rates(y.ravel(), x.ravel(), w.repeat(width, 1))
        for w in _weights(count, REFITS, seed, width)
    ]
    return _figure(value, np.concatenate(refits))


def _rates(y: np.ndarray, x: np.ndarray, weights: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
    """sigmoid(a) of the logistic fit of y [n] on x [n] under each row of weights [B, n].

    Newton's method; the ridge is on the slope alone, so that perfect separation by length has a
    finite fit and a win rate that length does not explain is left as it is.
    """
    share = weights / weights.sum(1, keepdims=True)
    a, b = np.zeros((2, len(weights), 1))
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(a + b * x, -35, 35)))
        rest, curve = share * (y - p), share * np.maximum(p * (1 - p), 1e-12)
        ga, gb = rest.sum(1), (rest * x).sum(1) - ridge * b[:, 0]
        haa, hab = curve.sum(1), (curve * x).sum(1)
        hbb = (curve * x**2).sum(1) + ridge
        det = haa * hbb - hab**2
        step = np.stack([(hbb * ga - hab * gb) / det, (haa * gb - hab * ga) / det])
        step = step / np.maximum(1, np.abs(step).max(0) / 4)  # an early step may be far too long
        a = np.clip(a + step[0][:, None], -35, 35)
        b = b + step[1][:, None]
        if np.abs(step).max() < 1e-10:
            break
    return 1 / (1 + np.exp(-a[:, 0]))


def distinct(responses: Sequence[Sequence[Sequence[int]]], n: int) -> Figure | None:
    """Share of distinct n-grams among all n-grams of [prompts][responses][tokens].

    It falls as there is more text, so compare it at equal numbers of samples. The interval is a
    jackknife over prompts: a resample repeats prompts, and what is repeated is never distinct.

    Returns:
        None where no response has n tokens.
    """
    by_prompt = [
        Counter(tuple(r[i : i + n]) for r in group for i in range(len(r) - n + 1))
        for group in responses
    ]
    everywhere: Counter[tuple[int, ...]] = Counter()
    for counts in by_prompt:
        everywhere.update(counts)
    total = everywhere.total()
    if total == 0:
        return None
    value = len(everywhere) / total
    without = []
    for counts in by_prompt:
        own = sum(everywhere[gram] == k for gram, k in counts.items())
        rest = total - counts.total()
        without.append((len(everywhere) - own) / rest if rest else math.nan)
    count = len(by_prompt)
    if count < 2 or not np.isfinite(without).all():
        return {"value": value, "low": None, "high": None}
    error = 1.96 * math.sqrt((count - 1) * float(np.var(without)))
    return {"value": value, "low": max(0.0, value - error), "high": min(1.0, value + error)}


def best_of_kl(n: int) -> float:
    """KL of best-of-n to what it draws from: at most log n - (n - 1) / n nats (2401.01879)."""
    return math.log(n) - (n - 1) / n


def expected_best(values: Tensor, by: Tensor, sizes: Sequence[int]) -> Tensor:
    """Expected value of the best by `by` of n samples, without bias, for each n of `sizes`.

    Over all subsets of n of the m samples: the i-th lowest is the best of C(i - 1, n - 1) of the
    C(m, n). Samples that tie by `by` share their values' mean.

    Args:
        values: [N, m], what is expected (another reward, say).
        by: [N, m], what the best is chosen by.

    Returns:
        [N, len(sizes)], float64.
    """
    m = values.shape[-1]
    assert all(1 <= n <= m for n in sizes), f"best of {max(sizes)} needs as many samples, not {m}"
    ordered, order = by.double().sort(dim=-1, stable=True)
    sorted_values = values.double().gather(-1, order)
    tie = torch.cat([torch.zeros(len(by), 1), (ordered[:, 1:] != ordered[:, :-1]).double()], -1)
    group = tie.cumsum(-1).long()
    sums = torch.zeros_like(sorted_values).scatter_add(-1, group, sorted_values)
    counts = torch.zeros_like(sorted_values).scatter_add(-1, group, torch.ones_like(sums))
    shared = (sums / counts.clamp(min=1)).gather(-1, group)
    weights = [[math.comb(i, n - 1) / math.comb(m, n) for n in sizes] for i in range(m)]
    return shared @ torch.tensor(weights, dtype=torch.float64)


def best_of_curve(values: Tensor, by: Tensor, seed: int = 0) -> dict[int, Figure]:
    """Reward of best-of-n, n = 1, 2, 4, ... 64 as far as there are samples: [N, m] each."""
    sizes = [n for n in SIZES if n <= values.shape[-1]]
    expected = expected_best(values, by, sizes)
    return {n: interval(expected[:, i : i + 1], seed) for i, n in enumerate(sizes)}


def best_of_share(
    reward: Tensor, kl: Tensor, values: Tensor, by: Tensor, seed: int = 0
) -> Figure | None:
    """A policy's gain over the reference as a share of best-of-n's at the same KL.

    Best-of-n's KL is taken at its upper bound, so the share is rather too high than too low. Where
    the policy's KL is beyond that of best-of-m, its gain is compared with best-of-m's.

    Args:
        reward, kl: [N, K] of the policy's own samples.
        values, by: [N, m] of the reference's samples to the same prompts, as `expected_best`.

    Returns:
        None where the KL is under `LEAST_KL`, or best-of-n's gain there cannot be told from none.
    """
    bounds = [best_of_kl(n) for n in range(1, values.shape[-1] + 1)]
    curve = expected_best(values, by, range(1, len(bounds) + 1)).numpy()
    columns = np.column_stack([_by_prompt(reward), _by_prompt(kl), curve])

    def share(row: np.ndarray) -> float:
        gain = np.interp(row[1], bounds, row[2:]) - row[2]
        return float((row[0] - row[2]) / gain) if row[1] >= LEAST_KL and gain > 0 else math.nan

    value = share(columns.mean(0))
    if not math.isfinite(value):
        return None
    if len(columns) < 2:
        return {"value": value, "low": None, "high": None}
    resampled = np.array([share(row) for row in _resampled(columns, seed)])
    return _figure(value, resampled) if np.isfinite(resampled).all() else None


def displacement(found: Mapping[str, Figure]) -> str | None:
    """A warning where chosen responses have become less likely than under the reference."""
    chosen = found.get("log_ratio_chosen")
    if chosen is None or chosen["high"] is None or chosen["high"] >= 0:
        return None
    return (
        f"likelihood displacement: log_ratio_chosen is {chosen['value']:.3g} nats (95 % interval "
        f"[{chosen['low']:.3g}, {chosen['high']:.3g}]): chosen responses have lost probability, "
        "and what rejected ones lost may have gone elsewhere (arXiv 2410.08847). If the pairs are "
        "the reference's own samples, this is minus a KL and no failure by itself. Cures: hypo "
        "(KL on fresh samples), dpop or dpo_nll (which hold the chosen log-prob up), on-policy "
        "data (on_policy_dpo), or leaving out the pairs of highest ln-CHES."
    )
