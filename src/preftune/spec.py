"""A row of the table as plain data and back: what YAML holds and `--set` changes.

    terms:
    - source: {name: offline, take: all}
      labeller: {name: given_preference}
      objective: dpo
      settings: {beta: 0.1}
      weight: 1.0

`source`, `labeller` and `objective` may also be `pkg.module:name`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from preftune import labellers, objectives, sources
from preftune.collecting import Source
from preftune.errors import UserError, nearest
from preftune.method import OF_ROW, Method, resolve
from preftune.samples import Samples
from preftune.terms import PLAIN, Term, loss_sum
from preftune.values import checked, kinds_of, plain

SOURCES: dict[str, Any] = {
    "offline": sources.Offline,
    "reference": sources.Reference,
    "on_policy": sources.OnPolicy,
    "pool": sources.Pool,
}
LABELLERS: dict[str, Any] = {
    "demonstration": labellers.Demonstration,
    "good": labellers.Good,
    "feedback": labellers.Feedback,
    "given_preference": labellers.GivenPreference,
    "best_worst": labellers.BestWorst,
    "all_pairs": labellers.AllPairs,
    "random_pair": labellers.RandomPair,
    "best": labellers.Best,
    "reward_weights": labellers.RewardWeights,
    "advantage": labellers.Advantage,
    "unlabelled": labellers.Unlabelled,
    "member": labellers.Member,
}
OBJECTIVES: dict[str, Any] = {name: getattr(objectives, name) for name in objectives.__all__}
_KEYS = ("source", "labeller", "objective", "settings", *PLAIN)
ROW_KEYS = ("name", "terms", *OF_ROW)
"""Of a row in YAML."""


def to_data(method: Method) -> list[dict[str, Any]]:
    """The row's terms as plain data, weights resolved."""
    return [
        {
            "source": _part(term.source, SOURCES),
            "labeller": _part(term.labeller, LABELLERS),
            "objective": _name(term.objective, OBJECTIVES),
            "settings": dict(term.settings),
            "weight": term.weight,
            "share": term.share,
            "level": term.level,
            "unit": term.unit,
            **({"max_ratio": term.max_ratio} if term.max_ratio is not None else {}),
        }
        for term in resolve(method).terms
    ]


def from_data(name: str, terms: Any, base: Method | None = None) -> Method:
    """A row from plain data.

    Raises:
        UserError: what is wrong, by the path of the term.
    """
    if not isinstance(terms, list) or not terms:
        raise UserError(f"method '{name}': 'terms' must be a list of at least one term.")
    built = tuple(_term(f"terms.{i}", t) for i, t in enumerate(terms))
    extra = (
        {f.name: getattr(base, f.name) for f in fields(base) if f.name not in ("name", "terms")}
        if base
        else {}
    )
    return Method(name=name, terms=built, **extra)


def from_row(data: Mapping[str, Any]) -> Method:
    """A row as a YAML file holds it: its terms, and what is the whole row's.

    Raises:
        UserError: what is wrong, by its path.
    """
    for key in data:
        if key not in ROW_KEYS:
            raise UserError(
                f"method.{key}: a row has {', '.join(ROW_KEYS)}.{nearest(str(key), ROW_KEYS)}"
            )
    kinds = kinds_of(Method)
    row = from_data(str(data.get("name", "custom")), data.get("terms"))
    more = {k: checked(f"method.{k}", v, kinds[k]) for k, v in data.items() if k in ROW_KEYS[2:]}
    return replace(row, **more)


def _term(where: str, data: Any) -> Term:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a mapping with {', '.join(_KEYS)}.")
    for key in data:
        if key not in _KEYS:
            raise UserError(f"{where}.{key}: no such part of a term.{nearest(str(key), _KEYS)}")
    for key in ("source", "labeller", "objective"):
        if key not in data:
            raise UserError(f"{where}: '{key}' is missing.")
    kinds = get_type_hints(Term)
    rest: dict[str, Any] = {
        k: checked(f"{where}.{k}", data[k], float if k in ("weight", "share") else kinds[k])
        for k in PLAIN
        if k in data
    }
    settings = data.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}.settings: must be a mapping, as {{beta: 0.1}}, not {settings!r}.")
    term = Term(
        source=_build(f"{where}.source", data["source"], SOURCES),
        labeller=_build(f"{where}.labeller", data["labeller"], LABELLERS),
        objective=_find(f"{where}.objective", data["objective"], OBJECTIVES),
        settings={k: plain(v) for k, v in settings.items()},
        **rest,
    )
    check_term(where, term)
    return term


