"""From figures, label source and prices to a ranked list of methods, by the shipped rule."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from preftune import loading, methods
from preftune.advising import rule as rules
from preftune.advising import wording
from preftune.advising.rule import GOAL, Racing, Rule, Signs
from preftune.advising.signs import FIGURES, Circumstances, of_figures
from preftune.estimators.estimate import Estimate
from preftune.method import Method
from preftune.sources import Pool

SHIPPED = "rule.json"
REASONS = 3
BEYOND = 0.05
"""Of a sign's range: so far outside it still counts as seen."""
RANKED = 5
"""Rows that are named, the best first."""
KINDS = ("prompts", "completions", "pairs")
"""Of data, each of use where one before it is wanted."""
MOST, STEPS = 2.0, 40
"""A quantity is tried up to a factor of e^2 either way, in so many steps."""


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """The rule that comes with the package, and what is known of it."""

    rule: Rule
    settings: Mapping[str, Mapping[str, Any]]
    """By row: what it was tuned to, `2b` for twice the problem's beta."""
    measured: Mapping[str, Any]
    """Regrets and where they were measured."""
    racing: Racing
    """When rows are tried before one is chosen."""
    fitted_on: tuple[str, ...]
    """Digests of the problems."""
    text_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What rows were tuned to on problems of a language model, if there were any."""


@cache
def shipped() -> Shipped:
    """Read from the package."""
    data = json.loads(resources.files("preftune.advising").joinpath(SHIPPED).read_text())
    return Shipped(
        rule=rules.of_plain(data["rule"]), settings=data["settings"],
        measured=data["measured"], racing=Racing(**data["racing"]),
        fitted_on=tuple(data["fitted_on"]), text_settings=data.get("text_settings", {}),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One method, and why."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str
    cost: str
    would_change: str

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Advised:
    """A ranked list, and how far it may be trusted."""

    ranked: list[Advice]
    worth: Mapping[str, float]
    """Predicted, 0 the reference's, 1 the best row's: of the rows that can be run."""
    loss: float
    """The mean regret of advice where such a source labels (of all, where nobody does), on families
    that the rule had not seen: what the first row may miss of what the best would gain."""
    sure: bool
    """It is within the goal; otherwise the tool cannot tell the first from the second."""
    strange: list[str]
    """Signs that lie beyond all that the rule was fitted on."""


def advise(
    figures: Mapping[str, Estimate], given: Circumstances, by: Shipped | None = None
) -> Advised:
    """Rank the rows that can be run: on such data, and without a reward where nobody judges.

    Args:
        by: a rule in place of the shipped one.
    """
    own = shipped() if by is None else by
    tier = own.rule.tier
    signs: Signs = given.signs() | (of_figures(figures, tier) if tier >= 0 else {})
    worth = {r: w for r, w in own.rule.worth(signs).items() if _can_run(methods.get(r), given)}
    order = list(worth)
    strange = [n for n in _strange(own.rule, signs) if _speaks(n, given)]
    loss = own.measured["mean_regret"]
    if given.label_source is not None:
        loss = own.measured["by_source"].get(given.source, loss)
    ranked = [
        Advice(
            method=row, settings=settings_for(row, given.beta, own),
            reason=_reason(own.rule, row, _rival(order, place), signs, given),
            cost=_cost(methods.get(row), given),
            would_change=_change(own.rule, row, _rival(order, place), signs, given),
        )
        for place, row in enumerate(order[:RANKED])
    ]  # fmt: skip
    return Advised(
        ranked=ranked, worth=worth, loss=loss, sure=loss <= GOAL and not strange, strange=strange
    )


def _can_run(method: Method, given: Circumstances) -> bool:
    judged = given.label_source is not None or "reward" not in method.needs
    return judged and KINDS.index(loading.want_of(method)) <= KINDS.index(given.kind)


def _speaks(sign: str, given: Circumstances) -> bool:
    return given.label_source is not None or not wording.is_of_labels(sign)


def _rival(order: list[str], place: int) -> str:
    """Who a row is compared with: the first with the second, all others with the first."""
    return order[1] if place == 0 else order[0]


def _strange(rule: Rule, signs: Signs) -> list[str]:
    out = []
    for name, low, high in zip(rule.names, rule.low, rule.high, strict=True):
        x, slack = signs.get(name), BEYOND * (high - low)
        outside = x is not None and not low - slack <= x <= high + slack
        if outside and wording.plain_sign(name) == name:
            out.append(name)
    return out


def settings_for(row: str, beta: float, by: Shipped | None = None) -> dict[str, Any]:
    """The row's tuned settings for this beta, its vetted rate as a range, its fixed shares."""
    own = shipped() if by is None else by
    tuned = {k: v for k, v in own.settings[row].items() if k != "learning_rate"}
    found = {
        k: round(float(v[:-1]) * beta, 10) if isinstance(v, str) and v.endswith("b") else v
        for k, v in tuned.items()
    }
    method = methods.get(row)
    rate = method.defaults["learning_rate"]
    fresh = [t for t in method.terms if t.source.on_policy]
    labelled = [t for t in fresh if t.labeller.labelled]
    if fresh:
        found["samples_per_prompt"] = found.get(
            "samples_per_prompt", max(_drawn(t.source) for t in fresh)
        )
    if labelled:
        found["on_policy_share"] = sum(t.share for t in labelled) / sum(
            t.share for t in method.terms if t.labeller.labelled
        )
        found["passes"] = max(t.source.passes for t in labelled)
    return found | {"learning_rate": [rate / 3, rate * 3]}


