"""The table: a named method is one row of terms, and its defaults are the vetted ones.

The axes of arXiv 2404.14367 are computed from a row, never stored beside it.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from preftune import objectives as o
from preftune.errors import UserError, nearest
from preftune.labellers import Best, BestWorst, Demonstration, GivenPreference, Unlabelled
from preftune.sampling.decoding import Decoding
from preftune.sources import Offline, OnPolicy, Reference
from preftune.terms import Term, Times


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table."""

    name: str
    terms: tuple[Term, ...]
    reference_update: Literal["fixed", "round", "ema"] = "fixed"
    paper: str = ""
    equation: str = ""
    summary: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a run that this row was vetted with (learning rate, ...)."""

    @property
    def needs(self) -> frozenset[str]:
        """What rounds must be scored with; known before the policy is built."""
        return frozenset().union(*(t.needs for t in self.terms))

    @property
    def on_policy(self) -> bool:
        """Some labelled term learns from the policy's own samples."""
        return any(t.source.on_policy and t.labeller.labelled for t in self.terms)

    @property
    def on_policy_unlabelled(self) -> bool:
        """Fresh samples are used, but only by terms without a label."""
        return not self.on_policy and any(t.source.on_policy for t in self.terms)

    @property
    def sample_reuse(self) -> bool:
        """A labelled sample is used more than once: several passes, or a fixed set."""
        return any(
            t.labeller.labelled and (t.source.passes > 1 or not t.source.on_policy)
            for t in self.terms
        )

    @property
    def negative_gradient(self) -> bool:
        """Some labelled term pushes a response's log-prob down, for an admissible signal."""
        return any(t.labeller.labelled and _pushes_down(t) for t in self.terms)

    @property
    def mode_seeking(self) -> bool:
        """2404.14367 section 6 (for on-policy weighted likelihood at few passes only)."""
        return self.on_policy or self.negative_gradient

    def axes(self) -> dict[str, bool]:
        """The axes, by name."""
        names = (
            "on_policy",
            "sample_reuse",
            "on_policy_unlabelled",
            "negative_gradient",
            "mode_seeking",
        )
        return {name: getattr(self, name) for name in names}


def _pushes_down(term: Term) -> bool:
    """Whether d loss / d log-prob of some response is positive somewhere on a grid of log-probs."""
    moving = [
        n for n in term.parameters if n == "logp" or n.startswith("logp_") and n != "logp_old"
    ]
    signals = term.labeller.signals()
    fixed = {n: p for n, p in term.parameters.items() if n not in moving and n not in signals}
    weight = 1.0 if isinstance(term.weight, Times) else term.weight
    for values in itertools.product((-3.0, -1.0), repeat=len(moving)):
        for chosen in itertools.product(*signals.values()):
            logp = {
                n: torch.tensor(v, dtype=torch.float64, requires_grad=True)
                for n, v in zip(moving, values, strict=True)
            }
            data = {
                n: torch.tensor(v, dtype=torch.float64)
                for n, v in zip(signals, chosen, strict=True)
            }
            other = {
                n: torch.tensor(-2.0, dtype=torch.float64)
                for n, p in fixed.items()
                if p.kind is not p.KEYWORD_ONLY
            }
            loss = term.objective(
                **logp,
                **{n: v for n, v in data.items() if n in term.parameters},
                **other,
                **term.settings,
            )
            grads = torch.autograd.grad(loss, list(logp.values()), allow_unused=True)
            if any(g is not None and float(g) * weight > 1e-12 for g in grads):
                return True
    return False


_OFFLINE_DPO = Term(
    source=Offline(), labeller=GivenPreference(), objective=o.dpo, settings={"beta": 0.1}
)
_TAJWAR, _SONG = "arXiv 2404.14367", "arXiv 2406.01462"

_ROWS = (
    Method(
        name="sft",
        terms=(Term(source=Offline(take="chosen"), labeller=Demonstration(), objective=o.nll),),
        paper="supervised fine-tuning",
        equation="−log π(y|x)",
        summary="imitate demonstrations",
        defaults={"learning_rate": 2e-5},
    ),
    Method(
        name="pref_ft",
        terms=(Term(source=Offline(take="chosen"), labeller=Demonstration(), objective=o.nll),),
        paper=f"{_TAJWAR} section 3",
        equation="−log π(y_w|x)",
        summary="imitate the preferred responses",
        defaults={"learning_rate": 2e-5},
    ),
    Method(
        name="best_of_n",
        terms=(Term(source=Reference(samples_per_prompt=4), labeller=Best(), objective=o.nll),),
        paper=f"{_TAJWAR} section 3",
        equation="−log π(y*|x), y* = argmax r over N reference samples",
        summary="imitate the best of N samples, drawn once from the reference",
        defaults={"learning_rate": 2e-5},
    ),
    Method(
        name="dpo",
        terms=(_OFFLINE_DPO,),
        paper="arXiv 2305.18290 equation 7",
        equation="−log σ(β(h_w − h_l)), h = log π/π_ref",
        summary="contrast the given pairs",
        defaults={"learning_rate": 1e-6},
    ),
    Method(
        name="ipo",
        terms=(replace(_OFFLINE_DPO, objective=o.ipo, settings={"tau": 0.1}),),
        paper="arXiv 2310.12036 equation 17",
        equation="(h_w − h_l − 1/(2τ))²",
        summary="regress the given pairs' margin",
        defaults={"learning_rate": 1e-6},
    ),
    Method(
        name="on_policy_dpo",
        terms=(
            Term(
                source=OnPolicy(samples_per_prompt=2, passes=2), labeller=BestWorst(),
                objective=o.dpo, settings={"beta": 0.1},
            ),
        ),
        paper=f"{_TAJWAR} section 5",
        equation="−log σ(β(h_w − h_l)), y_w, y_l ~ π ranked by r",
        summary="contrast the best and the worst of fresh samples",
        defaults={"learning_rate": 1e-6},
    ),
    Method(
        name="on_policy_best_of_n",
        terms=(
            Term(source=OnPolicy(samples_per_prompt=4, passes=2), labeller=Best(), objective=o.nll),
        ),
        paper=f"{_TAJWAR} section 3",
        equation="−log π(y*|x), y* = argmax r over N samples of π",
        summary="imitate the best of N fresh samples",
        defaults={"learning_rate": 1e-6},
    ),
    Method(
        name="hypo",
        terms=(
            _OFFLINE_DPO,
            Term(
                source=OnPolicy(samples_per_prompt=2), labeller=Unlabelled(),
                objective=o.reverse_kl, weight=Times(0.05, "beta"),
            ),
        ),
        paper=f"{_SONG} Algorithm 1",
        equation="−log σ(β(h_w − h_l)) + λ KL(π‖π_ref), the KL on fresh unlabelled samples",
        summary="contrast the given pairs, held near the reference by fresh samples",
        defaults={"learning_rate": 1e-6},
    ),
)  # fmt: skip


