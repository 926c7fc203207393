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


def _hypo(reason: str) -> Advice:
    return Advice(
        method="hypo", settings={"beta": 0.1, "weight": 0.005}, reason=reason, cost=_SAMPLES,
        would_change="a label source of its own for fresh samples (then half_and_half); a KL that "
        "target_kl holds already",
    )  # fmt: skip


def _mixed(reason: str) -> Advice:
    return Advice(
        method="half_and_half", settings={"beta": 0.1}, reason=reason, cost=_LABELS,
        would_change="labels dearer than what they bring; a label source that is trained on these "
        "pairs (rm_same)",
    )  # fmt: skip


def _dpo(reason: str) -> Advice:
    return Advice(
        method="dpo", settings={"beta": 0.1}, reason=reason, cost=_OFFLINE,
        would_change="in training: log_ratio_chosen and log_ratio_rejected falling together, or "
        "the KL growing while the accuracy of held-out pairs does not (then hypo)",
    )  # fmt: skip


def _fresh(label_source: str | None) -> bool:
    return label_source in ("true", "rm_other", "judge", "human")


def _stale(chosen: float, label_source: str | None) -> list[Advice]:
    reason = (
        f"the reference reaches the chosen responses' reward in {chosen:.0%} of its samples: the "
        "data are behind it"
    )
    if not _fresh(label_source):
        return [_hypo(f"{reason}; {_SAME}")]
    on_policy = Advice(
        method="on_policy_dpo", settings={"beta": 0.1}, reason=reason, cost=_LABELS,
        would_change="other data, above what the reference says",
    )  # fmt: skip
    return [on_policy, _mixed(reason), _hypo(reason)]


def _narrow(rejected: float, label_source: str | None) -> list[Advice]:
    reason = (
        f"both sides of the pairs are above what the reference says (its samples reach the "
        f"rejected in {rejected:.0%}): they show good against better, and nothing of what it must "
        "stop saying. Plain DPO was worst there, though such data cover the optimum best"
    )
    conservative = Advice(
        method="chi_po", settings={"beta": 0.1}, reason=reason, cost=_OFFLINE,
        would_change="samples of the policy at hand (then hypo)",
    )  # fmt: skip
    first = [_mixed(reason)] if _fresh(label_source) else []
    return [*first, _hypo(reason), conservative]


def _covered(ratio: float, label_source: str | None) -> list[Advice]:
    reason = (
        f"the reference's own differences are {ratio:.2f} times the pairs' where the pairs are "
        "thin: the pairs cover what it does"
    )
    offline = _dpo(reason)
    return [_mixed(reason), offline] if _fresh(label_source) else [offline, _hypo(reason)]


def _uncovered(ratio: float, label_source: str | None) -> list[Advice]:
    reason = (
        f"the reference's own differences are {ratio:.2f} times the pairs' where the pairs are "
        "thin: what a policy does there, the labels do not say"
    )
    first = [_mixed(reason)] if _fresh(label_source) else []
    return [*first, _hypo(reason)]


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
