"""Rewards: lengths, a user's function, a reward model.

A reward takes a list of judged responses and returns one number for each. What it returns is
checked: a reward of the wrong length or one that is not finite ends the run with a user's error.
"""

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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

    name: str
    label_source: str

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

    def __call__(self, judged: Judged) -> list[float]:
        """Call it with the columns that it takes.

        Conversational prompts come with conversational completions, as in TRL.
        """
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(judged.prompts, judged.completions, strict=True)
        ]
        parameters = inspect.signature(self.function).parameters.values()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        columns = {k: v for k, v in judged.columns.items() if open_ended or k in names}
        try:
            return self.function(prompts=judged.prompts, completions=completions, **columns)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"reward '{self.name}' raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})."
            ) from error


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


def judge(reward: Reward, judged: Judged) -> list[float]:
    """The rewards, checked.

    Raises:
        UserError: not one finite number a response.
    """
    given = reward(judged)
    try:
        values = [float(x) for x in given]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward '{reward.name}' must return a list of numbers, not {given!r:.80}."
        ) from error
    if len(values) != len(judged.completions):
        raise UserError(
            f"reward '{reward.name}' returned {len(values)} numbers for {len(judged.completions)} responses; "
            "return one a response, in order."
        )
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise UserError(
                f"reward '{reward.name}' returned {value} for response {i} "
                f"({judged.completions[i]!r:.60}); return a finite number."
            )
    return values


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
        return Function(spec, _from_file(spec, Path(path), name))
    if ":" in spec and not Path(spec).exists():
        module, _, name = spec.rpartition(":")
        if (
            module in ("length", "lenght", "len")
            or not module.replace(".", "").replace("_", "").isalnum()
        ):
            raise UserError(f"reward '{spec}' is unknown.{nearest(spec, _examples())} {_KINDS}")
        return Function(spec, _from_module(spec, module, name))
    if "/" not in spec and not Path(spec).exists():
        raise UserError(f"reward '{spec}' is unknown.{nearest(spec, _examples())} {_KINDS}")
    return classifier(spec)


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


def _from_file(spec: str, path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise UserError(f"reward '{spec}': no such file '{path}'.")
    module_spec = importlib.util.spec_from_file_location(f"preftune_reward_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"reward '{spec}': reading the file raised {type(error).__name__}: {error} "
            f"({last.filename}, line {last.lineno})."
        ) from error
    return _function(spec, module, name)


def _from_module(spec: str, module: str, name: str) -> Callable[..., Any]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as for `python -m`
    try:
        return _function(spec, importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(
            f"reward '{spec}': module '{module}' cannot be imported: {error}."
        ) from error


def _function(spec: str, module: Any, name: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(f"reward '{spec}': has no function '{name}'.{nearest(name, known)}")
    return found