def table() -> dict[str, Method]:
    """Every named method, in the order of the table."""
    return {row.name: row for row in _ROWS}


def get(name: str) -> Method:
    """The row of that name.

    Raises:
        UserError: no such row; the nearest name is offered.
    """
    rows = table()
    if name not in rows:
        raise UserError(
            f"method '{name}' is unknown.{nearest(name, rows)} Methods: {', '.join(rows)}."
        )
    return rows[name]


SETTINGS = (
    "beta", "tau", "weight", "clip", "baseline", "label_smoothing", "kl", "max_weight",
    "prompts_per_round", "samples_per_prompt", "passes", "unit",
)  # fmt: skip
"""Flat settings: each sets the field of that name in every term that has it."""
_CURES = {"beta": "tau", "tau": "beta"}


def configure(method: Method, settings: Mapping[str, Any]) -> Method:
    """The row with flat settings in their places.

    Raises:
        UserError: a setting that no term of the row has.
    """
    for name, value in settings.items():
        terms = tuple(_with_setting(t, name, value) for t in method.terms)
        if name == "weight":
            terms = (*method.terms[:-1], replace(method.terms[-1], weight=value))
        elif terms == method.terms and not any(_has(t, name) for t in terms):
            other = _CURES.get(name)
            hint = f" It has '{other}'." if other and any(t.takes(other) for t in terms) else ""
            raise UserError(
                f"'{name}' has no use in the method '{method.name}'.{hint} Leave it out."
            )
        method = replace(method, terms=terms)
    return method


def resolve(method: Method) -> Method:
    """Weights that follow a setting become numbers."""
    known = {k: v for t in method.terms for k, v in t.settings.items()}

    def fixed(term: Term) -> Term:
        if not isinstance(term.weight, Times):
            return term
        return replace(term, weight=term.weight.factor * known[term.weight.setting])

    return replace(method, terms=tuple(fixed(t) for t in method.terms))


def check(method: Method, decoding: Decoding, batch_size: int) -> None:
    """Refuse a row that cannot mean what it says, before anything is loaded.

    Raises:
        UserError: the setting and the cure.
    """
    for term in method.terms:
        source = term.source
        if source.num_responses < term.labeller.least:
            raise UserError(
                f"samples_per_prompt: {source.num_responses} is too few for "
                f"{type(term.labeller).__name__}, which compares responses. "
                f"Give {term.labeller.least} or more."
            )
        items = term.labeller.items(source.num_responses)
        update = max(1, int(batch_size * term.share) // items)
        if source.prompts_per_round is not None and source.prompts_per_round < update:
            raise UserError(
                f"prompts_per_round: {source.prompts_per_round} is less than the {update} prompts "
                f"of one update (batch_size {batch_size}). Lower batch_size "
                "or raise prompts_per_round."
            )
        if term.objective is o.reverse_kl:
            _check_fresh(term, update, decoding)


def _check_fresh(term: Term, update: int, decoding: Decoding) -> None:
    """The reverse KL's gradient is that of the policy that drew the samples, and of no other."""
    source = term.source
    if not source.on_policy or source.passes > 1 or (source.prompts_per_round or update) > update:
        raise UserError(
            "reverse_kl needs fresh samples: an on_policy source with passes: 1 and rounds of one "
            "update. For reused samples put the KL into the reward (kl), or give the term a source "
            "of its own."
        )
    if not decoding.unmodified:
        raise UserError(
            "reverse_kl needs samples of the policy itself: temperature 1, top_p 1, top_k 0 "
            f"(given: {decoding.temperature:g}, {decoding.top_p:g}, {decoding.top_k})."
        )


def _fields(part: Any) -> set[str]:
    return {f.name for f in fields(part)}


def _has(term: Term, name: str) -> bool:
    own = _fields(term.source) | _fields(term.labeller)
    return name == "unit" or name in own or term.takes(name)


def _with_setting(term: Term, name: str, value: Any) -> Term:
    if name == "unit":
        return replace(term, unit=value)
    if name in _fields(term.source):
        return replace(term, source=replace(term.source, **{name: value}))  # type: ignore[type-var]
    if name in _fields(term.labeller):
        return replace(term, labeller=replace(term.labeller, **{name: value}))  # type: ignore[type-var]
    if term.takes(name):
        return replace(term, settings={**term.settings, name: value})
    return term
