"""A method: one row of terms, its axes, its settings, and what cannot mean what it says.

The axes of arXiv 2404.14367 are computed from a row, never stored beside it.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from preftune.errors import UserError
from preftune.samples import DATA
from preftune.sources import Pool, origins
from preftune.terms import Term, Times


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table."""

    name: str
    terms: tuple[Term, ...]
    reference_update: Literal["fixed", "round", "ema"] = "fixed"
    """round: the reference is the policy at the start of each on-policy round (offline: each
    epoch); ema: a moving average of it."""
    ema_decay: float = 0.99
    """Share of itself that the moving average keeps at an update."""
    target_kl: float | None = None
    """Budget of reverse KL, nats, that the KL terms and coefficients are moved to hold."""
    patience: int | None = None
    """The run ends where the mean reward of fresh samples has not risen for so many windows (of
    `stopping.WINDOW` updates); None: at its last step."""
    paper: str = ""
    equation: str = ""
    summary: str = ""
    note: str = ""
    """What it is not: other methods of the same name."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a run that this row was vetted with (learning rate, ...)."""

    @property
    def draws(self) -> bool:
        """Some of its responses are drawn, by the policy or the reference."""
        return any(origin != DATA for t in self.terms for origin in origins(t.source))

    @property
    def needs(self) -> frozenset[str]:
        """What rounds must be scored with; known before the policy is built."""
        found = frozenset().union(*(t.needs for t in self.terms))
        return found if self.target_kl is None else found | {"logp", "ref_logp"}

    @property
    def outputs(self) -> frozenset[str]:
        """What its objectives take of the model; known before the model is built."""
        return frozenset().union(*(t.outputs for t in self.terms))

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
    if not moving:
        return False
    signals = term.labeller.signals()
    fixed = {n: p for n, p in term.parameters.items() if n not in moving and n not in signals}
    weight = 1.0 if isinstance(term.weight, Times) else term.weight
    weight = max(weight) if isinstance(weight, tuple) else weight
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
                n: torch.tensor(2.0 if n.startswith("len") else -2.0, dtype=torch.float64)
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


OF_ROW = ("reference_update", "ema_decay", "target_kl", "patience")
"""Settings of a row as a whole."""
SETTINGS = (
    "beta", "tau", "weight", "clip", "baseline", "label_smoothing", "kl", "max_weight",
    "prompts_per_round", "samples_per_prompt", "passes", "unit", *OF_ROW,
)  # fmt: skip
"""Flat settings: each sets the field of that name in every term that has it."""
_CURES = {"beta": "tau", "tau": "beta"}


def configure(method: Method, settings: Mapping[str, Any]) -> Method:
    """The row with flat settings in their places. A term that learns values goes where another
    baseline takes theirs.

    Raises:
        UserError: a setting that no term of the row has.
    """
    for name, value in settings.items():
        if name in OF_ROW:
            method = replace(method, **{name: value})
            continue
        known = [x for t in method.terms for x in _choices(t, name)]
        if known and value not in known:
            raise UserError(
                f"{name}: the method '{method.name}' has no {value!r}. Give "
                f"{' or '.join(dict.fromkeys(known))}."
            )
        terms = tuple(_with_setting(t, name, value) for t in method.terms)
        if name == "weight":
            terms = (*method.terms[:-1], replace(method.terms[-1], weight=value))
        elif terms == method.terms and not any(_has(t, name) for t in terms):
            other = _CURES.get(name)
            hint = f" It has '{other}'." if other and any(t.takes(other) for t in terms) else ""
            raise UserError(
                f"'{name}' has no use in the method '{method.name}'.{hint} Leave it out."
            )
        if name == "baseline" and value != "value":  # nothing is left for a value head to learn
            kept = tuple(t for t in terms if "target" not in t.parameters) or terms
            if "weight" in settings and kept[-1] is not terms[-1]:
                raise UserError(
                    f"weight: is that of {terms[-1].objective.__name__}, which baseline: {value} "
                    "leaves out. Leave it out too."
                )
            terms = kept
        method = replace(method, terms=terms)
    return method


def resolve(method: Method) -> Method:
    """Weights that follow a setting become numbers."""
    known = {k: v for t in method.terms for k, v in t.settings.items()}

    def fixed(term: Term) -> Term:
        if not isinstance(term.weight, Times):
            return term
        factor, value = term.weight.factor, known[term.weight.setting]
        each = isinstance(value, tuple)
        return replace(term, weight=tuple(factor * v for v in value) if each else factor * value)

    return replace(method, terms=tuple(fixed(t) for t in method.terms))


def _fields(part: Any) -> set[str]:
    """Names of a part's settings; of a pool, its on-policy members'."""
    if isinstance(part, Pool):
        return set().union(*(_fields(m) for m in part.members if m.on_policy))
    return {f.name for f in fields(part)}


def _has(term: Term, name: str) -> bool:
    if name == "clip":  # the ratio's, where there are several
        return "logp_old" in term.parameters and term.takes(name)
    own = _fields(term.source) | _fields(term.labeller)
    return name == "unit" or name in own or term.takes(name)


def _choices(term: Term, name: str) -> tuple[Any, ...]:
    """Values that a setting of the term's labeller may have, where it is a choice."""
    if name not in _fields(term.labeller):
        return ()
    kind = get_type_hints(type(term.labeller))[name]
    return get_args(kind) if get_origin(kind) is Literal else ()


def _with_setting(term: Term, name: str, value: Any) -> Term:
    choices = _choices(term, name)
    if not _has(term, name) or (choices and value not in choices):
        return term
    if name == "unit":
        return replace(term, unit=value)
    if name in _fields(term.source):
        return replace(term, source=_source_with(term.source, name, value))
    if name in _fields(term.labeller):
        return replace(term, labeller=replace(term.labeller, **{name: value}))  # type: ignore[type-var]
    return replace(term, settings={**term.settings, name: value})


def _source_with(source: Any, name: str, value: Any) -> Any:
    if not isinstance(source, Pool):
        return replace(source, **{name: value})
    return replace(
        source,
        members=tuple(
            _source_with(m, name, value) if m.on_policy and name in _fields(m) else m
            for m in source.members
        ),
    )
