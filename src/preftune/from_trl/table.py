"""The table of TRL's settings, `fields.yaml`, as objects."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

MAPPED, FIXED, IGNORED = "mapped", "fixed", "ignored"
MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Field:
    """One of TRL's settings, and what becomes of it."""

    name: str
    of: tuple[str, ...]
    """Trainers that have it."""
    kind: str
    """mapped, fixed or ignored."""
    why: str = ""
    to: str = ""
    """The preftune settings, in words."""
    by: str = "same"
    """The rule."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """TRL's, a trainer."""
    ours: tuple[Any, ...] = ()
    """Of a fixed one: the values that mean what preftune does, its own first."""
    given: bool = False
    text: bool = False
    older: bool = False
    launcher: bool = False
    script: bool = False
    """A flag of the trainer's script, in none of the configurations."""
    unless: Mapping[str, Any] = field(default_factory=dict)
    """Values of other fields with which it means nothing."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """What a run of a trainer is here: a row of the table of methods, with values in its places."""

    method: str
    when: Mapping[str, Any] = field(default_factory=dict)
    flat: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[int, ...] = ()
    """Terms of the row that are left out."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """One of TRL's trainers."""

    name: str
    config: str
    """Where its configuration is: `trl.DPOConfig`."""
    scripts: tuple[str, ...]
    groups: bool = False
    """Its batch counts responses, of which several answer a prompt."""
    truncation: bool = False
    """It cuts rows that are too long."""
    differs: tuple[str, ...] = ()
    templates: tuple[Template, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """All of it."""

    version: str
    trainers: Mapping[str, Trainer]
    fields: tuple[Field, ...]

    def of(self, trainer: str) -> dict[str, Field]:
        """The fields that a trainer has, or had, by name."""
        return {f.name: f for f in self.fields if trainer in f.of}


@cache
def table() -> Table:
    """`fields.yaml`, read once."""
    import yaml

    text = (resources.files("preftune.from_trl") / "fields.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    trainers = {
        name: _trainer(name, entry, data["rows"][name], data["differs"])
        for name, entry in data["trainers"].items()
    }
    names = tuple(trainers)
    return Table(
        version=data["version"],
        trainers=trainers,
        fields=tuple(f for entry in data["fields"] for f in _fields(entry, names)),
    )


def _trainer(name: str, entry: dict[str, Any], rows: Any, differs: list[str]) -> Trainer:
    notes = (*differs, *entry.get("differs", ()))
    given = {k: v for k, v in entry.items() if k not in ("scripts", "differs")}
    made = tuple(Template(**row | {"drop": tuple(row.get("drop", ()))}) for row in rows)
    return Trainer(
        name=name, scripts=tuple(entry["scripts"]), differs=notes, templates=made, **given
    )


def _fields(entry: dict[str, Any], names: tuple[str, ...]) -> list[Field]:
    """An entry of one name, or of several that share what is said of them."""
    kind = next(k for k in (FIXED, IGNORED, "to") if k in entry)
    fixed = entry.get("fixed", MISSING)
    ours = () if fixed is MISSING else tuple(fixed) if isinstance(fixed, list) else (fixed,)
    default = entry.get("default", ours[0] if ours else None if kind == "to" else MISSING)
    only = entry.get("only", {})
    out = []
    for name in entry.get("names", [entry.get("name")]):
        of = tuple(only.get(name, entry.get("of", names)))
        defaults = {} if default is MISSING else dict.fromkeys(of, default)
        flags = ("given", "text", "older", "launcher", "script")
        out.append(
            Field(
                name=name, of=of, kind=MAPPED if kind == "to" else kind, ours=ours,
                to=entry.get("to", ""), by=entry.get("by", "same"),
                why=entry.get("why", entry.get(IGNORED, "")),
                defaults=entry.get("defaults", defaults), unless=entry.get("unless", {}),
                **{flag: bool(entry.get(flag)) for flag in flags},
            )
        )  # fmt: skip
    return out
