"""Rewards: lengths, a user's function, a reward model.

A reward takes a list of judged responses and returns one number for each. What it returns is
checked: a reward of the wrong length or one that is not finite ends the run with a user's error.
"""

import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from preftune.errors import UserError, nearest

LENGTHS = ("min", "mode", "within")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Responses to be judged, one entry each."""

    prompts: list[Any]
    """Text, or a role/content list, as the data gave it."""
    completions: list[str]
    """Text without special tokens."""
    tokens: list[int]
    """Response tokens, the end token not counted."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Further columns of the prompt's row."""


@runtime_checkable
class Reward(Protocol):
    """Judges responses."""

    @property
    def name(self) -> str:
        """As it is written in a config."""
        ...

    @property
    def label_source(self) -> str:
        """Who judged."""
        ...

    def __call__(self, judged: Judged) -> Sequence[float]: ...


@dataclass(frozen=True)
class Length:
    """A reward of the response's tokens alone (the synthetic problems of arXiv 2404.14367)."""

    kind: str
    target: int | None = None
    label_source = "true"

    @property
    def name(self) -> str:
        """As it is written in a config."""
        target = "" if self.target is None else f"={self.target}"
        return f"length:{self.kind}{target}"

    def __call__(self, judged: Judged) -> list[float]:
        """min: -tokens; mode=L: -|tokens - L|; within=L: -max(0, tokens - L), which saturates."""
        if self.kind == "min":
            return [-float(n) for n in judged.tokens]
        assert self.target is not None, "length:mode without a target is measured before the run"
        if self.kind == "mode":
            return [-float(abs(n - self.target)) for n in judged.tokens]
        return [-float(max(0, n - self.target)) for n in judged.tokens]


@dataclass(frozen=True)
class Function:
    """A user's `(prompts, completions, **columns) -> list[float]`, with TRL's signature."""

    name: str
    function: Callable[..., Any]
    label_source = "true"

    def __call__(self, judged: Judged) -> Any:
        """Call it with those of prompts, completions and the data's columns that it takes.

        Conversational prompts come with conversational completions, as in TRL.
        """
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(judged.prompts, judged.completions, strict=True)
        ]
        given = {**judged.columns, "prompts": judged.prompts, "completions": completions}
        parameters = inspect.signature(self.function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        missing = [n for n, p in parameters.items() if _required(p) and n not in given]
        if missing:
            raise UserError(
                f"reward '{self.name}' takes the column '{missing[0]}', which the data do not have "
                f"({', '.join(judged.columns) or 'no further columns'})."
                f"{nearest(missing[0], given)}"
            )
        try:
            return self.function(
                **{n: v for n, v in given.items() if open_ended or n in parameters}
            )
        except (Exception, SystemExit) as error:  # sys.exit() there must not end the run as done
            raise UserError(f"reward '{self.name}' raised {_raised(error)}.") from error


def _required(parameter: inspect.Parameter) -> bool:
    open_ended = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return parameter.default is parameter.empty and not open_ended


def _raised(error: BaseException) -> str:
    """`KeyError: 'x' (file.py, line 4)`: where it was raised, or where the syntax breaks."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{kind}: {error.msg} ({error.filename}, line {error.lineno})"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{kind}: {error} ({last.filename}, line {last.lineno})"


@dataclass(frozen=True)
class Classifier:
    """A sequence-classification model with one output, read at the last real token.

    The position is found by length, never by the padding id, which in many models is the end id.
    """

    name: str
    model: Any
    encode: Callable[[Any, str], list[int]]
    """(prompt, completion) -> ids, the end token included."""
    label_source = "rm_other"

    @torch.no_grad()
    def __call__(self, judged: Judged) -> list[float]:
        """Scores, in batches of equal length (no padding at all)."""
        rows = [self.encode(p, c) for p, c in zip(judged.prompts, judged.completions, strict=True)]
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        scores = [0.0] * len(rows)
        for places in by_length.values():
            for part in (places[s : s + 16] for s in range(0, len(places), 16)):
                for place, score in zip(
                    part, self._scores(torch.tensor([rows[i] for i in part])), strict=True
                ):
                    scores[place] = float(score)
        return scores

    def _scores(self, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        if hasattr(self.model, "score"):  # decoders: the head stands on the trunk's last position
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            return self.model.score(hidden[:, -1]).squeeze(-1)
        return self.model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of rewards."""

    parts: tuple[tuple[float, Reward], ...]

    @property
    def name(self) -> str:
        """The parts' names with their weights."""
        return " + ".join(f"{w:g} x {r.name}" for w, r in self.parts)

    @property
    def label_source(self) -> str:
        """The parts', where they agree."""
        found = {r.label_source for _, r in self.parts}
        return found.pop() if len(found) == 1 else "rm_other"

    def __call__(self, judged: Judged) -> list[float]:
        """The sum; each part is checked by itself."""
        columns = [judge(r, judged) for _, r in self.parts]
        return [
            sum(w * x for (w, _), x in zip(self.parts, row, strict=True))
            for row in zip(*columns, strict=True)
        ]


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


def judge(reward: Reward, judged: Judged) -> list[float]:
    """The rewards, checked.

    Raises:
        UserError: not one finite number a response.
    """
    given = reward(judged)
    wanted = f"reward '{reward.name}' must return a list of numbers, one a response"
    if isinstance(given, (str, bytes, Mapping)):
        raise UserError(f"{wanted}, not {given!r:.80}.")
    try:
        found = list(given)
    except TypeError as error:
        raise UserError(f"{wanted}, not {given!r:.80}.") from error
    if len(found) != len(judged.completions):
        raise UserError(
            f"{wanted}, in order: {len(found)} for {len(judged.completions)} responses."
        )
    return [_number(reward, judged, i, x) for i, x in enumerate(found)]


def _number(reward: Reward, judged: Judged, place: int, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several numbers
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"reward '{reward.name}' returned {value!r:.40} for response {place} "
            f"({judged.completions[place]!r:.60}). Return a finite number for each."
        )
    return number


def make(spec: str, classifier: Callable[[str], Reward]) -> Reward:
    """The reward that a config names.

    Args:
        spec: `length:min`, `length:mode[=L]`, `length:within=L`, `file.py:function`,
            `pkg.module:function`, or the folder or Hub id of a reward model.
        classifier: loads a reward model.
    Raises:
        UserError: what is wrong with the name, and the nearest that would do.
    """
    if spec.startswith("length:"):
        return _length(spec)
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
    if not here and not _HUB_ID.fullmatch(spec):
        raise UserError(f"reward '{spec}' is unknown.{nearest(spec, _examples())} {_KINDS}")
    return classifier(spec)


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_KINDS = (
    "Give length:min, length:mode[=L], length:within=L, file.py:function, pkg.module:function, "
    "or the folder or Hub id of a reward model."
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
        raise UserError(f"reward '{spec}': reading the file raised {_raised(error)}.") from error
    return module


def _from_module(spec: str, module: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as for `python -m`
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        found = f"{error}" if isinstance(error, ImportError) else _raised(error)
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
