"""Results of a study of advice: advice.json, a page, the rule that would be shipped."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preftune.advising import assess, candidates, page, regret, scene, text_scene
from preftune.advising.advise import shipped
from preftune.advising.assess import ADVICE
from preftune.advising.following import Following
from preftune.advising.problem import Problem
from preftune.advising.regret import Tuned
from preftune.advising.stated import EFFORT, Kind, Stated
from preftune.advising.study import Studied
from preftune.advising.texts import TextProblem
from preftune.errors import UserError
from preftune.runs import RunFolder


def shipped_tuning() -> dict[str, Tuned]:
    """The places of the settings that the shipped rule goes with, by kind of problem.

    Raises:
        UserError: the candidates have other settings since.
    """
    own = shipped()
    found = {"enumerable": _places(own.settings, "enumerable")}
    return found | ({"text": _places(own.text_settings, "text")} if own.text_settings else {})


def _places(each: Mapping[str, Mapping[str, Any]], kind: Kind) -> Tuned:
    found: Tuned = {}
    for row, settings in each.items():
        places = [s.place for s in candidates.settings_of(row, kind) if s.plain() == settings]
        if not places:
            raise UserError(f"advise-study: the shipped rule's {row} is no candidate. Give --fit.")
        found[row] = places[0]
    return found


def conclude(done: Studied, output: Path, *, fit: bool) -> dict[str, Any]:
    """Judge, and write advice.json and advice.html (and rule.json where rules are fitted)."""
    folder = RunFolder(output)
    if fit:
        result = assess.cross_validated(done)
        result["how"] = "Rules and settings were fitted without the family that they are judged on."
        folder.write_json("rule.json", shipping(done, result))
    else:
        result = assess.as_shipped(done)
        known = len(set(digests(done)) & set(shipped().fitted_on))
        result["how"] = "The shipped rule, with the settings that it ships with." + (
            f" It was fitted on {known} of these very problems: its regret on them is too small."
            if known else ""
        )  # fmt: skip
    kinds = sorted({p.kind for p in done.runs.problems})
    result["effort"] = {kind: asdict(EFFORT[kind]) for kind in kinds}
    folder.write_json("advice.json", result)
    page.write_page(output / "advice.html", result)
    return result


def digests(done: Studied) -> list[str]:
    """Of the problems."""
    return [p.digest for p in done.runs.problems]


def shipping(done: Studied, result: Mapping[str, Any]) -> dict[str, Any]:
    """The rule fitted on all problems, with what is known of such rules from families that they
    had not seen."""
    everything = range(len(done.runs.problems))
    gains = done.runs.gains()
    tuned = regret.tune(done.runs, gains, everything)
    policy, _ = assess.fitted(Following(done.runs, done.seen), tuned, everything, gains)
    settings = {
        kind: {r: candidates.settings_of(r, kind)[place].plain() for r, place in own.items()}
        for kind, own in tuned.items()
    }
    keys = ("mean_regret", "best_fixed", "best_fixed_regret", "halving_regret", "problems")
    largest = max(map(_parameters, done.runs.problems))
    measured = {k: result[k] for k in keys} | {
        "parameters": largest,
        "by_source": {s: x[ADVICE] for s, x in result["by_source"].items()},
    }
    return {
        "rule": policy.rule.plain(), "racing": asdict(policy.racing),
        "settings": settings.get("enumerable") or settings["text"],
        **({"text_settings": settings["text"]} if "text" in settings else {}),
        "measured": measured, "fitted_on": digests(done),
    }  # fmt: skip


def _parameters(p: Stated) -> int:
    """Trained numbers of a problem's policies."""
    if isinstance(p, TextProblem):
        return text_scene.parameters(p)
    assert isinstance(p, Problem), "of either kind"
    return scene.parameters(p)


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
    by = ", ".join(f"{s} {x[ADVICE]:.3f}" for s, x in result["by_source"].items())
    kinds = [
        f"{kind} problems ({x['problems']}): " + ", ".join(f"{n} {x[n]:.3f}" for n in table)
        for kind, x in result["by_kind"].items()
    ]
    each = kinds if len(kinds) > 1 else []
    return [first, *(row(n) for n in table), fixed, f"advice by who labels: {by}", *each]
