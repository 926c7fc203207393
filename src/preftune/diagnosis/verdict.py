"""From figures to advice: rules of thumb in plain words, each with what would change it.

The rules are those that a small study suggests (hypo.md's toy problems: six data policies, three
seeds, tiny models). They are not validated, and say so; where the figures cannot be trusted, there
is no advice but what would let one tell.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from preftune.estimators.estimate import Estimate

NARROW, STALE = 0.2, 0.5
"""Of the reference's samples that reach a response's reward."""
WIDE, THIN = 1.3, 1.5
"""Of the ratio of features: up to the one pairs cover what the reference does, from the other on
they do not."""
VALIDATED = False


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


def advise(figures: Mapping[str, Estimate], label_source: str | None) -> list[Advice]:
    """Methods, the best guess first; none where nothing can be told.

    Args:
        label_source: who would judge fresh samples; None: nobody can.
    """
    chosen, rejected = _trusted(figures, "reached_chosen"), _trusted(figures, "reached_rejected")
    ratio = _trusted(figures, "feature_ratio")
    if chosen is not None and rejected is not None:
        if chosen.low > STALE:
            return _stale(chosen.value, label_source)
        if chosen.high < NARROW and rejected.high < NARROW:
            return _narrow(rejected.value, label_source)
    if ratio is not None and ratio.high < THIN:
        return _covered(ratio.value, label_source)
    if ratio is not None and ratio.low > WIDE:
        return _uncovered(ratio.value, label_source)
    return []


@dataclass(frozen=True)
class _Known:
    """A trusted estimate: a rule speaks only where the whole interval is on its side."""

    value: float
    low: float
    high: float


def _trusted(figures: Mapping[str, Estimate], name: str) -> _Known | None:
    x = figures.get(name)
    if x is None or x.value is None or x.low is None or x.high is None:
        return None
    return _Known(x.value, x.low, x.high)


_OFFLINE = "the pairs alone: no samples, no labels"
_SAMPLES = "samples of the policy (two a prompt), no labels"
_LABELS = "samples of the policy, and a label for each"
_SAME = (
    "a reward model trained on these pairs knows no more than they do: in a small study fresh "
    "labels by it gained -.02 +- .13 over offline DPO, true ones +.40 +- .07"
)


_OFFERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "hypo": (
        {"beta": 0.1, "weight": 0.005}, _SAMPLES,
        "a label source of its own for fresh samples (then half_and_half); a KL that target_kl "
        "holds already",
    ),
    "half_and_half": (
        {"beta": 0.1}, _LABELS,
        "labels dearer than what they bring; a label source that is trained on these pairs "
        "(rm_same)",
    ),
    "dpo": (
        {"beta": 0.1}, _OFFLINE,
        "in training: log_ratio_chosen and log_ratio_rejected falling together, or the KL growing "
        "while the accuracy of held-out pairs does not (then hypo)",
    ),
    "on_policy_dpo": ({"beta": 0.1}, _LABELS, "other data, above what the reference says"),
    "chi_po": ({"beta": 0.1}, _OFFLINE, "samples of the policy at hand (then hypo)"),
}  # fmt: skip
"""Settings, what it costs, and what would change the advice."""


def _offers(reason: str, *methods: str) -> list[Advice]:
    found = []
    for method in methods:
        settings, cost, change = _OFFERS[method]
        found.append(
            Advice(method=method, settings=settings, reason=reason, cost=cost, would_change=change)
        )
    return found


def _fresh(label_source: str | None) -> bool:
    return label_source in ("true", "rm_other", "judge", "human")


def _stale(chosen: float, label_source: str | None) -> list[Advice]:
    reason = (
        f"the reference reaches the chosen responses' reward in {chosen:.0%} of its samples: the "
        "data are behind it"
    )
    if not _fresh(label_source):
        return _offers(f"{reason}; {_SAME}", "hypo")
    return _offers(reason, "on_policy_dpo", "half_and_half", "hypo")


def _narrow(rejected: float, label_source: str | None) -> list[Advice]:
    reason = (
        f"both sides of the pairs are above what the reference says (its samples reach the "
        f"rejected in {rejected:.0%}): they show good against better, and nothing of what it must "
        "stop saying. Plain DPO was worst there, though such data cover the optimum best"
    )
    first = ["half_and_half"] if _fresh(label_source) else []
    return _offers(reason, *first, "hypo", "chi_po")


def _covered(ratio: float, label_source: str | None) -> list[Advice]:
    reason = (
        f"the reference's own differences are {ratio:.2f} times the pairs' where the pairs are "
        "thin: the pairs cover what it does"
    )
    methods = ("half_and_half", "dpo") if _fresh(label_source) else ("dpo", "hypo")
    return _offers(reason, *methods)


def _uncovered(ratio: float, label_source: str | None) -> list[Advice]:
    reason = (
        f"the reference's own differences are {ratio:.2f} times the pairs' where the pairs are "
        "thin: what a policy does there, the labels do not say"
    )
    first = ["half_and_half"] if _fresh(label_source) else []
    return _offers(reason, *first, "hypo")


def lines(
    figures: Mapping[str, Estimate], advice: list[Advice], label_source: str | None
) -> list[str]:
    """The verdict in at most ten lines."""
    if not advice:
        said = [f"cannot tell: {_why_not(figures)}"]
    else:
        said = [f"advice (rules of thumb, not validated): {advice[0].method}: {advice[0].reason}"]
        said += [f"  else {a.method} ({a.cost})" for a in advice[1:]]
        said.append(f"  would change it: {advice[0].would_change}")
    if label_source == "rm_same":
        said.append(f"  labels: {_SAME}")
    elif label_source is None:
        said.append("  labels: nobody judges fresh samples; --reward tells who does")
    return said


def _why_not(figures: Mapping[str, Estimate]) -> str:
    found = []
    for name in ("feature_ratio", "reached_chosen", "reached_rejected"):
        known = _trusted(figures, name)
        if known is not None:
            found.append(f"{name} {known.value:.2f} [{known.low:.2f}, {known.high:.2f}]")
        elif name in figures:
            found.append(f"{name}: {figures[name].note}")
    across = "; ".join(found) or "no answers were drawn"
    return f"no rule holds over the whole of the intervals ({across}). More prompts may tell."
