"""What advice is worth: rules judged on families they have not seen, beside competitors."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from preftune.advising import regret, rule
from preftune.advising.advise import shipped
from preftune.advising.following import RACINGS, Following, Outcome
from preftune.advising.looking import Seen
from preftune.advising.regret import ByKind, Judged, Runs, Tuned
from preftune.advising.rule import Racing, Rule
from preftune.advising.signs import of_figures
from preftune.advising.stated import Stated, effort
from preftune.advising.study import Studied, circumstances
from preftune.advising.trying import halving
from preftune.errors import UserError

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
TIERS = (-1, 0, 1, 2)
"""Of the diagnosis that a rule may ask for; -1: none."""
ADVICE, HALVING, RANDOM = "advice", "successive halving", "random row"


def signs_of(p: Stated, seen: Seen, tier: int) -> dict[str, float | None]:
    """What a rule of that tier goes by."""
    return circumstances(p).signs() | (of_figures(seen.figures, tier) if tier >= 0 else {})


def worths(
    runs: Runs, gains: Mapping[regret.ArmKey, float], tuned: ByKind, inside: Sequence[int]
) -> tuple[np.ndarray, list[int]]:
    """Each row's gain as a share of the best row's, [n, rows], of problems where something is to
    be gained; and which these are."""
    kept, out = [], []
    for i in inside:
        settings = tuned[runs.problems[i].kind]
        own = np.array([gains[i, r, settings[r]] for r in runs.rows])
        if own.max() > 0.01:
            kept.append(i)
            out.append(own / own.max())
    return np.array(out), kept


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How to advise: by what rule, and when to try rows before choosing."""

    rule: Rule
    racing: Racing

    def follow(self, by: Following, p: Stated, i: int, tuned: Tuned,
               seeds: Sequence[int]) -> tuple[Outcome, str, float]:  # fmt: skip
        """What it leads to, the row that it names first and by how much this leads."""
        worth = self.rule.worth(signs_of(p, by.seen[i], self.rule.tier))
        first, second = list(worth)[:2]
        found = by.outcome(i, worth, self.rule.tier, self.racing, tuned, seeds)
        return found, first, worth[first] - worth[second]


def fitted(by: Following, tuned: ByKind, inside: Sequence[int],
           gains: Mapping[regret.ArmKey, float]) -> tuple[Policy, dict[str, float]]:  # fmt: skip
    """A policy from these problems. Its ridge, its tier and its racing are chosen by leaving out
    one family of them at a time; what a tier costs counts.

    Returns:
        the policy, and the regret of every choice by name.
    """
    runs = by.runs
    worth, kept = worths(runs, gains, tuned, inside)
    families = sorted({runs.problems[i].family for i in kept})
    own = [tuned[runs.problems[i].kind] for i in kept]
    best = [max(gains[i, r, o[r]] for r in runs.rows) for i, o in zip(kept, own, strict=True)]
    if len(families) < 2:
        raise UserError(
            "advise-study: there are not two families in which something is to be gained, so that "
            "no rule can be fitted. Give problems with larger budgets, or more."
        )
    by_tier = {t: [signs_of(runs.problems[i], by.seen[i], t) for i in kept] for t in TIERS}
    tried: dict[tuple[int, float, Racing], list[float]] = {}
    for left_out in families:
        here = [n for n, i in enumerate(kept) if runs.problems[i].family == left_out]
        rest = [n for n in range(len(kept)) if n not in here]
        for tier, signs in by_tier.items():
            for ridge in RIDGES:
                found = rule.fit([signs[n] for n in rest], worth[rest], runs.rows, ridge, tier)
                for n in here:
                    expected = found.worth(signs[n])
                    for racing in RACINGS:
                        seeds = effort(runs.problems[kept[n]]).selection
                        out = by.outcome(kept[n], expected, tier, racing, own[n], seeds)
                        gain = (out.value - runs.start(kept[n])) / best[n]
                        loss = 1.0 - max(gain, rule.WORST)
                        tried.setdefault((tier, ridge, racing), []).append(loss)
    mean = {k: float(np.mean(v)) for k, v in tried.items()}
    tier, ridge, racing = min(mean, key=lambda k: mean[k])
    found = rule.fit(by_tier[tier], worth, runs.rows, ridge, tier)
    names = {
        f"tier {t}, ridge {x:g}, {r.rows} tried below {r.below:g}": v
        for (t, x, r), v in mean.items()
    }
    return Policy(rule=found, racing=racing), names


def judged(
    by: Following, tuned_of: Callable[[Stated], Tuned], policy_of: Callable[[Stated], Policy],
    gains: Mapping[regret.ArmKey, float],
) -> list[Judged]:  # fmt: skip
    """Every problem on fresh seeds: rows, the advice, the competitors."""
    runs, out = by.runs, []
    for i, p in enumerate(runs.problems):
        tuned, ref, fresh = tuned_of(p), runs.start(i), effort(p).fresh
        best = max(runs.rows, key=lambda r: gains[i, r, tuned[r]])
        own = runs.value((i, best, tuned[best]), fresh) - ref
        others = {r: float(runs.value((i, r, tuned[r]), fresh).mean()) - ref for r in runs.rows}
        found, first, lead = policy_of(p).follow(by, p, i, tuned, fresh)
        others[ADVICE] = found.value - ref
        rng = np.random.default_rng([7, i])
        halved = [halving(runs, i, tuned, s, rng)[1] - ref for s in fresh]
        others[HALVING] = float(np.mean(halved))
        others[RANDOM] = float(np.mean([others[r] for r in runs.rows]))
        error = float(own.std(ddof=1) / np.sqrt(len(own)))
        out.append(Judged(
            problem=i, best=best, gain=float(own.mean()), error=error, others=others,
            advised=first, lead=lead, raced=found.raced,
        ))  # fmt: skip
    return out