def check_term(where: str, term: Term) -> None:
    """Refuse a term whose parts do not fit together or hold values out of range.

    Raises:
        UserError: the path of what is wrong.
    """
    if not 0 < term.share <= 1:
        raise UserError(f"{where}.share: must lie above 0 and up to 1, not {term.share}.")
    for part, named in ((term.source, "source"), (term.labeller, "labeller")):
        _check_part(f"{where}.{named}", part)
    objective = _name(term.objective, OBJECTIVES)
    for key, value in term.settings.items():
        if not term.takes(str(key)):
            takes = [n for n in term.parameters if term.takes(n)]
            raise UserError(
                f"{where}.settings.{key}: {objective} takes {', '.join(takes) or 'no settings'}."
                f"{nearest(str(key), [*takes, *_KEYS])}"
            )
        parameter = term.parameters[key]
        if value != parameter.default and "float" in str(parameter.annotation):
            checked(f"{where}.settings.{key}", value, float)
    labeller = _name(type(term.labeller), LABELLERS)
    if term.labeller.given and not term.source.reads:
        raise UserError(
            f"{where}.labeller: {labeller} reads the data's own responses, which this source draws "
            "instead. Use best_worst or best, or the source offline."
        )
    if getattr(term.labeller, "ties", "drop") == "keep" and not term.takes("label_smoothing"):
        raise UserError(
            f"{where}.labeller.ties: a tie is kept as half a preference (label_smoothing), which "
            f"{objective} does not take. Give ties: drop."
        )
    _check_level(where, term, objective)
    if term.source.num_responses >= term.labeller.least:  # else `methods.check` has its say
        _rehearse(where, term, objective, labeller)


def _check_level(where: str, term: Term, objective: str) -> None:
    """Refuse a level at which the objective does not mean what it says."""
    if term.level != "token" and {"value", "value_old"} & set(term.parameters):
        raise UserError(
            f"{where}.level: {objective} works on each token's value. Give level: token."
        )
    if term.level == "mean" and any(n == "len" or n.startswith("len_") for n in term.parameters):
        raise UserError(
            f"{where}.level: {objective} divides by the length itself. Give level: sequence."
        )


def _rehearse(where: str, term: Term, objective: str, labeller: str) -> None:
    """Bind the objective to what the labeller makes of two made-up prompts."""
    shape = (2, term.source.num_responses, 3)
    score = -torch.arange(1.0, 1 + shape[0] * shape[1] * shape[2]).view(shape)
    samples = Samples(
        prompt=torch.zeros(2, 1, dtype=torch.long), prompt_mask=torch.ones(2, 1, dtype=torch.bool),
        tokens=torch.zeros(shape, dtype=torch.long), mask=torch.ones(shape, dtype=torch.bool),
        finished=torch.ones(shape[:2], dtype=torch.bool), row=torch.arange(2),
        origin=torch.tensor(sources.origins(term.source)).expand(shape[:2]), logp=score,
        ref_logp=score - 1,
        value=score, reward=score.sum(-1).double(),
    )  # fmt: skip
    now = {"logp": score, "value": score, "collision": score, "score": score.sum(-1)}
    try:
        batch, _ = term.labeller(samples, {})
    except Exception:  # a labeller of the user's own may need columns that only real data have
        return
    if "target" in term.parameters and "target" not in batch.data:
        raise UserError(
            f"{where}: {objective} learns the targets that the labeller advantage makes with "
            "baseline: value. Set that baseline, or leave the term out."
        )
    for name, parameter in term.parameters.items():
        role = name.rpartition("_")[2]
        if role in ("chosen", "rejected") and role not in batch.roles:
            raise UserError(
                f"{where}: {objective} compares chosen and rejected, which the labeller {labeller} "
                "does not name. Use given_preference or best_worst."
            )
        given = name in term.settings or name in batch.data
        if term.takes(name) and parameter.default is parameter.empty and not given:
            raise UserError(f"{where}.settings: {objective} needs '{name}', as {{{name}: 0.1}}.")
    try:
        loss_sum(term, samples, batch, now)
    except Exception as error:
        raise UserError(
            f"{where}: {objective} does not work on what {labeller} makes "
            f"at level {term.level}: {error}."
        ) from error
    if "label_smoothing" in batch.data and getattr(term.labeller, "ties", "drop") == "keep":
        half = torch.full_like(batch.data["label_smoothing"], 0.5)
        tied = replace(batch, data={**batch.data, "label_smoothing": half})
        if not loss_sum(term, samples, tied, now)[0].any():
            raise UserError(
                f"{where}.labeller.ties: a tie is kept as half a preference, of which {objective} "
                "learns nothing. Give ties: drop."
            )


