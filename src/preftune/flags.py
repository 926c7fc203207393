"""Flags from the configuration: one for each flat setting that a command has a use for."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from preftune.config import Config

GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "samples_per_prompt", "seed")
MODEL = ("model", "dtype", "device", "threads", "share_prefix", "template", "system_prompt")
DATA = ("max_rows", "max_length", "truncation", "bad_rows")
EVALUATE = (
    *MODEL, "reference", "prompts", "data", "reward", "gold", "reward_weights", *GENERATION, *DATA, "micro_batch_tokens",
)  # fmt: skip
SAMPLE = (*MODEL, "prompts", *GENERATION, *DATA)
INSPECT = (*MODEL, "data", *DATA)
TRAIN = tuple(name for name in Config.model_fields if name != "terms")


def parse(
    command: str, description: str, settings: Sequence[str], args: Sequence[str],
    extra: Sequence[tuple[str, Any, Any, str]] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Read a command's flags with tyro.

    Args:
        extra: (name, type, default, help) of flags that are no settings.
    Returns:
        the settings given, and the extra flags. A wrong flag prints the nearest and exits with 2.
    """
    import tyro

    parts: list[Any] = []
    for name, kind, default, text in extra:
        hint = f"(default: {default})" if isinstance(default, (int, str)) and not isinstance(default, bool) else ""
        noted = Annotated[kind, tyro.conf.arg(help=text, help_behavior_hint=hint)]
        parts.append((name, noted, dataclasses.field(default=default)))
    for name in settings:
        entry = Config.model_fields[name]
        default = entry.get_default()
        hint = "" if default is None or isinstance(default, bool) else f"(default: {default})"
        kind = _kind(name, entry.annotation)
        noted = Annotated[kind, tyro.conf.arg(help=entry.description, help_behavior_hint=hint, metavar=_metavar(kind))]
        parts.append((name, noted, dataclasses.field(default=None)))
    shape = dataclasses.make_dataclass("Flags", parts, kw_only=True)
    found = tyro.cli(shape, prog=f"preftune {command}", description=description, args=list(args))
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    own = {name for name, *_ in extra}
    given = {k: (list(v) if isinstance(v, tuple) else v) for k, v in values.items() if k not in own and v is not None}
    return given, {k: v for k, v in values.items() if k in own}


def _metavar(kind: Any) -> str:
    """What stands for the value in --help: its choices, or its type."""
    (plain,) = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(plain) is typing.Literal:
        return "{" + ",".join(typing.get_args(plain)) + "}"
    if typing.get_origin(plain) is tuple:
        return f"{typing.get_args(plain)[0].__name__.upper()} ..."
    return plain.__name__.upper()


def _kind(name: str, annotation: Any) -> Any:
    """A setting's type as a flag, which may be left out; structures come from YAML alone."""
    if name == "method":
        return str | None
    if name == "reward":
        return tuple[str, ...] | None
    if name == "reward_weights":
        return tuple[float, ...] | None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return annotation
    return typing.Optional[annotation]  # noqa: UP045 (a Literal has no `|` on every Python)
