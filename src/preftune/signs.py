"""The alarms: what each reads, when it is the sign of a run that goes wrong, and what helps.

A row of `ALARMS` reads figures by their names in metrics.jsonl and knows no method: where a figure
is missing it is silent. How figures become a run's past, and when an alarm is asked: `alarms`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FAR = 50.0
"""Nats between the policy and the reference, a response: samples of the one are nothing to the
other long before."""
COLLAPSED = 0.1
"""Of the entropy at first."""
REPEATED = 0.25
"""Of the different answers at first."""
LOST = 5.0
"""Nats that chosen responses have lost: they are 150 times less likely than under the reference."""
LOST_SHARE = 1.5
"""Of -log-prob of chosen responses at first, where there is no reference to measure by."""
GAP, GAP_RISE, GAP_SHARE = 10.0, 2.0, 0.25
"""Nats from which on the gap to the data is looked at; what it must have risen by, in nats and of
what it was."""
FLAT = 0.02
"""Accuracy that has grown by no more has not grown."""
FEW = 0.2
"""Of the pairs that still teach."""
APART, FEW_COUNT = 1.0, 0.5
"""Nats a response between sampler and trainer; share of the samples that still count."""
OFFSET = 2.0
"""Deviations of its target by which the value head is off as a whole."""
FALLEN = 0.2
"""Of agreement between two rewards, lost."""

Numbers = Mapping[str, float]
Moment = Literal["update", "window", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class View:
    """What an alarm sees: figures now, and as they were."""

    now: Mapping[str, Any]
    """Of an update, as logged; else means over a window, or an evaluation's, all numbers."""
    first: Numbers = field(default_factory=dict)
    before: Numbers = field(default_factory=dict)
    best: Numbers = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One sign."""

    name: str
    title: str
    moments: tuple[Moment, ...]
    """When it is asked."""
    reads: tuple[str, ...]
    """Figures that must be there now."""
    against: Literal["first", "before", "best"] | None = None
    """Where else they must be there."""
    sign: Callable[[View], str | None]
    """What was measured, if that is the sign."""
    cure: str

    def says(self, view: View) -> str | None:
        """What was measured where the sign is seen; None also where a figure is missing."""
        past = view.now if self.against is None else getattr(view, self.against)
        known = all(name in view.now and name in past for name in self.reads)
        return self.sign(view) if known else None


def is_number(value: object) -> bool:
    """A finite number; what is logged of a study is a list."""
    return isinstance(value, float | int) and math.isfinite(value)


def _ties(view: View) -> str | None:
    if view.now["loss"] is not None:
        return None
    return "no item remained (all rewards tied), so no update was made"


def _far(view: View) -> str | None:
    kl = view.now["kl"]
    if not is_number(kl) or kl <= FAR:
        return None
    return (
        f"it is {kl:.0f} nats a response from the reference, and a reward that grows there is "
        "seldom worth having"
    )


def _collapsed(view: View) -> str | None:
    now, first = view.now["entropy"], view.first["entropy"]
    if now >= COLLAPSED * first:
        return None
    return f"their entropy is {now:.3f} nats a token, {first:.3f} at first"


def _repeated(view: View) -> str | None:
    now, first = view.now["distinct_samples"], view.first["distinct_samples"]
    if now >= REPEATED * first:
        return None
    return (
        f"{now:.0%} of a prompt's further samples differ from the ones before, {first:.0%} at first"
    )


def _displaced(view: View) -> str | None:
    now, before = view.now, view.before
    falls = now["log_ratio_chosen"] < before["log_ratio_chosen"]
    if now["log_ratio_chosen"] > -LOST or not falls or now["margin"] <= before["margin"]:
        return None
    return (
        f"log_ratio_chosen is {now['log_ratio_chosen']:.1f} nats, "
        f"{before['log_ratio_chosen']:.1f} before, while the margin grew from "
        f"{before['margin']:.1f} to {now['margin']:.1f}"
    )


def _displaced_alone(view: View) -> str | None:
    now, first = view.now, view.first
    if now["logp_chosen"] > LOST_SHARE * first["logp_chosen"] or now["margin"] <= first["margin"]:
        return None
    return (
        f"logp_chosen is {now['logp_chosen']:.1f} nats, {first['logp_chosen']:.1f} at first, while "
        f"the margin grew from {first['margin']:.1f} to {now['margin']:.1f}"
    )


def gap(figures: Numbers) -> float:
    """How much more the policy's own samples have gained than the data's responses, nats:
    E_policy[l] - (E_data[l of chosen] + E_data[l of rejected]) / 2, l the log-ratio to the
    reference."""
    return figures["kl"] - (figures["log_ratio_chosen"] + figures["log_ratio_rejected"]) / 2


def _leaves(view: View) -> str | None:
    """A gap that grows because rejected responses fall is what pairs are for: the own samples must
    gain, the chosen responses lose, and no more pairs be ranked right."""
    now, before = view.now, view.before
    wide, was = gap(now), gap(before)
    risen = wide >= GAP and wide - was >= max(GAP_RISE, GAP_SHARE * was)
    away = now["kl"] > before["kl"] and now["log_ratio_chosen"] < before["log_ratio_chosen"]
    if not risen or not away or now["accuracy"] > before["accuracy"] + FLAT:
        return None
    return (
        f"own samples have gained {wide:.1f} nats on the data's responses, {was:.1f} before (kl "
        f"{before['kl']:.1f} to {now['kl']:.1f}, log_ratio_chosen "
        f"{before['log_ratio_chosen']:.1f} to {now['log_ratio_chosen']:.1f}), while accuracy is "
        f"{now['accuracy']:.2f} as before ({before['accuracy']:.2f})"
    )


def _slow(view: View) -> str | None:
    now = view.now
    if now["informative_pairs"] >= FEW:
        return None
    return (
        f"{now['informative_pairs']:.0%} of the pairs still teach; in {now['settled_pairs']:.0%} "
        f"the margin is already large, in {now['unlikely_pairs']:.0%} the rejected response is "
        f"unlikely already, and {now['alike_pairs']:.0%} are alike"
    )


def _drawn_by_another(view: View) -> str | None:
    gap, counting = view.now["sampler_gap"], view.now["sampler_effective_sample_size"]
    if gap <= APART and counting >= FEW_COUNT:
        return None
    return (
        f"sampler and trainer differ by {gap:.2f} nats a response, and {counting:.0%} of the "
        "samples would count if they were weighed by that"
    )


def _unforeseen(view: View) -> str | None:
    """Still so after a while: it starts anywhere, and a running mean has no first round."""
    now, before = view.now["value_offset"], view.before["value_offset"]
    if min(now, before) <= OFFSET:
        return None
    return (
        f"it is off by {now:.1f} deviations of its target, {before:.1f} before, so that the ends "
        "of responses are pushed one way whatever the responses say"
    )


def _poor(view: View) -> str | None:
    now, first = view.now, view.first["agreement"]
    if now["agreement_far"] > first - FALLEN or now["agreement_far_high"] >= first:
        return None
    return (
        f"on the answers furthest from the reference the reward agrees with the gold reward in "
        f"{now['agreement_far']:.0%} (95 % interval to {now['agreement_far_high']:.0%}), on all "
        f"answers in {first:.0%} at first"
    )


def _spoiled(view: View) -> str | None:
    now, best = view.now, view.best
    if now["gold_high"] >= best["gold_low"] or now["reward"] <= best["reward"]:
        return None
    return (
        f"reward went from {best['reward']:.3g} to {now['reward']:.3g}, and the gold reward from "
        f"{best['gold']:.3g} to {now['gold']:.3g} (their 95 % intervals are apart)"
    )


_HOLD = "Lower learning_rate, or hold it by target_kl, kl or beta."
_KEEP_CHOSEN = (
    "Lower learning_rate; hold the chosen log-prob up (dpop, dpo_nll); leave out the pairs of "
    "highest ln-CHES (`preftune diagnose` shows them). If the pairs are the reference's own "
    "samples, a fall without this margin is a KL and no failure."
)

ALARMS: tuple[Alarm, ...] = (
    Alarm(
        name="ties", title="nothing to learn from", moments=("update",), reads=("loss",),
        sign=_ties,
        cure="Sample more responses a prompt, raise the temperature, or use a finer reward.",
    ),
    Alarm(
        name="kl", title="the policy is far from the reference", moments=("update", "evaluation"),
        reads=("kl",), sign=_far, cure=_HOLD,
    ),
    Alarm(
        name="entropy", title="samples have lost nine tenths of their entropy",
        moments=("window", "evaluation"), reads=("entropy",), against="first", sign=_collapsed,
        cure="The policy repeats itself. Lower learning_rate or passes, raise the KL's weight, or "
        "stop at an earlier checkpoint. Where several answers are equally good, which one is left "
        "is chance: compare seeds with `preftune report`.",
    ),
    Alarm(
        name="modes", title="a prompt's samples have become the same", moments=("window",),
        reads=("distinct_samples",), against="first", sign=_repeated,
        cure="Equal samples make no pairs and no advantage. Raise the KL's weight or set "
        "target_kl, or imitate good answers (best_of_n, rwr), which keeps several; which answer "
        "is left is chance: compare seeds with `preftune report`.",
    ),
    Alarm(
        name="displacement", title="chosen responses fall with the rejected ones",
        moments=("window",), reads=("log_ratio_chosen", "margin"), against="before",
        sign=_displaced, cure=_KEEP_CHOSEN,
    ),
    Alarm(
        name="displacement", title="chosen responses fall with the rejected ones",
        moments=("window",), reads=("logp_chosen", "margin"), against="first",
        sign=_displaced_alone, cure=_KEEP_CHOSEN,
    ),
    Alarm(
        name="coverage", title="the policy leaves what the data cover",
        moments=("window", "evaluation"),
        reads=("kl", "log_ratio_chosen", "log_ratio_rejected", "accuracy"), against="before",
        sign=_leaves,
        cure="The pairs no longer say where it goes. Hold it on fresh samples (hypo, target_kl), "
        "make pairs of its own samples (on_policy_dpo), or take fewer steps.",
    ),
    Alarm(
        name="slow", title="few pairs still teach", moments=("window",),
        reads=("informative_pairs", "settled_pairs", "unlikely_pairs", "alike_pairs"), sign=_slow,
        cure="Large margins: stop here, or go on with new pairs. Unlikely rejected responses: take "
        "pairs of the policy's own samples (on_policy_dpo, half_and_half). Alike: leave such pairs "
        "out (`preftune diagnose` finds them).",
    ),
    Alarm(
        name="sampler", title="samples are not the policy's", moments=("window",),
        reads=("sampler_gap", "sampler_effective_sample_size"), sign=_drawn_by_another,
        cure="Set max_staleness to 0, give sampler and trainer the same dtype, draw shorter "
        "responses, or leave sampler out: the model's own samples are the policy's.",
    ),
    Alarm(
        name="value", title="the value head is far from the rewards", moments=("window",),
        reads=("value_offset",), against="before", sign=_unforeseen,
        cure="Rewards lie far from zero, where it starts. Centre them (of each term: --set "
        "terms.0.labeller.shaping.standardise=running), raise the value term's weight, or take a "
        "row without a value head (rloo).",
    ),
    Alarm(
        name="agreement", title="the reward errs where the policy has gone",
        moments=("evaluation",), reads=("agreement", "agreement_far", "agreement_far_high"),
        against="first", sign=_poor,
        cure="Label answers of this policy and train the reward model anew, take the pessimistic "
        "mean of an ensemble, or hold the policy nearer to the reference (target_kl, kl).",
    ),
    Alarm(
        name="gold", title="the gold reward falls while the reward rises",
        moments=("evaluation",), reads=("reward", "gold", "gold_low", "gold_high"),
        against="best", sign=_spoiled,
        cure="The reward is no measure there. Keep the checkpoint that is best by gold (best_by), "
        "stop there, raise the KL's weight, or better the reward.",
    ),
)  # fmt: skip
