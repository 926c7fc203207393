"""Results of a study of advice: advice.json, a page, the rule that would be shipped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preftune.advising import assess, candidates, page, regret, scene
from preftune.advising.advise import shipped
from preftune.advising.assess import ADVICE
from preftune.advising.regret import Tuned
from preftune.advising.study import FRESH, SELECTION, Studied
from preftune.errors import UserError
from preftune.runs import RunFolder

GOAL = 0.1
"""Mean regret."""
NEVER = 1e9
"""A lead that no row has."""


def shipped_tuning() -> Tuned:
    """The places of the settings that the shipped rule goes with.

    Raises:
        UserError: the candidates have other settings since.
    """
    found: Tuned = {}
    for row, settings in shipped().settings.items():
        places = [s.place for s in candidates.settings_of(row) if s.plain() == settings]
        if not places:
            raise UserError(f"advise-study: the shipped rule's {row} is no candidate. Give --fit.")
        found[row] = places[0]
    return found


def conclude(done: Studied, output: Path, *, fit: bool) -> dict[str, Any]:
    """Judge, and write advice.json and advice.html (and rule.json where rules are fitted)."""
    folder = RunFolder(output)
    if fit:
        result, inner = assess.cross_validated(done)
        result["how"] = "Rules and settings were fitted without the family that they are judged on."
        result["inner"] = inner
        rule = shipping(done, result)
        result["sure"] = rule["sure"]
        folder.write_json("rule.json", rule)
    else:
        result = assess.as_shipped(done)
        result["how"] = "The shipped rule, with the settings that it ships with."
    result["seeds"] = {"selection": list(SELECTION), "fresh": list(FRESH)}
    folder.write_json("advice.json", result)
    page.write_page(output / "advice.html", result)
    return result


def shipping(done: Studied, result: Mapping[str, Any]) -> dict[str, Any]:
    """The rule fitted on all problems, with what is known of such rules from families that they
    had not seen."""
    everything = range(len(done.runs.problems))
    gains = done.runs.gains(SELECTION)
    tuned = regret.tune(done.runs, gains, everything)
    rule, _ = assess.fitted(done, tuned, everything, gains)
    settings = {row: candidates.settings_of(row)[place].plain() for row, place in tuned.items()}
    keys = ("mean_regret", "best_fixed", "best_fixed_regret", "halving_regret", "problems")
    largest = max(scene.parameters(p) for p in done.runs.problems)
    measured = {k: result[k] for k in keys} | {"parameters": largest}
    return {
        "rule": rule.plain(), "settings": settings, "sure": sure_from(result["each"]),
        "measured": measured,
    }  # fmt: skip


def sure_from(each: Sequence[Mapping[str, Any]]) -> float:
    """The least lead from which on the mean regret, on families not seen, is within the goal;
    `NEVER` where there is none."""
    inside = sorted((x for x in each if x["inside"]), key=lambda x: -x["lead"])
    regrets = np.array([1 - x["advice_gain"] / x["gain"] for x in inside])
    mean = np.cumsum(regrets) / np.arange(1, len(regrets) + 1)
    good = np.nonzero(mean <= GOAL)[0]
    good = good[good >= len(regrets) // 10]  # a tenth of them, lest it be one lucky problem
    return float(inside[int(good.max())]["lead"]) if len(good) else NEVER


def lines(result: Mapping[str, Any]) -> list[str]:
    """For the terminal."""
    table = result["competitors"]

    def row(name: str) -> str:
        x = table[name]
        low, high = x["interval"]
        said = f"{name}: mean regret {x['regret']:.3f} [{low:.3f}, {high:.3f}]"
        if name != ADVICE:
            low, high = x["paired"]
            said += f"; advice less it {x['advice_less_this']:+.3f} [{low:.3f}, {high:.3f}]"
        return said

    first = f"{result['problems']} problems, {len(result['apart'])} apart. {result['how']}"
    fixed = f"best fixed row: {result['best_fixed']}"
    return [first, *(row(n) for n in table), fixed]
