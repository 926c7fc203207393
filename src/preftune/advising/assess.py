"""What advice is worth: rules judged on families they have not seen, beside competitors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from preftune.advising import regret, rule
from preftune.advising.advise import shipped
from preftune.advising.looking import Seen, model_price
from preftune.advising.problem import Problem
from preftune.advising.regret import Judged, Runs, Tuned
from preftune.advising.rule import Rule, Signs
from preftune.advising.signs import of_figures
from preftune.advising.study import FRESH, SELECTION, Studied, circumstances
from preftune.errors import UserError

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
TIERS = (-1, 0, 1, 2)
"""Of the diagnosis that a rule may ask for; -1: none."""
ADVICE, HALVING, RANDOM = "advice", "successive halving", "random row"
Choice = Callable[[int], tuple[str, float]]
"""Of a problem to a row, and what finding it out cost."""


def signs_of(p: Problem, seen: Seen, tier: int) -> dict[str, float | None]:
    """What a rule of that tier goes by."""
    return circumstances(p).signs() | (of_figures(seen.figures, tier) if tier >= 0 else {})


def looked(runs: Runs, problem: int, seen: Seen, tier: int, row: str, place: int) -> float:
    """What the diagnosis cost; a reward model that the row trains anyway is not paid twice."""
    if tier < 0:
        return 0.0
    own = runs.curves[problem, row, place]
    judged = next(iter(own.values()))[-1]["judged"] > 0
    p = runs.problems[problem]
    shared = judged and p.labels.source == "rm_same"
    return seen.price[tier] + (model_price(p) if tier == 2 and not shared else 0.0)


def worths(
    runs: Runs, gains: Mapping[regret.ArmKey, float], tuned: Tuned, inside: Sequence[int]
) -> tuple[np.ndarray, list[int]]:
    """Each row's gain as a share of the best row's, [n, rows], of problems where something is to
    be gained; and which these are."""
    kept, out = [], []
    for i in inside:
        own = np.array([gains[i, r, tuned[r]] for r in runs.rows])
        if own.max() > 0.01:
            kept.append(i)
            out.append(own / own.max())
    return np.array(out), kept


def fitted(studied: Studied, tuned: Tuned, inside: Sequence[int],
           gains: Mapping[regret.ArmKey, float]) -> tuple[Rule, dict[str, float]]:  # fmt: skip
    """A rule from these problems. Its ridge and its tier are chosen by leaving out one family of
    them at a time; what a tier costs counts.

    Returns:
        the rule, and the regret of every choice by name.
    """
    runs = studied.runs
    families = sorted({runs.problems[i].family for i in inside})
    tried: dict[tuple[int, float], list[float]] = {(t, x): [] for t in TIERS for x in RIDGES}
    worth, kept = worths(runs, gains, tuned, inside)
    best = [max(gains[i, r, tuned[r]] for r in runs.rows) for i in kept]
    for left_out in families:
        here = [n for n, i in enumerate(kept) if runs.problems[i].family == left_out]
        rest = [n for n in range(len(kept)) if n not in here]
        for tier in TIERS:
            signs = [signs_of(runs.problems[i], studied.seen[i], tier) for i in kept]
            for ridge in RIDGES:
                found = rule.fit([signs[n] for n in rest], worth[rest], runs.rows, ridge, tier)
                tried[tier, ridge] += [
                    _loss(studied, found, signs[n], best[n], kept[n], tuned) for n in here
                ]
    mean = {k: float(np.mean(v)) for k, v in tried.items()}
    tier, ridge = min(mean, key=lambda k: mean[k])
    signs = [signs_of(runs.problems[i], studied.seen[i], tier) for i in kept]
    found = rule.fit(signs, worth, runs.rows, ridge, tier)
    return found, {f"tier {t}, ridge {x:g}": v for (t, x), v in mean.items()}


def _loss(
    studied: Studied, found: Rule, signs: Signs, best: float, problem: int, tuned: Tuned
) -> float:
    """Regret on selection seeds, the diagnosis paid; `best` is the best row's gain there."""
    row = next(iter(found.worth(signs)))
    runs = studied.runs
    paid = looked(runs, problem, studied.seen[problem], found.tier, row, tuned[row])
    gain = runs.value((problem, row, tuned[row]), SELECTION, paid).mean() - runs.start(problem)
    return 1.0 - max(float(gain) / best, rule.WORST)


def judged(
    studied: Studied, tuned_of: Callable[[int], Tuned], advise: Choice,
    gains: Mapping[regret.ArmKey, float],
) -> list[Judged]:  # fmt: skip
    """Every problem on fresh seeds: rows, the advice, the competitors."""
    runs, out = studied.runs, []
    for i in range(len(runs.problems)):
        tuned, ref = tuned_of(i), runs.start(i)
        best = max(runs.rows, key=lambda r: gains[i, r, tuned[r]])
        own = runs.value((i, best, tuned[best]), FRESH) - ref
        others = {r: float(runs.value((i, r, tuned[r]), FRESH).mean()) - ref for r in runs.rows}
        row, paid = advise(i)
        others[ADVICE] = float(runs.value((i, row, tuned[row]), FRESH, paid).mean()) - ref
        rng = np.random.default_rng([7, i])
        halved = [regret.halving(runs, i, tuned, s, rng)[1] - ref for s in FRESH]
        others[HALVING] = float(np.mean(halved))
        others[RANDOM] = float(np.mean([others[r] for r in runs.rows]))
        error = float(own.std(ddof=1) / np.sqrt(len(own)))
        out.append(Judged(
            problem=i, best=best, gain=float(own.mean()), error=error, others=others,
        ))  # fmt: skip
    return out


