"""Values of a part's fields, checked against their types and the ranges that names stand for."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from preftune.errors import UserError, nearest

_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (
        ("samples_per_prompt", "prompts_per_round", "passes", "patience"),
        "1 or more",
        lambda x: x >= 1,
    ),
    (
        ("beta", "tau", "clip", "max_weight", "limit", "max_ratio", "target_kl"),
        "above 0",
        lambda x: x > 0,
    ),
    (("kl", "threshold", "no_end_penalty", "mix_scale", "place"), "0 or more", lambda x: x >= 0),
    (("gamma", "lam", "ema_decay"), "0 to 1", lambda x: 0 <= x <= 1),
    (("label_smoothing",), "at least 0 and below 0.5", lambda x: 0 <= x < 0.5),
)


def kinds_of(part: Any) -> dict[str, Any]:
    """The fields of a source or labeller, with their types."""
    hints = get_type_hints(part)
    return {f.name: hints[f.name] for f in fields(part)}


def plain(value: Any) -> Any:
    """YAML reads 1e-3 as text; here it is a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def checked(where: str, value: Any, kind: Any) -> Any:
    """A value of a field, checked against its type and the range that its name stands for."""
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in choices:
            hint = nearest(str(value), map(str, choices))
            raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, choices))}.{hint}")
        return value
    if type(None) in choices and value is None:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(plain(x) for x in value)
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where}: must be true or false, not {value!r}.")
        return value
    whole = int in (kind, *choices)
    if not whole and float not in (kind, *choices):
        return value
    return _number(where, value, whole)


def _number(where: str, value: Any, whole: bool) -> float:
    number = plain(value)
    good = not isinstance(number, bool) and isinstance(number, (int, float))
    if not good or not math.isfinite(number) or (whole and number != int(number)):
        kind_of = "whole number" if whole else "number"
        raise UserError(f"{where}: must be a {kind_of}, not {value!r}.")
    name = where.rpartition(".")[2]
    for names, rule, holds in _RANGES:
        if name in names and not holds(number):
            raise UserError(f"{where}: must be {rule}, not {value!r}.")
    return int(number) if whole else float(number)
