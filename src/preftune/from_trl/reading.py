"""TRL's settings as a user has them: a YAML file, or a command line."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from preftune.config import read_mapping
from preftune.errors import UserError, nearest
from preftune.from_trl.table import Field, Table

_SWITCH_OFF = "no_"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user has: the trainer, and its settings by TRL's names."""

    trainer: str
    values: Mapping[str, Any]


def read(
    table: Table, target: str | None, command: Sequence[str], trainer: str | None = None
) -> Given:
    """Settings of a YAML file, of a command line, or of both.

    Args:
        target: a YAML file, or a whole command line as one text.
        command: a command line in parts, as `trl dpo --beta 0.2`; its flags win over a file.
        trainer: its name, where neither names it.

    Raises:
        UserError: it cannot be read, or belongs to no trainer or to several.
    """
    if target is not None and " " in target.strip() and not Path(target).exists():
        try:
            command = [*shlex.split(target), *command]
        except ValueError as error:  # a quote without its end
            raise UserError(f"import-trl '{target:.40}': {error}.") from error
        target = None
    values = {} if target is None else _file(target)
    named, flags = _command(table, list(command))
    config = flags.pop("config", None)
    if config is not None:
        values |= _file(str(config))
    values = _switched(table, values | flags)
    stated = values.pop("trainer", None)
    if not values:
        raise UserError("import-trl: give a YAML file of TRL's, or its command line after --.")
    return Given(trainer=_trainer(table, trainer or stated or named, values), values=values)


def _file(path: str) -> dict[str, Any]:
    found = read_mapping(Path(path))
    wrong = [k for k in found if not isinstance(k, str)]
    if wrong:
        raise UserError(f"config '{path}': the key {wrong[0]!r} is no text.")
    return {k.replace("-", "_"): v for k, v in found.items()}


def _command(table: Table, words: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The trainer that a command line names, and its flags; a launcher's flags are among them."""
    named = None
    flags: dict[str, Any] = {}
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not word.startswith("--"):
            named = named or _script(table, word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        values = [value] if equals else []
        while not equals and place < len(words) and not words[place].startswith("--"):
            if named is None and values and _script(table, words[place]):
                break  # `accelerate launch --num_processes 2 dpo.py`
            values.append(words[place])
            place += 1
        flags[name.replace("-", "_")] = values[0] if len(values) == 1 else values or "true"
    return named, flags


def _switched(table: Table, values: Mapping[str, Any]) -> dict[str, Any]:
    """With `no_name` read as `name: false`, as TRL's switches have it."""
    known = {f.name for f in table.fields}
    out = {}
    for name, value in values.items():
        bare = name.removeprefix(_SWITCH_OFF)
        off = name not in known and name.startswith(_SWITCH_OFF) and bare in known
        if off and str(value).lower() in ("true", "false"):
            out[bare] = str(value).lower() == "false"
        else:
            out[name] = value
    return out


def _script(table: Table, word: str) -> str | None:
    """The trainer of a word of a command line: `dpo` behind `trl`, or a script's file."""
    stem = PurePath(word).name.removesuffix(".py").replace("-", "_")
    return next((t.name for t in table.trainers.values() if stem in t.scripts), None)


def _trainer(table: Table, named: Any, values: Mapping[str, Any]) -> str:
    if named is not None:
        name = str(named).replace("-", "_").lower()
        found = name if name in table.trainers else _script(table, name)
        if found is None:
            raise UserError(
                f"trainer '{named}' is unknown.{nearest(name, table.trainers)} "
                f"Trainers: {', '.join(table.trainers)}."
            )
        return found
    fields = {t: set(table.of(t)) for t in table.trainers}
    known = set(values) & set().union(*fields.values())
    fits = [t for t, own in fields.items() if known <= own]
    if len(fits) != 1:
        said = f"may be of {', '.join(fits)}" if fits else "are of no one trainer"
        raise UserError(
            f"trainer: these settings {said}. Give --trainer {' or '.join(fits or fields)}."
        )
    return fits[0]


def plain(field: Field | None, value: Any) -> Any:
    """A value as TRL would read it: texts that are numbers, switches or lists become such."""
    if isinstance(value, list):
        return [plain(field, v) for v in value]
    if not isinstance(value, str) or field is None or field.text:
        return value
    word = value.strip()
    if word.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(word.lower())
    for read_as in (int, float, json.loads):
        try:
            return read_as(word)
        except (ValueError, RecursionError):
            continue
    return value


def unknown(table: Table, trainer: str, names: Iterable[str]) -> dict[str, str]:
    """Of names that the trainer's table does not have, why they are ignored."""
    own = table.of(trainer)
    out = {}
    for name in names:
        others = sorted({t for f in table.fields if f.name == name for t in f.of})
        if others:
            out[name] = f"not of this trainer (of {', '.join(others)})"
        elif name not in own:
            hint = nearest(name, own)
            out[name] = f"unknown to TRL {table.version} and to preftune.{hint}"
    return out
