"""The verdict of a diagnosis: the shipped rule's ranking, in at most ten lines."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from preftune.advising.advise import Advised, shipped
from preftune.advising.advise import advise as ranked
from preftune.advising.rule import GOAL
from preftune.advising.signs import Circumstances
from preftune.advising.wording import WORDS
from preftune.diagnosis import cost
from preftune.diagnosis.job import Diagnosis

BETA = 0.1
EPOCHS = 3
LABEL_PRICES = {"human": 30.0, "judge": 10.0}
"""Where the user gives none: a person's or a large model's verdict against training on a response;
of a reward model or a function, a forward pass."""
LABEL_PRICE = 0.3
SAME = (
    "labels: a reward model trained on these very pairs knows no more than they do; fresh labels "
    "by it bring far less than a source of its own"
)
NOBODY = "labels: nobody judges fresh samples; --reward tells who does"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is advised, and under which circumstances."""

    advised: Advised
    given: Circumstances

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "advice": [a.as_json() for a in self.advised.ranked],
            "worth": dict(self.advised.worth),
            "sure": self.advised.sure,
            "expected_regret": self.advised.loss,
            "beyond_the_study": list(self.advised.strange),
            "circumstances": vars(self.given),
            "validated": dict(shipped().measured),
        }


def advise(
    found: Diagnosis, beta: float | None, label_price: float | None, spend: float | None
) -> Verdict:
    """The rule's ranking for a diagnosis.

    Args:
        beta: what a nat of KL costs; None: the table's usual one.
        label_price, spend: in units of training on one response; None: see above.

    Raises:
        UserError: a price below 0, nothing to spend, or no finite number.
    """
    cost.check_prices(spend=spend, label_price=label_price)
    facts = found.facts
    source = facts["label_source"]
    price = LABEL_PRICES.get(source, LABEL_PRICE) if label_price is None else label_price
    rows = max(1, int(facts["pairs"]))
    given = Circumstances(
        label_source=source, label_price=price, sample_price=float(facts["sample_price"]),
        beta=BETA if beta is None else beta, pairs=rows, budget=1.0, kind=facts["kind"],
    )  # fmt: skip
    whole = float(EPOCHS * given.responses * rows) if spend is None else spend
    given = replace(given, budget=whole)
    return Verdict(advised=ranked(found.figures, given), given=given)


def lines(verdict: Verdict) -> list[str]:
    """At most nine; the first is the verdict, all others are indented."""
    first, second, *rest = verdict.advised.ranked
    own = verdict.advised
    if own.sure:
        said = [f"advice: {first.method}, {first.reason}"]
    else:
        quantities = [WORDS[name].quantity for name in own.strange]
        beyond = ", ".join(quantities).format(kind=verdict.given.kind)
        why = f"beyond what was studied: {beyond}" if beyond else _missed(verdict)
        said = [
            f"cannot tell {first.method} from {second.method} ({why})",
            f"  {first.method}, {first.reason}",
        ]
    said += [
        f"  settings: {_settings(first.settings)}",
        f"  costs: {first.cost}",
        f"  would change it: {first.would_change}",
        f"  runner-up {second.method}, {second.reason}",
    ]
    if rest:
        said.append(f"  then {', '.join(a.method for a in rest)}")
    if verdict.given.label_source in (None, "rm_same"):
        said.append(f"  {SAME if verdict.given.label_source else NOBODY}")
    return said


def _missed(verdict: Verdict) -> str:
    whose = "advice" if verdict.given.label_source is None else "advice for such labels"
    return (
        f"{whose} has missed {verdict.advised.loss:.2f} of what could be gained, where the goal "
        f"is {GOAL:.2f}"
    )


def validated() -> str:
    """Where the rule was measured, in words."""
    measured = shipped().measured
    by = ", ".join(f"{source} {x:.2f}" for source, x in measured["by_source"].items())
    return (
        f"The rule: mean regret {measured['mean_regret']:.2f} on {measured['problems']} problems "
        f"of families it had not seen ({by}; best fixed row, {measured['best_fixed']}: "
        f"{measured['best_fixed_regret']:.2f}); validated up to models of "
        f"{measured['parameters']:,} parameters"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return " to ".join(f"{v:.2g}" for v in value)
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{k} {text(v)}" for k, v in settings.items())