def summary(runs: Runs, found: Sequence[Judged]) -> dict[str, Any]:
    """What docs/results/advice.json holds."""
    problems = runs.problems
    inside = [j for j in found if j.inside]
    families = [problems[j.problem].family for j in inside]
    if not inside:
        raise UserError(
            "advise-study: in no problem does the best row gain more than three standard errors, "
            "so that there is nothing to regret. Give problems with larger budgets, or more."
        )

    def mean(name: str, of: Sequence[Judged] = inside) -> float:
        return float(np.mean([j.regret(name) for j in of]))

    fixed = min(runs.rows, key=mean)
    names = {ADVICE: ADVICE, "best fixed": fixed, "half_and_half": "half_and_half",
             HALVING: HALVING, RANDOM: RANDOM}  # fmt: skip
    table = {}
    for name, column in names.items():
        own = np.array([j.regret(column) for j in inside])
        less = np.array([j.regret(ADVICE) for j in inside]) - own
        raw = np.array([j.others[column] for j in inside])
        table[name] = {
            "regret": float(own.mean()), "interval": regret.interval(own, families),
            "advice_less_this": float(less.mean()), "paired": regret.interval(less, families),
            "gain": float(raw.mean()), "median": float(np.median(own)),
        }  # fmt: skip

    def split(kind: Callable[[Stated], str]) -> dict[str, dict[str, float]]:
        groups: dict[str, list[Judged]] = {}
        for j in inside:
            groups.setdefault(kind(problems[j.problem]), []).append(j)
        return {
            g: {n: mean(c, of) for n, c in names.items()} | {"problems": len(of)}
            for g, of in sorted(groups.items())
        }

    return {
        "mean_regret": table[ADVICE]["regret"],
        "best_fixed": fixed, "best_fixed_regret": table["best fixed"]["regret"],
        "halving_regret": table[HALVING]["regret"], "random_regret": table[RANDOM]["regret"],
        "problems": len(inside),
        "apart": [problems[j.problem].name for j in found if not j.inside],
        "competitors": table,
        "rows": {r: mean(r) for r in runs.rows},
        "by_family": split(lambda p: p.family),
        "by_source": split(lambda p: p.labels.source),
        "by_kind": split(lambda p: p.kind),
        "each": [
            {"problem": problems[j.problem].name, "best": j.best, "advised": j.advised,
             "lead": j.lead, "raced": j.raced,
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


def left_out(
    studied: Studied, by: Following, kind: Callable[[Stated], str]
) -> tuple[list[Judged], dict[str, Policy], dict[str, dict[str, float]]]:
    """Problems judged by rules that have not seen their kind (with settings tuned on other families
    in any case).

    Returns:
        the problems, each kind's policy, and by kind how the choices inside did.
    """
    runs, gains = studied.runs, studied.runs.gains()
    policies, inner = {}, {}
    for name in sorted({kind(p) for p in runs.problems}):
        inside = [i for i, p in enumerate(runs.problems) if kind(p) != name]
        tuned = regret.tune(runs, gains, inside)
        policies[name], inner[name] = fitted(by, tuned, inside, gains)
    found = judged(by, lambda p: studied.tuned[p.family], lambda p: policies[kind(p)], gains)
    return found, policies, inner


OTHER_KINDS: Mapping[str, Callable[[Stated], str]] = {
    "label source": lambda p: p.labels.source,
    "price of a label": lambda p: f"{p.prices.label:g}",
    "kind of problem": lambda p: p.kind,
}
"""That are left out beside families: what a rule goes by is drawn alike in all of these."""


def cross_validated(studied: Studied) -> dict[str, Any]:
    """The regret on families not seen; beside it on other kinds not seen, where enough is left to
    learn from."""
    by, runs = Following(studied.runs, studied.seen), studied.runs
    found, policies, inner = left_out(studied, by, lambda p: p.family)
    out = summary(runs, found) | {"correlations": correlations(studied, found)}
    out["rules"] = {
        f: {"tier": x.rule.tier, "tried": x.racing.rows, "below": x.racing.below}
        for f, x in policies.items()
    }
    out["inner"] = inner
    out["other_kinds"] = {}
    keys = ("mean_regret", "best_fixed_regret", "halving_regret", "problems", "by_source",
            "by_kind")  # fmt: skip
    for name, kind in OTHER_KINDS.items():
        if len({kind(p) for p in runs.problems}) > 1:
            with suppress(UserError):
                other = summary(runs, left_out(studied, by, kind)[0])
                out["other_kinds"][name] = {k: other[k] for k in keys}
    return out


def as_shipped(studied: Studied) -> dict[str, Any]:
    """The regret of the rule that comes with the package."""
    own = shipped()
    policy = Policy(rule=own.rule, racing=own.racing)
    found = judged(
        Following(studied.runs, studied.seen), lambda p: studied.tuned[p.family],
        lambda _: policy, studied.runs.gains(),
    )  # fmt: skip
    return summary(studied.runs, found) | {"correlations": correlations(studied, found)}