def _drawn(source: Any) -> int:
    """Answers of the policy to a prompt, where the data's own stand beside them."""
    if isinstance(source, Pool):
        return sum(map(_drawn, source.members))
    return source.num_responses if source.on_policy else 0


def _reason(rule: Rule, row: str, rival: str, signs: Signs, given: Circumstances) -> str:
    """The signs that speak most for a row over its rival; what is one quantity counts as one."""
    worth = rule.worth(signs)
    first = worth[row] >= worth[rival]
    parts: dict[str, float] = {}
    for name, part in rule.between(row, rival, signs).items():
        if not _speaks(name, given):
            continue
        about = "is_" if name.startswith("is_") else wording.plain_sign(name)
        parts[about] = parts.get(about, 0.0) + part
    said = [
        text
        for name, part in sorted(parts.items(), key=lambda x: -abs(x[1]))
        if (part > 0) == first
        and (text := wording.reason(name, signs.get(name), given)) is not None
    ]
    word = "over" if first else "behind"
    return f"{word} {rival}: " + ("; ".join(said[:REASONS]) or "on the whole of what was studied")


def _change(rule: Rule, row: str, rival: str, signs: Signs, given: Circumstances) -> str:
    """The nearest values of single quantities at which the two change places."""
    found = [*_by_circumstances(rule, row, rival, signs, given)]
    for name in (n for tier in FIGURES.values() for n in tier if n in rule.names):
        now = signs.get(name)
        step = None if now is None else rule.turning(row, rival, signs, {name: 1.0})
        if now is None or step is None or math.isclose(step, 0.0):
            continue
        words = wording.WORDS[name]
        far = abs(step) / rule.spread[rule.names.index(name)]
        found.append((far, _turned(words, now, now + step, given)))
    nearest = [text for _, text in sorted(found)[:2]]
    return " or ".join(nearest) or "nothing that was measured, within what the rule was fitted on"


def _by_circumstances(
    rule: Rule, row: str, rival: str, signs: Signs, given: Circumstances
) -> Iterator[tuple[float, str]]:
    """Of each quantity the nearest factor at which the order turns round, all signs that it is in
    moving along; and how far that is, a factor of e counting as one."""

    def leads(**changed: Any) -> bool:
        there = {**signs, **replace(given, **changed).signs()}
        worth = rule.worth(there)
        return worth[row] > worth[rival]

    now = leads()
    for name, words in wording.QUANTITIES.items():
        if name == "label_price" and given.label_source is None:
            continue
        value = getattr(given, name)
        for step in (s * d for d in range(1, STEPS + 1) for s in (1, -1)):
            there = value * math.exp(step * MOST / STEPS)
            there = max(1, round(there)) if name == "pairs" else there
            if value > 0 and leads(**{name: there}) != now:
                yield abs(step) * MOST / STEPS, _turned(words, value, there, given)
                break


def _turned(words: wording.Words, now: float, there: float, given: Circumstances) -> str:
    side, quantity = "below" if there < now else "above", words.quantity.format(kind=given.kind)
    return f"{quantity} {side} {words.value(there)} (now {words.value(now)})"


def _cost(method: Method, given: Circumstances) -> str:
    """What the whole budget goes into, a hundred updates of 64 responses."""
    fresh = any(t.source.on_policy for t in method.terms)
    if not fresh and "reward" not in method.needs:
        return f"the {given.kind} alone: no samples, no labels"
    if "reward" not in method.needs:
        return f"samples of the policy, {given.sample_price:.2g} each; no labels"
    return (
        f"samples ({given.sample_price:.2g} each) and a label for each "
        f"({given.label_price:.2g}), in units of training on a response"
    )
