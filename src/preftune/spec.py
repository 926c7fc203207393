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
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from preftune import labellers, objectives, sources
from preftune.errors import UserError, nearest
from preftune.methods import Method, resolve
from preftune.terms import Term

_SOURCES = {"offline": sources.Offline, "reference": sources.Reference, "on_policy": sources.OnPolicy}
_LABELLERS = {
    "demonstration": labellers.Demonstration,
    "given_preference": labellers.GivenPreference,
    "best_worst": labellers.BestWorst,
    "best": labellers.Best,
    "unlabelled": labellers.Unlabelled,
}
_KEYS = ("source", "labeller", "objective", "settings", "weight", "share", "level", "unit")


def to_data(method: Method) -> list[dict[str, Any]]:
    """The row's terms as plain data, weights resolved."""
    return [
        {
            "source": _part(term.source, _SOURCES),
            "labeller": _part(term.labeller, _LABELLERS),
            "objective": _name(term.objective, {n: getattr(objectives, n) for n in objectives.__all__}),
            "settings": dict(term.settings),
            "weight": term.weight,
            "share": term.share,
            "level": term.level,
            "unit": term.unit,
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
    extra = {f.name: getattr(base, f.name) for f in fields(base) if f.name not in ("name", "terms")} if base else {}
    return Method(name=name, terms=built, **extra)


def _term(where: str, data: Any) -> Term:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: must be a mapping with {', '.join(_KEYS)}.")
    for key in data:
        if key not in _KEYS:
            raise UserError(f"{where}.{key}: no such part of a term.{nearest(str(key), _KEYS)}")
    for key in ("source", "labeller", "objective"):
        if key not in data:
            raise UserError(f"{where}: '{key}' is missing.")
    known = {n: getattr(objectives, n) for n in objectives.__all__}
    rest = {k: data[k] for k in ("weight", "share", "level", "unit") if k in data}
    for key in ("weight", "share"):
        if key in rest and (isinstance(rest[key], bool) or not isinstance(rest[key], (int, float))):
            raise UserError(f"{where}.{key}: must be a number, not {rest[key]!r}.")
    for key in ("level", "unit"):
        if rest.get(key, "token") not in ("sequence", "token"):
            raise UserError(f"{where}.{key}: must be sequence or token, not {rest[key]!r}.")
    if not 0 < rest.get("share", 1.0) <= 1:
        raise UserError(f"{where}.share: must lie above 0 and up to 1, not {rest['share']}.")
    term = Term(
        source=_build(f"{where}.source", data["source"], _SOURCES),
        labeller=_build(f"{where}.labeller", data["labeller"], _LABELLERS),
        objective=_find(f"{where}.objective", data["objective"], known),
        settings=dict(data.get("settings") or {}),
        **rest,
    )
    for key in term.settings:
        if not term.takes(key):
            takes = [n for n in term.parameters if term.takes(n)]
            raise UserError(f"{where}.settings.{key}: {data['objective']} takes {', '.join(takes) or 'no settings'}.")
    return term


def _build(where: str, data: Any, known: Mapping[str, Callable[..., Any]]) -> Any:
    """A source or labeller from its name, or a mapping of name and fields."""
    values = dict(data) if isinstance(data, Mapping) else {"name": data}
    name = values.pop("name", None)
    kind = _find(where, name, known)
    allowed = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in allowed:
            raise UserError(f"{where}.{key}: '{name}' has no such setting.{nearest(str(key), allowed)}")
    return kind(**values)


def _find(where: str, name: Any, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if not isinstance(name, str):
        raise UserError(f"{where}: must be a name, not {name!r}.")
    if name in known:
        return known[name]
    if ":" not in name:
        raise UserError(f"{where}: '{name}' is unknown.{nearest(name, known)} Known: {', '.join(known)}.")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}: '{name}' cannot be imported: {error}.") from error


def _part(part: Any, known: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    return {"name": _name(type(part), known), **asdict(part)}


def _name(thing: Any, known: Mapping[str, Callable[..., Any]]) -> str:
    for name, value in known.items():
        if value is thing:
            return name
    return f"{thing.__module__}:{thing.__qualname__}"