def summary(
    studied: Studied, found: Sequence[Judged], advised: Mapping[int, tuple[str, float]]
) -> dict[str, Any]:
    """What docs/results/advice.json holds."""
    problems = studied.runs.problems
    inside = [j for j in found if j.inside]
    groups = [problems[j.problem].family for j in inside]
    if not inside:
        raise UserError(
            "advise-study: in no problem does the best row gain more than three standard errors, "
            "so that there is nothing to regret. Give problems with larger budgets, or more."
        )

    def mean(name: str, of: Sequence[Judged] = inside) -> float:
        return float(np.mean([j.regret(name) for j in of]))

    fixed = min(studied.runs.rows, key=mean)
    names = {ADVICE: ADVICE, "best fixed": fixed, "half_and_half": "half_and_half",
             HALVING: HALVING, RANDOM: RANDOM}  # fmt: skip
    table = {}
    for name, column in names.items():
        own = np.array([j.regret(column) for j in inside])
        less = np.array([j.regret(ADVICE) for j in inside]) - own
        raw = np.array([j.others[column] for j in inside])
        table[name] = {
            "regret": float(own.mean()), "interval": regret.interval(own, groups),
            "advice_less_this": float(less.mean()), "paired": regret.interval(less, groups),
            "gain": float(raw.mean()), "median": float(np.median(own)),
        }  # fmt: skip
    return {
        "mean_regret": table[ADVICE]["regret"],
        "best_fixed": fixed, "best_fixed_regret": table["best fixed"]["regret"],
        "halving_regret": table[HALVING]["regret"], "random_regret": table[RANDOM]["regret"],
        "problems": len(inside),
        "apart": [problems[j.problem].name for j in found if not j.inside],
        "competitors": table,
        "rows": {r: mean(r) for r in studied.runs.rows},
        "by_family": {
            f: {n: mean(c, [j for j in inside if problems[j.problem].family == f])
                for n, c in names.items()}
            | {"problems": groups.count(f)}
            for f in sorted(set(groups))
        },
        "each": [
            {"problem": problems[j.problem].name, "best": j.best, "advised": advised[j.problem][0],
             "lead": advised[j.problem][1],
             "gain": j.gain, "error": j.error, "inside": j.inside,
             "advice_gain": j.others[ADVICE], "halving_gain": j.others[HALVING],
             "fixed_gain": j.others[fixed]}
            for j in found
        ],
    }  # fmt: skip


def correlations(studied: Studied, found: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """Rank correlation of every sign with every row's share of the best gain, over problems: what a
    figure says by itself."""
    runs = studied.runs
    inside = [j for j in found if j.inside]
    signs = [signs_of(runs.problems[j.problem], studied.seen[j.problem], 2) for j in inside]
    shares = {r: np.array([1.0 - j.regret(r) for j in inside]) for r in runs.rows}
    out: dict[str, dict[str, float]] = {}
    for name in signs[0]:
        x = np.array([np.nan if s[name] is None else s[name] for s in signs], dtype=float)
        known = ~np.isnan(x)
        if known.sum() > 2 and x[known].std() > 0:
            out[name] = {r: _spearman(x[known], y[known]) for r, y in shares.items()}
    return out


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    def ranks(v: np.ndarray) -> np.ndarray:
        _, place, count = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    a, b = ranks(x), ranks(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def cross_validated(studied: Studied) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The regret of rules that have not seen the family they advise on.

    Returns:
        the summary, and by family how the choices of tier and ridge did inside.
    """
    runs = studied.runs
    gains = runs.gains(SELECTION)
    inner, rules = {}, {}
    for family, tuned in studied.tuned.items():
        inside = [i for i, p in enumerate(runs.problems) if p.family != family]
        rules[family], inner[family] = fitted(studied, tuned, inside, gains)
    out = _measured(studied, lambda family: rules[family], gains)
    out["rules"] = {f: {"tier": r.tier} for f, r in rules.items()}
    return out, inner


def as_shipped(studied: Studied) -> dict[str, Any]:
    """The regret of the rule that comes with the package."""
    own = shipped().rule
    return _measured(studied, lambda family: own, studied.runs.gains(SELECTION))


def _measured(
    studied: Studied, rule_of: Callable[[str], Rule], gains: Mapping[regret.ArmKey, float]
) -> dict[str, Any]:
    """The summary of the advice of a family's rule."""
    runs = studied.runs
    advised: dict[int, tuple[str, float]] = {}

    def advise(i: int) -> tuple[str, float]:
        p = runs.problems[i]
        own, tuned = rule_of(p.family), studied.tuned[p.family]
        worth = own.worth(signs_of(p, studied.seen[i], own.tier))
        row, second = list(worth)[:2]
        advised[i] = row, worth[row] - worth[second]
        return row, looked(runs, i, studied.seen[i], own.tier, row, tuned[row])

    found = judged(studied, lambda i: studied.tuned[runs.problems[i].family], advise, gains)
    return summary(studied, found, advised) | {"correlations": correlations(studied, found)}
