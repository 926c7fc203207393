"""A term of a method, and how its loss is formed: bind by name, mask, mean.

    Term = source -> labeller -> objective, with weight, share, level and unit

Arguments of an objective are found by their names. `logp`, `value`, `collision` and `score` are the
model's now (`Trainable.outputs`); `logp_old`, `value_old` those at collection; `ref_logp` the
reference's; `len` the response tokens; each with `_chosen`, `_rejected` where the labeller names
roles. Other names are looked up in the labeller's data, then in the term's settings.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor

from preftune.collecting import Source
from preftune.labellers import Labeller, Member
from preftune.numerics import masked_sum
from preftune.objectives import kl_loss, reverse_kl
from preftune.samples import Batch, Samples
from preftune.sources import origins

Objective = Callable[..., Tensor]
_NOW = ("logp", "value", "collision", "score")
_FIELDS = {"logp_old": "logp", "value_old": "value", "ref_logp": "ref_logp"}
_SCORES = (*_NOW, *_FIELDS, "len")
PLAIN = ("weight", "share", "level", "unit", "max_ratio")
"""Fields of a term that are no parts of their own."""
_A_RESPONSE = ("len", "score")
"""One number a response at every level."""


@dataclass(frozen=True)
class Times:
    """A weight that follows a setting: factor x the method's setting of that name."""

    factor: float
    setting: str


@dataclass(frozen=True, kw_only=True)
class Term:
    """One source -> labeller -> objective."""

    source: Source
    labeller: Labeller
    objective: Objective
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the objective: beta, tau, label_smoothing, ..."""
    weight: float | Times | tuple[float, ...] = 1.0
    """Of the mean loss. Like the objective's numbers: one, or one a run of a study."""
    share: float = 1.0
    """Of batch_size that this term's source draws."""
    level: Literal["sequence", "mean", "token"] = "sequence"
    """What the objective is given: log-probs summed over the response's tokens, their mean, or each
    token's."""
    unit: Literal["sequence", "token"] = "sequence"
    """What the mean is over."""
    max_ratio: float | None = None
    """The update is skipped where the mean ratio of its tokens, now to collection, is above."""

    @property
    def factor(self) -> float | tuple[float, ...]:
        """The weight in numbers (`methods.resolve` puts them in place of `Times`)."""
        assert not isinstance(self.weight, Times), "weights are resolved before the loop"
        return self.weight

    @property
    def idle(self) -> bool:
        """Of weight 0: sampled and logged, no part of the loss."""
        return not any(self.factor) if isinstance(self.factor, tuple) else self.factor == 0

    @property
    def taken(self) -> list[bool]:
        """Which of its source's responses to a prompt it takes."""
        if isinstance(self.labeller, Member):
            return self.labeller.is_at(torch.tensor(origins(self.source))).tolist()
        count = self.source.num_responses
        return [k < getattr(self.labeller, "most", count) for k in range(count)]

    @property
    def origins(self) -> list[int]:
        """`Samples.origin` of those; 0 is the policy."""
        return list(compress(origins(self.source), self.taken))

    def __getstate__(self) -> dict[str, Any]:
        """What another process is sent: the fields, nothing that was kept beside them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The objective's, by name."""
        return inspect.signature(self.objective).parameters

    def takes(self, setting: str) -> bool:
        """Whether `setting` is one of the objective's: keyword-only, and not data."""
        found = self.parameters.get(setting)
        return found is not None and found.kind is found.KEYWORD_ONLY and setting != "baseline"

    @cached_property
    def outputs(self) -> frozenset[str]:
        """What the objective takes of the model now: logp, value, collision, score."""
        return frozenset(base for name in self.parameters if (base := _base(name)) in _NOW)

    @property
    def penalises_kl(self) -> bool:
        """Its loss is a KL from the reference."""
        return self.objective in (reverse_kl, kl_loss)

    @property
    def kl_coefficient(self) -> float | tuple[float, ...] | None:
        """Strength of the term's KL, in its loss or in its labeller's reward; None: it has none."""
        return self.factor if self.penalises_kl else getattr(self.labeller, "kl", None)

    @cached_property
    def needs(self) -> frozenset[str]:
        """What a round must be scored with, for the labeller and for the objective."""
        found = {_FIELDS[base] for name in self.parameters if (base := _base(name)) in _FIELDS}
        return self.labeller.needs | found


def together(terms: Sequence[Term]) -> list[list[int]]:
    """Places of the terms that use the same samples: those of an equal source and share."""
    groups: list[list[int]] = []
    for place, term in enumerate(terms):
        like = (g for g in groups if terms[g[0]].source == term.source)
        found = next((g for g in like if terms[g[0]].share == term.share), None)
        if found is None:
            groups.append([place])
        else:
            found.append(place)
    return groups


