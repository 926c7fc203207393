"""Flags from the configuration: one for each flat setting that a command has a use for."""

import dataclasses
import types
import typing
from collections.abc import Collection, Sequence
from typing import Annotated, Any

from preftune.config import Adapter, Config, suggest
from preftune.errors import UserError

GENERATION = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_new_tokens", "stop",
    "samples_per_prompt", "seed",
)  # fmt: skip
MODEL = ("model", "dtype", "device", "threads", "share_prefix", "template", "system_prompt")
DATA = ("max_rows", "max_length", "truncation", "bad_rows")
JUDGES = ("reference", "reward", "gold", "reward_weights")
EVALUATE = (
    *MODEL, "prompts", "data", *JUDGES, "judge", "retention", *GENERATION, *DATA,
    "micro_batch_tokens",
)  # fmt: skip
SAMPLE = (*MODEL, "prompts", *GENERATION, *DATA)
DIAGNOSE = (
    *MODEL, "data", "eval_data", "reward", "reward_weights", "label_source", "max_new_tokens",
    "seed", "output", *DATA, "micro_batch_tokens", "beta", "learning_rate", "batch_size",
)  # fmt: skip
PIPELINE = (
    *MODEL, "data", "eval_data", "output", "max_steps", "batch_size", "learning_rate",
    "max_new_tokens", "seed", *DATA, "micro_batch_tokens",
)  # fmt: skip
LABEL = (
    *MODEL, "prompts", *(g for g in GENERATION if g != "samples_per_prompt"), *DATA, "output",
)  # fmt: skip
COMPARE = tuple(
    name for name in Config.model_fields
    if name not in {
        "method", "terms", "eval_fraction", "max_steps", "epochs", "judge", "retention", "best_by",
        "eval_every", "save_every", "log_every", "trackers", "optimizer", "follow",
    }
)  # fmt: skip
INSPECT = (*MODEL, "data", *DATA)
TRAIN = tuple(name for name in Config.model_fields if name != "terms")


Extra = tuple[str, Any, Any, str]
"""Name, type, default and help of a flag that is no setting."""


def parse(
    command: str,
    description: str,
    settings: Sequence[str],
    args: Sequence[str],
    extra: Sequence[Extra] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a command's flags with tyro; their values are checked by `Config`, as YAML's are.

    Returns:
        the settings given, as text, and the extra flags.

    Raises:
        UserError: a flag that the command does not have, or one without its value.
    """
    import tyro

    switches = {"resume", *(name for name, kind, *_ in extra if kind is bool)}
    _check_names(command, args, [*settings, *(name for name, *_ in extra)], switches)
    parts: list[Any] = []
    for name, kind, default, text in extra:
        shown = isinstance(default, (int, str)) and not isinstance(default, bool)
        hint = f"(default: {default})" if shown else ""
        noted = Annotated[kind, tyro.conf.arg(help=text, help_behavior_hint=hint)]
        parts.append((name, noted, dataclasses.field(default=default)))
    for name in settings:
        entry = Config.model_fields[name]
        default = entry.get_default()
        hint = "" if default is None or isinstance(default, bool) else f"(default: {default})"
        kind, metavar = _kind(name, entry.annotation)
        help_text = tyro.conf.arg(help=entry.description, help_behavior_hint=hint, metavar=metavar)
        none = False if kind is bool else None
        parts.append((name, Annotated[kind, help_text], dataclasses.field(default=none)))
    shape = dataclasses.make_dataclass("Flags", parts, kw_only=True)
    found = tyro.cli(
        shape,
        prog=f"preftune {command}",
        description=description,
        args=list(args),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name in settings
        if (value := values[name]) is not None and value is not False
    }
    return given, {name: values[name] for name, *_ in extra}


def _check_names(
    command: str, args: Sequence[str], known: Sequence[str], switches: Collection[str]
) -> None:
    """Every flag is one that the command has, and has its value."""
    for place, arg in enumerate(args):
        name, equals, _ = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not arg.startswith("--") or name in ("help", ""):
            continue
        flag = f"--{name.replace('_', '-')}"
        if name not in known:
            if name in TRAIN:
                raise UserError(
                    f"flag '{flag}': preftune {command} has no use for it. Leave it out."
                )
            close = suggest(name, known).replace("'", "'--", 1).replace("_", "-")
            raise UserError(f"flag '{flag}' is unknown.{close} See preftune {command} --help.")
        last = place + 1 == len(args) or args[place + 1].startswith("--")
        if name not in switches and not equals and last:
            raise UserError(f"flag '{flag}': its value is missing. See preftune {command} --help.")


def _kind(name: str, annotation: Any) -> tuple[Any, str]:
    """What a setting is read as, and what stands for its value in --help: choices, or a type."""
    if name == "method":
        return str | None, "NAME"
    if name in ("reward", "reward_weights", "stop", "trackers"):
        plain = {"reward_weights": "FLOAT", "trackers": "NAME"}.get(name, "STR")
        return tuple[str, ...] | None, f"{plain} ..."
    if name == "adapter":
        kinds = typing.get_args(Adapter.model_fields["kind"].annotation)
        return str | None, "{" + ",".join(kinds) + "}"
    if annotation is bool:
        return bool, ""
    plain = annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        plain = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(plain) is typing.Literal:
        return str | None, "{" + ",".join(typing.get_args(plain)) + "}"
    return str | None, plain.__name__.upper()
