"""The numbers that a rule goes by: what is known for nothing, and figures of a diagnosis by tier.

Each is finite for any problem; a figure that cannot be told takes the value of its bound, or the
mean of the problems that the rule was fitted on.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from preftune.estimators.estimate import Estimate

SOURCES = ("rm_same", "rm_other", "human")


def model_price(source: str, pairs: int) -> float:
    """Of the reward model that labels where it is one of these pairs: a pass over them."""
    return 2.0 * pairs if source == "rm_same" else 0.0


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a user knows before anything is measured. Prices are of one response, in units of one
    response's forward and backward pass."""

    label_source: str | None
    """None: nobody judges fresh samples."""
    label_price: float
    sample_price: float
    beta: float
    """What a nat of KL costs in reward, where a Bradley-Terry preference is worth a nat."""
    pairs: int
    """Rows of the data, of whichever kind."""
    budget: float
    kind: str = "pairs"
    """Of the rows: pairs or completions."""

    @property
    def source(self) -> str:
        """As the rule knows it: a judge that is asked at a price counts as a human, a true reward
        as a model of its own, nobody as a model of these pairs, whose labels bring least."""
        told = self.label_source or "rm_same"
        return {"judge": "human", "true": "rm_other"}.get(told, told)

    @property
    def responses(self) -> int:
        """Of a row."""
        return 2 if self.kind == "pairs" else 1

    def signs(self) -> dict[str, float]:
        """By name."""
        known = {f"is_{s}": float(self.source == s) for s in SOURCES}
        # a reward model of the pairs is trained on them first
        left = max(self.budget - model_price(self.source, self.pairs), 0.1 * self.budget)
        fresh = math.log(left / (1 + self.sample_price + self.label_price))
        reads = math.log(self.budget / (self.responses * self.pairs))
        plain = {
            "log_fresh": fresh, "log_pairs": math.log(self.pairs), "log_epochs": reads,
            "log_beta": math.log(self.beta), "log_sample_price": math.log(self.sample_price + 0.1),
        }  # fmt: skip
        crossed = {
            "human_log_fresh": known["is_human"] * fresh,
            "rm_same_log_pairs": known["is_rm_same"] * plain["log_pairs"],
            "rm_same_log_beta": known["is_rm_same"] * plain["log_beta"],
            "human_log_beta": known["is_human"] * plain["log_beta"],
        }
        return known | plain | crossed


FIGURES: dict[int, tuple[str, ...]] = {
    0: ("surprisal_chosen", "surprisal_rejected", "surprisal_spread_chosen", "reference_accuracy"),
    1: ("rank_low_chosen", "rank_low_rejected", "rank_high_chosen", "told_apart", "feature_ratio"),
    2: ("reward_accuracy", "reached_chosen", "reached_rejected", "spearman", "peak_depth"),
}
"""By tier, of `diagnosis.reading.DOCUMENTED`; those whose unit is the same for any model."""
_LOGGED = {"feature_ratio"}


def of_figures(figures: Mapping[str, Estimate], tier: int) -> dict[str, float | None]:
    """The figures of a tier and of those below it; None where nothing is known."""
    names = [n for t in range(tier + 1) for n in FIGURES[t]]
    return {n: _known(figures.get(n), n in _LOGGED) for n in names}


def _known(x: Estimate | None, logged: bool) -> float | None:
    if x is None:
        return None
    value = next((v for v in (x.value, x.low, x.high) if v is not None), None)
    if value is None:
        return None
    return math.log(max(value, 1e-3)) if logged else value
