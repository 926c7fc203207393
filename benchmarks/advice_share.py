"""Is an on-policy share that is chosen beforehand better than always one half?

    python benchmarks/advice_share.py PROBLEMS STUDY [--seed-base N]

Reads a finished study (`preftune advise-study --problems PROBLEMS --output STUDY --fit`). Of the
rows dpo, half_and_half and on_policy_dpo (shares 0, 1/2 and 1 of fresh pairs, all else alike), a
rule that has not seen the problem's family picks one, by what is known for nothing; its regret is
compared with that of half_and_half, on fresh seeds, paired. How many problems a difference of 0.05
takes (80 % power, two sides of 5 %) is computed from the selection seeds beforehand.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from preftune.advising import assess, regret, rule, study
from preftune.advising.stated import EFFORT

SHARES = ("dpo", "half_and_half", "on_policy_dpo")
ALWAYS = "half_and_half"
WANTED, RIDGE, TIER = 0.05, 0.1, -1


def main() -> None:
    """Print the comparison, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seed-base", type=int, default=0)
    own = parser.parse_args()
    done = study.run(
        own.problems, own.study, seed_base=own.seed_base, workers=2, tuned=None,
        tick=lambda _: lambda *_: None,
    )  # fmt: skip
    runs, gains = done.runs, done.runs.gains()
    families = [p.family for p in runs.problems]
    tuned = [done.tuned[f] for f in families]
    fresh = [EFFORT[p.kind].fresh for p in runs.problems]
    worth = np.array([[gains[i, r, t[r]] for r in runs.rows] for i, t in enumerate(tuned)])
    best = worth.max(1)
    signs = [assess.signs_of(p, s, TIER) for p, s in zip(runs.problems, done.seen, strict=True)]
    three = [list(runs.rows).index(r) for r in SHARES]
    before, after, kept, picked = [], [], [], []
    for i, family in enumerate(families):
        others = [n for n, f in enumerate(families) if f != family and best[n] > 0.01]
        scaled = worth[others][:, three] / best[others, None]
        fitted = rule.fit([signs[n] for n in others], scaled, SHARES, RIDGE, TIER)
        row = next(iter(fitted.worth(signs[i])))
        top = runs.rows[int(worth[i].argmax())]
        stake = runs.value((i, top, tuned[i][top]), fresh[i]) - runs.start(i)
        if stake.mean() <= regret.OUT * stake.std(ddof=1) / math.sqrt(len(stake)):
            continue
        gap = [
            runs.value((i, r, tuned[i][r]), fresh[i]).mean() for r in (row, ALWAYS)
        ]  # fmt: skip
        after.append((gap[1] - gap[0]) / stake.mean())
        arms = [worth[i, list(runs.rows).index(r)] for r in (row, ALWAYS)]
        before.append((arms[1] - arms[0]) / best[i])
        kept.append(i)
        picked.append(row)
    spread = float(np.std(before, ddof=1))
    low, high = regret.interval(np.array(after), [families[i] for i in kept])
    source = np.array([runs.problems[i].labels.source for i in kept])
    print(json.dumps({
        "problems": len(kept), "needed": math.ceil((2.8 * spread / WANTED) ** 2),
        "regret_less_always_half": float(np.mean(after)), "interval": [low, high],
        "by_source": {s: float(np.array(after)[source == s].mean()) for s in sorted(set(source))},
        "picked": {r: picked.count(r) for r in SHARES},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