def _check_part(where: str, part: Any) -> None:
    """Every field of a source or labeller, and of the parts inside it."""
    for name, kind in kinds_of(type(part)).items():
        value = getattr(part, name)
        if isinstance(value, tuple) and value and is_dataclass(value[0]):
            for i, member in enumerate(value):
                _check_part(f"{where}.{name}.{i}", member)
        elif is_dataclass(value):
            _check_part(f"{where}.{name}", value)
        else:
            checked(f"{where}.{name}", value, kind)


def _build(where: str, data: Any, known: Mapping[str, Callable[..., Any]]) -> Any:
    """A source or labeller from its name, or a mapping of name and fields."""
    values = dict(data) if isinstance(data, Mapping) else {"name": data}
    if "name" not in values:
        raise UserError(f"{where}: 'name' is missing. Known: {', '.join(known)}.")
    name = values.pop("name")
    kind = _find(where, name, known)
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise UserError(f"{where}: '{name}' is no dataclass that could serve here.")
    kinds = kinds_of(kind)
    for key in values:
        if key not in kinds:
            hint = nearest(str(key), kinds)
            raise UserError(f"{where}.{key}: '{name}' has no such setting.{hint}")
    values = {k: _field(f"{where}.{k}", v, kinds[k]) for k, v in values.items()}
    try:
        return kind(**values)
    except TypeError as error:  # a field of the user's own class that has no default
        raise UserError(f"{where}: '{name}': {error}.") from error


def _field(where: str, data: Any, kind: Any) -> Any:
    """A field's value: a plain one, a part of its own, or a pool's members."""
    if get_args(kind)[:1] == (Source,):
        if not isinstance(data, list) or len(data) < 2:
            raise UserError(f"{where}: must be a list of two sources or more.")
        return tuple(_build(f"{where}.{i}", x, SOURCES) for i, x in enumerate(data))
    if is_dataclass(kind):
        values = data if isinstance(data, Mapping) else {}
        return _build(where, {"name": "it", **values}, {"it": kind})  # type: ignore[dict-item]
    choice = next((x for x in get_args(kind) if get_origin(x) is Literal), None)
    return checked(where, data, kind if choice is None or data is None else choice)


def _find(where: str, name: Any, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if not isinstance(name, str):
        raise UserError(f"{where}: must be a name, not {name!r}.")
    if name in known:
        return known[name]
    if ":" not in name:
        raise UserError(
            f"{where}: '{name}' is unknown.{nearest(name, known)} Known: {', '.join(known)}."
        )
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as for `python -m`
    try:
        found = getattr(importlib.import_module(module), attribute)
        inspect.signature(found)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{where}: '{name}' cannot be used: {error}.") from error
    return found


def part_name(part: Any) -> str:
    """A source's or labeller's name in YAML."""
    return _name(type(part), SOURCES | LABELLERS)


def _part(part: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": _name(type(part), known), **_plain_fields(part)}


def _plain_fields(part: Any) -> dict[str, Any]:
    """Fields as YAML holds them; a part inside that is as it is by default is left out."""
    out: dict[str, Any] = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if isinstance(part, sources.Pool):
            out[f.name] = [_part(m, SOURCES) for m in value]
        elif is_dataclass(value):
            if value != type(value)():
                out[f.name] = _plain_fields(value)
        else:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def _name(thing: Any, known: Mapping[str, Callable[..., Any]]) -> str:
    for name, value in known.items():
        if value is thing:
            return name
    return f"{thing.__module__}:{thing.__qualname__}"
