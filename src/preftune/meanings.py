"""What the settings of a row mean, read from where they are defined.

A field's meaning is the text under it in its class; that of an objective's setting stands in the
`Args:` of its docstring. So a user's own parts are explained like ours.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from preftune import objectives
from preftune.method import Method, resolve
from preftune.spec import LABELLERS, SOURCES, part_name
from preftune.terms import PLAIN


def of_fields(part: type) -> dict[str, str]:
    """Meaning of each field of a dataclass that has text under it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    except (OSError, TypeError, SyntaxError):  # made at run time
        return {}
    body = tree.body[0].body  # type: ignore[attr-defined]
    out = {}
    for field, after in zip(body, body[1:], strict=False):
        text = getattr(getattr(after, "value", None), "value", None)
        if isinstance(field, ast.AnnAssign) and isinstance(text, str):
            out[ast.unparse(field.target)] = _one_line(text)
    return out


def of_arguments(function: Callable[..., Any]) -> dict[str, str]:
    """Meaning of each argument that the docstring's `Args:` explains."""
    _, found, rest = (inspect.getdoc(function) or "").partition("Args:\n")
    if not found:
        return {}
    block = re.split(r"\n(?=\S)", textwrap.dedent(rest))[0]
    entries = re.split(r"(?m)^(?=\S)", textwrap.dedent(block.split("\n\n")[0]))
    pairs = (entry.partition(":") for entry in entries if ":" in entry)
    return {n.strip(): _one_line(text) for name, _, text in pairs for n in name.split(",")}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def of_row(method: Method) -> list[dict[str, Any]]:
    """Every setting of a row: its path as --set takes it, its value, its meaning."""
    out: list[dict[str, Any]] = []
    for i, term in enumerate(resolve(method).terms):
        where = f"terms.{i}"
        for named in ("source", "labeller"):
            part = getattr(term, named)
            out.append(
                {"path": f"{where}.{named}", "value": part_name(part), "meaning": _first(part)}
            )
            out += _of_part(f"{where}.{named}", part)
        known = of_arguments(term.objective)
        name = term.objective.__name__
        out.append({"path": f"{where}.objective", "value": name, "meaning": _first(term.objective)})
        for key, parameter in term.parameters.items():
            if term.takes(key):
                value = term.settings.get(key, parameter.default)
                value = None if value is parameter.empty else value
                out.append(
                    {"path": f"{where}.{key}", "value": value, "meaning": known.get(key, "")}
                )
        of_term = of_fields(type(term))
        for key in PLAIN:
            value = getattr(term, key)
            out.append({"path": f"{where}.{key}", "value": value, "meaning": of_term.get(key, "")})
    return out


def _of_part(where: str, part: Any) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    known = of_fields(type(part))
    for f in fields(part):
        value = getattr(part, f.name)
        path = f"{where}.{f.name}"
        if is_dataclass(value):
            out += _of_part(path, value)
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for i, member in enumerate(value):
                name = part_name(member)
                out.append({"path": f"{path}.{i}", "value": name, "meaning": _first(member)})
                out += _of_part(f"{path}.{i}", member)
        else:
            out.append({"path": path, "value": value, "meaning": known.get(f.name, "")})
    return out


def _first(thing: Any) -> str:
    """The first sentence of what is said of a part."""
    whole = isinstance(thing, type) or not is_dataclass(thing)
    text = inspect.getdoc(thing if whole else type(thing))
    return _one_line((text or "").split("\n\n")[0])


def of_parts() -> dict[str, list[dict[str, Any]]]:
    """Every part that a row in YAML can name: sources, labellers, objectives, with settings."""

    def dataclass_part(name: str, kind: Any) -> dict[str, Any]:
        made = kind.__dataclass_fields__
        known = of_fields(kind)
        return {
            "name": name,
            "meaning": _first(kind),
            "settings": {n: known.get(n, "") for n in made},
        }

    def objective(name: str) -> dict[str, Any]:
        function = getattr(objectives, name)
        known = of_arguments(function)
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "baseline"]
        return {
            "name": name,
            "meaning": _first(function),
            "settings": {n: known.get(n, "") for n in names},
        }

    return {
        "sources": [dataclass_part(n, k) for n, k in SOURCES.items()],
        "labellers": [dataclass_part(n, k) for n, k in LABELLERS.items()],
        "objectives": [objective(n) for n in objectives.__all__],
    }
