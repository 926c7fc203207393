"""Signs and rows in plain words."""

import math
from dataclasses import dataclass

from preftune.advising.signs import Circumstances


@dataclass(frozen=True)
class Words:
    """How a sign is said: of a value, and as a quantity that can change."""

    said: str
    """With {} for the value, {kind} for that of the rows."""
    quantity: str
    exponential: bool = False
    """The sign is a logarithm; values are said without it."""
    form: str = "{:.2f}"

    def value(self, x: float) -> str:
        """In its own unit."""
        return self.form.format(math.exp(x) if self.exponential else x)


_COUNT = "{:,.0f}"
WORDS: dict[str, Words] = {
    "log_fresh": Words(
        "the budget buys {} fresh labelled responses", "fresh labelled responses in the budget",
        True, _COUNT,
    ),
    "log_pairs": Words("there are {} {kind}", "{kind}", True, _COUNT),
    "log_epochs": Words("the budget reads the {kind} {} times", "epochs in the budget", True),
    "log_beta": Words("a nat of KL costs {} of reward", "beta", True),
    "log_sample_price": Words(
        "drawing a response costs about {} of training on it", "the price of a sample", True
    ),
    "surprisal_chosen": Words("the chosen have z = {} under the reference", "z of the chosen"),
    "surprisal_rejected": Words(
        "the rejected have z = {} under the reference", "z of the rejected"
    ),
    "surprisal_spread_chosen": Words("the chosen's z spreads by {}", "the spread of z"),
    "reference_accuracy": Words(
        "the reference orders {} of the pairs as the labels do", "pairs ordered by the reference"
    ),
    "rank_low_chosen": Words(
        "{} of the chosen are stranger than all of the reference's samples",
        "chosen stranger than all samples",
    ),
    "rank_low_rejected": Words(
        "{} of the rejected are stranger than all of the reference's samples",
        "rejected stranger than all samples",
    ),
    "rank_high_chosen": Words(
        "{} of the chosen are likelier than all of its samples", "chosen likelier than all samples"
    ),
    "told_apart": Words("data and own samples are told apart with AUC {}", "AUC against samples"),
    "feature_ratio": Words(
        "own samples differ {} times as much as the pairs where the pairs are thin",
        "feature_ratio", True,
    ),
    "reward_accuracy": Words("the reward orders {} of the pairs as the data do",
                             "pairs ordered by the reward"),
    "reached_chosen": Words(
        "{} of the reference's samples reach the chosen's reward", "samples that reach the chosen"
    ),
    "reached_rejected": Words(
        "{} of its samples reach the rejected's", "samples that reach the rejected"
    ),
    "spearman": Words(
        "reward and the reference's log-prob correlate by {}", "their rank correlation"
    ),
    "peak_depth": Words(
        "the best sample lies {} deviations below the mean log-prob", "depth of the best sample"
    ),
}  # fmt: skip
SOURCE = {
    "rm_same": "fresh samples would be judged by a reward model of these same pairs",
    "rm_other": "fresh samples have a judge of their own",
    "human": "fresh labels are bought one by one",
}
_OF_SOURCE = {
    "human_log_fresh": "log_fresh", "rm_same_log_pairs": "log_pairs",
    "rm_same_log_beta": "log_beta", "human_log_beta": "log_beta",
}  # fmt: skip
"""Signs that are another one for one label source, and 0 for all others."""
QUANTITIES = {
    "budget": Words("", "the budget, in responses trained on,", form=_COUNT),
    "pairs": Words("", "the number of {kind}", form=_COUNT),
    "label_price": Words("", "the price of a label", form="{:.3g}"),
    "sample_price": Words("", "the price of a sample", form="{:.3g}"),
    "beta": Words("", "beta", form="{:.3g}"),
}
"""Of the circumstances, what a user may change."""


def plain_sign(name: str) -> str:
    """The sign that one crossed with a label source is about; all others are their own."""
    return _OF_SOURCE.get(name, name)


def is_of_labels(name: str) -> bool:
    """Whether a sign means nothing where nobody judges."""
    return name.startswith("is_") or name in _OF_SOURCE or name == "log_fresh"


def reason(name: str, value: float | None, known: Circumstances) -> str | None:
    """What a sign says, in words; None where it is not known."""
    if name.startswith("is_"):
        return SOURCE.get(known.source)
    if value is None:
        return None
    return WORDS[name].said.format(WORDS[name].value(value), kind=known.kind)
