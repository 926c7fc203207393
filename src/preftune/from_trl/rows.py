"""A trainer's run as a row of the table of methods, and back.

What a trainer computes is a template (`fields.yaml`: rows): a row whose places take TRL's values. A
row that differs from the table's in settings of their own alone is named; any other is spelled out.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from preftune import building, config, methods, spec
from preftune.config import Config
from preftune.errors import UserError
from preftune.from_trl.derived import ABSENT, DERIVED, losses, weight
from preftune.from_trl.rules import Notes, Settings, Theirs
from preftune.from_trl.table import Template, Trainer
from preftune.labellers.base import Shaping

OF_ROW = ("method", "terms", *methods.SETTINGS)
"""Settings that make the row."""
_TOLD = ("responses", "scored")
"""Fields of sources that are told of the data, when they are read."""
_SHAPING = {f"shaping.{f.name}": f.default for f in fields(Shaping)}


def value_of(theirs: Theirs, name: str) -> Any:
    """A value of TRL's, or what is made of several."""
    return DERIVED[name].there(theirs) if name in DERIVED else theirs.values[name]


def there(theirs: Theirs) -> tuple[Settings, Notes]:
    """The row as settings: its name with settings of their own, or spelled out.

    Raises:
        UserError: preftune has no such loss.
    """
    template = _chosen(theirs)
    data = _terms(template)
    for path, name in template.places.items():
        put(data, path, value_of(theirs, name))
    notes: Notes = {}
    if isinstance(theirs.values.get("beta"), list) and len(theirs.values["beta"]) > 1:
        notes["beta"] = "the first: beta stays as it is"
    if len(losses(theirs)) < 2 and weight(0)(theirs) != 1:
        notes["loss_weights"] = "1: a weight of the only loss moves nothing but the learning rate"
    values = {name: get(data, path) for name, path in template.flat.items()}
    flat = {name: value for name, value in values.items() if value is not None}
    config.load({"method": template.method, **flat})  # a value of another kind is the user's
    base = methods.configure(methods.get(template.method), flat)
    if spec.to_data(base) == data:
        return {"method": template.method, **flat}, notes
    return {"method": {"name": template.method, "terms": [_short(t) for t in data]}}, notes


def _chosen(theirs: Theirs) -> Template:
    for template in theirs.trainer.templates:
        if all(value_of(theirs, k) == v for k, v in template.when.items()):
            return template
    wanted = losses(theirs)
    mine = [t.when for t in theirs.trainer.templates if t.when.get("losses") == wanted]
    if mine:
        other = {k: v for k, v in mine[0].items() if k != "losses" and value_of(theirs, k) != v}
        said = ", ".join(f"{k}: {v}" for k, v in other.items())
        raise UserError(f"loss_type {wanted}: preftune has it with {said} alone.")
    known = [t.when["losses"] for t in theirs.trainer.templates if "losses" in t.when]
    shown = ", ".join(x[0] if len(x) == 1 else str(x).replace("'", "") for x in known)
    raise UserError(
        f"loss_type: preftune has no {' + '.join(wanted)[:200] or 'such loss'}. It has {shown}; "
        "docs/methods.md has others that TRL lacks."
    )


def _terms(template: Template) -> list[dict[str, Any]]:
    """The row's terms with what is constant, as plain data."""
    data = spec.to_data(methods.get(template.method))
    data = [term for i, term in enumerate(data) if i not in template.drop]
    for path, value in template.constants.items():
        put(data, path, value)
    return data


def _parent(data: Any, path: str, *, make: bool) -> tuple[Any, str]:
    """What holds the last part of a dotted path below `terms`."""
    *parts, last = path.split(".")[1:]
    for part in parts:
        if isinstance(data, dict) and part not in data:
            if not make:
                return {}, last
            data[part] = {}
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data, last


def put(data: list[dict[str, Any]], path: str, value: Any) -> None:
    """Set a place of a row's terms; one that holds nothing by default is left out for None."""
    place, last = _parent(data, path, make=value is not ABSENT)
    if value is ABSENT and place.get(last) is None:
        return
    place[last] = value