def prompts_per_update(terms: Sequence[Term], batch_size: int, num_responses: int) -> int:
    """Of terms that use the same samples: batch_size x share items, in whole prompts; the largest
    item count among the terms."""
    items = max(t.labeller.items(num_responses) for t in terms)
    return max(1, int(batch_size * terms[0].share) // items)


def _base(name: str) -> str | None:
    """The score that a parameter asks for: `ref_logp_chosen` -> `ref_logp`; else None."""
    for score in sorted(_SCORES, key=len, reverse=True):
        if name == score or name.startswith(score + "_"):
            return score
    return None


def gather(x: Tensor, index: Tensor, per_token: bool) -> Tensor:
    """x [*R, n, K, (T)] at index [*R, n, Q, A] -> [*R, n, Q, A, (T)]."""
    shape = index.shape
    flat = index.flatten(-2)
    if per_token:
        flat = flat.unsqueeze(-1).expand(*flat.shape, x.shape[-1])
        return x.gather(-2, flat).unflatten(-2, shape[-2:])
    return x.gather(-1, flat).unflatten(-1, shape[-2:])


def scores(term: Term, samples: Samples, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the names stand for: [*R, n, K], or [*R, n, K, T] at token level."""
    known = dict(now)
    known |= {name: x for name, at in _FIELDS.items() if (x := getattr(samples, at)) is not None}
    length = samples.lengths()
    if term.level != "token":
        for name, x in known.items():
            if name not in _A_RESPONSE:
                total = masked_sum(x, samples.mask)
                known[name] = total / length.clamp(min=1) if term.level == "mean" else total
    return known | {"len": length}


def bind(term: Term, samples: Samples, batch: Batch, now: Mapping[str, Tensor]) -> dict[str, Any]:
    """The objective's arguments, by name: tensors [*R, n, Q, (A), (T)] and settings."""
    known = scores(term, samples, now)
    dtype = next(iter(now.values())).dtype
    per_token = term.level == "token"
    shape = batch.index.shape[:-1] if batch.roles else batch.index.shape
    shape = (*shape, samples.mask.shape[-1]) if per_token else shape

    def wide(x: Tensor) -> Tensor:
        return x.to(dtype).reshape(*x.shape, *[1] * (len(shape) - x.ndim)).expand(shape)

    arguments: dict[str, Any] = {}
    for name, parameter in term.parameters.items():
        base = _base(name)
        if base in known:
            x = gather(known[base], batch.index, per_token and base not in _A_RESPONSE)
            role = name[len(base) + 1 :]
            x = x.select(batch.index.ndim - 1, batch.roles.index(role)) if role else x
            arguments[name] = wide(x)
        elif name in batch.data:
            arguments[name] = wide(batch.data[name])
            if term.takes(name):  # where the data say nothing (NaN), the setting holds
                own = term.settings.get(name, parameter.default)
                own = wide(torch.tensor(own)) if isinstance(own, tuple) else own
                arguments[name] = torch.where(arguments[name].isnan(), own, arguments[name])
        elif name in term.settings:
            value = term.settings[name]
            each_run = isinstance(value, tuple)
            arguments[name] = wide(torch.tensor(value)) if each_run else value
        elif parameter.default is parameter.empty:
            raise AssertionError(f"objective {term.objective.__name__}: nothing provides '{name}'")
    return arguments


def loss_sum(
    term: Term, samples: Samples, batch: Batch, now: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Sum of the term's loss over the items that are kept, [*R] (divide by `count`), and the
    objective's arguments.

    Args:
        now: the model's outputs, by name.
    """
    arguments = bind(term, samples, batch, now)
    loss = term.objective(**arguments)
    items = batch.index.shape[:-1]
    if term.level == "token":
        mask = gather(samples.mask, batch.index, per_token=True)
        loss = masked_sum(loss, mask.select(-2, 0) if batch.roles else mask)
    if not batch.roles:
        loss = loss.sum(-1) if term.unit == "token" else loss.mean(-1)
    assert loss.shape == items, (
        f"{term.objective.__name__} gave {tuple(loss.shape)}, not {tuple(items)}"
    )
    if batch.keep is not None:
        loss = torch.where(batch.keep, loss, torch.zeros_like(loss))
    return loss.sum((-2, -1)), arguments


def count(term: Term, samples: Samples, batch: Batch) -> Tensor:
    """What the mean is over, [*R]: items kept, or their tokens. Known before any forward."""
    items = torch.ones(batch.index.shape[:-1], dtype=torch.float64)
    if term.unit == "token":
        items = gather(samples.lengths(), batch.index, per_token=False).sum(-1).to(items)
    if batch.keep is not None:
        items = items * batch.keep
    return items.sum((-2, -1))


def narrows(samples: Samples, batches: list[Batch]) -> bool:
    """Whether items point at fewer responses than there are."""
    return sum(b.index.shape[-2:].numel() for b in batches) < samples.tokens.shape[-2]


def narrow(samples: Samples, batches: list[Batch]) -> tuple[Samples, list[Batch]]:
    """Only the responses that some item points at (of best-of-N, one), so no other is computed.

    The number kept follows from shapes alone, so it is the same in every run of a study.
    """
    if not narrows(samples, batches):
        return samples, batches
    flat = [b.index.flatten(-2) for b in batches]
    samples = samples.at(torch.cat(flat, -1))
    out, start = [], 0
    for batch, f in zip(batches, flat, strict=True):
        places = torch.arange(start, start + f.shape[-1]).expand(f.shape)
        out.append(replace(batch, index=places.unflatten(-1, batch.index.shape[-2:])))
        start += f.shape[-1]
    return samples, out


def trimmed(samples: Samples, batches: list[Batch]) -> tuple[Samples, list[Batch]]:
    """Without the columns that are padding in every response, also in what is of each token."""
    samples = samples.trimmed()
    width = samples.tokens.shape[-1]

    def cut(batch: Batch) -> Batch:
        axes = batch.index.ndim + 1 - bool(batch.roles)  # of data that is of each token
        data = {k: x[..., :width] if x.ndim == axes else x for k, x in batch.data.items()}
        return replace(batch, data=data)

    return samples, [cut(b) for b in batches]
