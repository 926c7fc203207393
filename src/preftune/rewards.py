"""Rewards by name, and the check of what they return.

The kinds of reward stand in `preftune.reward_kinds`, a model that judges in `preftune.judging`.
"""

import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from preftune.errors import UserError, nearest
from preftune.judging import JudgeReward, connect
from preftune.reward_kinds import (
    Classifier,
    Ensemble,
    Function,
    Judged,
    Length,
    Reward,
    Weighted,
    judge,
    raised,
)

__all__ = [
    "LENGTHS",
    "Classifier",
    "Ensemble",
    "Function",
    "JudgeReward",
    "Judged",
    "Length",
    "Reward",
    "Weighted",
    "aimed",
    "is_open",
    "judge",
    "kept",
    "make",
]

LENGTHS = ("min", "mode", "within")


def is_open(reward: Reward | None) -> bool:
    """Whether a bare `length:mode` in it still lacks its target."""
    if isinstance(reward, Weighted):
        return any(is_open(part) for _, part in reward.parts)
    return isinstance(reward, Length) and reward.kind == "mode" and reward.target is None


def aimed(reward: Reward, target: int) -> Reward:
    """The reward with that target where it lacks one."""
    if isinstance(reward, Weighted):
        return Weighted(tuple((weight, aimed(part, target)) for weight, part in reward.parts))
    return Length("mode", target) if is_open(reward) else reward


def kept(reward: Reward, path: Path) -> Reward:
    """The reward with a judge's answers, if it asks one, kept in a file."""
    if isinstance(reward, Weighted):
        return Weighted(tuple((weight, kept(part, path)) for weight, part in reward.parts))
    return reward.kept(path) if isinstance(reward, JudgeReward) else reward


def make(spec: str, classifier: Callable[[str], Reward]) -> Reward:
    """The reward that a config names.

    Args:
        spec: `length:min`, `length:mode[=L]`, `length:within=L`, `file.py:function`,
            `pkg.module:function`, the folder or Hub id of a reward model,
            `ensemble:MODEL,MODEL[;kappa=K]`, or `judge:URL[#MODEL]`.
        classifier: loads a reward model.
    Raises:
        UserError: what is wrong with the name, and the nearest that would do.
    """
    if spec.startswith("length:"):
        return _length(spec)
    if spec.startswith("judge:"):
        return JudgeReward(spec, connect(spec))
    if spec.startswith("ensemble:"):
        return _ensemble(spec, classifier)
    if ".py:" in spec:
        path, _, name = spec.rpartition(":")
        return _function(spec, _from_file(spec, Path(path)), name)
    here = Path(spec).exists()
    if spec.endswith(".py"):
        path = Path(spec)
        names = _functions(_from_file(spec, path))
        raise UserError(
            f"reward '{spec}': name the function too, as {spec}:{names[0] if names else 'NAME'}. "
            f"The file has {', '.join(names) or 'none'}."
        )
    module, colon, name = spec.rpartition(":")
    if colon and not here and module.replace(".", "").replace("_", "").isalnum():
        if not nearest(module, ["length"]):
            return _function(spec, _from_module(spec, module), name)
    if not here and (spec.count("/") > 1 or spec.startswith((".", "/", "~"))):
        raise UserError(
            f"reward '{spec}': no such folder. Train a reward model with preftune reward "
            "--output FOLDER, or give the folder of one."
        )
    if not here and not _HUB_ID.fullmatch(spec):
        raise UserError(f"reward '{spec}' is unknown.{nearest(spec, _examples())} {_KINDS}")
    return classifier(spec)


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_KINDS = (
    "Give length:min, length:mode[=L], length:within=L, file.py:function, pkg.module:function, "
    "the folder or Hub id of a reward model, ensemble:MODEL,MODEL or judge:URL."
)


def _examples() -> list[str]:
    return ["length:min", "length:mode", "length:within=20"]


def _length(spec: str) -> Length:
    kind, _, target = spec.removeprefix("length:").partition("=")
    if kind not in LENGTHS:
        raise UserError(f"reward '{spec}' is unknown.{nearest(spec, _examples())} {_KINDS}")
    if target and (not target.isdigit() or int(target) < 1):
        raise UserError(
            f"reward '{spec}': the length must be a whole number above 0, not '{target}'."
        )
    if kind == "min" and target:
        raise UserError(f"reward '{spec}': length:min takes no length. Use length:within={target}.")
    if kind == "within" and not target:
        raise UserError("reward 'length:within' needs a length: length:within=20.")
    return Length(kind, int(target) if target else None)


def _ensemble(spec: str, classifier: Callable[[str], Reward]) -> Ensemble:
    """`ensemble:MODEL,MODEL,...[;kappa=K]`."""
    listed, *options = spec.removeprefix("ensemble:").split(";")
    names = [name.strip() for name in listed.split(",")]
    if len(names) < 2 or not all(names):
        raise UserError(
            f"reward '{spec}': an ensemble has two reward models or more, "
            "as ensemble:runs/rm-0/model,runs/rm-1/model;kappa=1."
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"reward '{spec}': '{twice}' stands in it twice. Name each model once.")
    kappa = 0.0
    for option in options:
        key, _, value = option.partition("=")
        if key.strip() != "kappa":
            raise UserError(f"reward '{spec}': '{option}' is unknown. An ensemble takes kappa=K.")
        try:
            kappa = float(value)
        except ValueError:
            kappa = math.nan
        if not (math.isfinite(kappa) and kappa >= 0):
            raise UserError(f"reward '{spec}': kappa must be a number of 0 or more, not '{value}'.")
    return Ensemble(tuple(classifier(name) for name in names), kappa)


def _from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        beside = path.parent.glob("*.py") if path.parent.is_dir() else ()
        hint = nearest(path.name, [p.name for p in beside])
        raise UserError(f"reward '{spec}': no such file '{path}'.{hint}")
    module_spec = importlib.util.spec_from_file_location(f"preftune_reward_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward '{spec}': reading the file raised {raised(error)}.") from error
    return module


def _from_module(spec: str, module: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as for `python -m`
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        found = f"{error}" if isinstance(error, ImportError) else raised(error)
        raise UserError(f"reward '{spec}': '{module}' cannot be imported: {found}.") from error


def _functions(module: ModuleType) -> list[str]:
    """Public functions of a module, its own before those that it imports."""
    known = [(n, v) for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    return sorted(
        (n for n, _ in known), key=lambda n: vars(module)[n].__module__ != module.__name__
    )


def _function(spec: str, module: ModuleType, name: str) -> Function:
    found = getattr(module, name, None)
    if not callable(found):
        known = _functions(module)
        has = f" It has {', '.join(known[:5])}." if known else ""
        raise UserError(f"reward '{spec}': has no function '{name}'.{nearest(name, known) or has}")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # a builtin
        parameters = ()
    names = {p.name for p in parameters}
    if "completions" not in names and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise UserError(
            f"reward '{spec}': '{name}' must take (prompts, completions, **columns), "
            f"not ({', '.join(names)})."
        )
    return Function(spec, found)