def get(data: list[dict[str, Any]], path: str) -> Any:
    """The value at a place; None where there is none."""
    place, last = _parent(data, path, make=False)
    return place.get(last)


def _short(term: Mapping[str, Any]) -> dict[str, Any]:
    """A term without what is as it is by default."""
    plain = {"weight": 1.0, "share": 1.0, "level": "sequence", "unit": "sequence", "settings": {}}
    out = {k: v for k, v in term.items() if k not in plain or v != plain[k]}
    for key, known in (("source", spec.SOURCES), ("labeller", spec.LABELLERS)):
        part = dict(term[key])
        usual = {f.name: f.default for f in fields(known[part["name"]]) if f.default is not MISSING}
        kept = {k: v for k, v in part.items() if k == "name" or usual.get(k, MISSING) != v}
        told = {k: v for k, v in kept.items() if k not in _TOLD}
        out[key] = told["name"] if len(told) == 1 else told
    return out


@dataclass(frozen=True, kw_only=True)
class Match:
    """A trainer whose row a configuration's row is."""

    trainer: Trainer
    bound: Mapping[str, Any]
    """TRL's values."""


def match(trainers: Mapping[str, Trainer], config: Config) -> Match:
    """The trainer that computes what a configuration does.

    Raises:
        UserError: TRL has none; the nearest is named.
    """
    row = building.method_of(config)
    mine = settled(spec.to_data(row))
    if row.reference_update != "fixed" or row.target_kl is not None:
        which = "target_kl" if row.target_kl is not None else "reference_update"
        raise UserError(f"{which}: TRL has no such rule. Leave it out.")
    best: tuple[int, str, Template] | None = None
    for trainer in trainers.values():
        for template in trainer.templates:
            off, values = _compare(template, mine)
            if not off:
                return Match(trainer=trainer, bound=_back(template, values))
            if best is None or len(off) < best[0]:
                best = len(off), ", ".join(off[:3]), template
    assert best is not None, "the table has templates"
    raise UserError(
        f"method '{row.name}': TRL has no trainer for it. The nearest that it has is "
        f"'{best[2].method}', which differs in {best[1]}."
    )


def same_row(one: Config, other: Config) -> bool:
    """Whether two configurations train by the same terms, whatever they are called."""
    first, second = (settled(spec.to_data(building.method_of(c))) for c in (one, other))
    return first == second


def _compare(template: Template, mine: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Places where a row is not the template's, and the values in the template's places."""
    theirs = settled(_terms(template))
    free = template.places
    off = [
        path
        for path in dict.fromkeys((*mine, *theirs))
        if path not in free and mine.get(path) != theirs.get(path)
    ]
    values: dict[str, Any] = {}
    for path, name in free.items():
        value = mine.get(path)
        if values.setdefault(name, value) != value:
            off.append(path)
    return off, values


def settled(data: list[dict[str, Any]]) -> dict[str, Any]:
    """Leaves of a row's terms, but for those that the data tell and shaping that does nothing."""
    return {
        path: value
        for path, value in leaves(data).items()
        if path.rpartition(".")[2] not in _TOLD
        and _SHAPING.get(".".join(path.split(".")[-2:]), MISSING) != value
    }


def leaves(data: Any, path: str = "terms") -> dict[str, Any]:
    """Every value below, by its dotted path."""
    if isinstance(data, dict):
        inside = data.items()
    elif isinstance(data, list):
        inside = enumerate(data)
    else:
        return {path: data}
    return {k: v for key, below in inside for k, v in leaves(below, f"{path}.{key}").items()}


def _back(template: Template, values: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's values of a template's."""
    found: dict[str, Any] = {}
    weights: dict[int, Any] = {}
    for name, value in {**template.when, **values}.items():
        made = DERIVED[name].back(value) if name in DERIVED else {name: value}
        weights |= made.pop("loss_weights", {})
        found |= made
    if weights:
        found["loss_weights"] = [weights[i] for i in sorted(weights)]
    return found
