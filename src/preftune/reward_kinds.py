"""What a reward is, and its kinds: lengths, a user's function, reward models and sums of them.

A reward takes a list of judged responses and returns one number for each. `preftune.rewards` makes
them from names and checks what they return.
"""

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from preftune.data import RowError
from preftune.errors import UserError, nearest


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
    ids: list[list[int]] = field(default_factory=list)
    """Token ids, the end token included where the response is finished; empty: not known."""
    finished: list[bool] = field(default_factory=list)
    """Whether each came to its end, or was cut; empty: all did."""
    where: list[str] = field(default_factory=list)
    """File and row of each prompt; empty: not known."""


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
        """Call it with what it takes of prompts, completions, their ids and the data's columns.

        As in TRL, conversational prompts come with conversational completions, and a function may
        be a coroutine. What TRL's trainers log by, `log_extra` and `log_metric`, does nothing here.
        """
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(judged.prompts, judged.completions, strict=True)
        ]
        given = {
            **judged.columns, "log_extra": _unlogged, "log_metric": _unlogged,
            "prompts": judged.prompts, "completions": completions,
            **({"completion_ids": judged.ids} if judged.ids else {}),
        }  # fmt: skip
        parameters = inspect.signature(self.function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        missing = [n for n, p in parameters.items() if _required(p) and n not in given]
        if missing == ["trainer_state"]:
            raise UserError(
                f"reward '{self.name}' takes trainer_state: here a reward does not know the step, "
                "so that the same response has the same reward. Leave the argument out."
            )
        if missing:
            raise UserError(
                f"reward '{self.name}' takes the column '{missing[0]}', which the data do not have "
                f"({', '.join(judged.columns) or 'no further columns'})."
                f"{nearest(missing[0], given)}"
            )
        try:
            found = self.function(
                **{n: v for n, v in given.items() if open_ended or n in parameters}
            )
            return _awaited(found) if inspect.iscoroutine(found) else found
        except (Exception, SystemExit) as error:  # sys.exit() there must not end the run as done
            raise UserError(f"reward '{self.name}' raised {raised(error)}.") from error


def _unlogged(*_: Any, **__: Any) -> None:
    """Stands for TRL's log_extra and log_metric: metrics.jsonl has names of its own."""


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns, also where an event loop runs already, as in a notebook."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _required(parameter: inspect.Parameter) -> bool:
    open_ended = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return parameter.default is parameter.empty and not open_ended


def raised(error: BaseException) -> str:
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
    encode: Callable[[Any, str, bool], list[int]]
    """(prompt, completion, finished) -> ids, the end token included where it is finished."""
    context: int | None = None
    """Tokens that the model takes; None: any number."""
    label_source = "rm_other"

    @torch.no_grad()
    def __call__(self, judged: Judged) -> list[float]:
        """Scores, in batches of equal length (no padding at all)."""
        rows = [self._ids(judged, place) for place in range(len(judged.completions))]
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        scores = [0.0] * len(rows)
        for places in by_length.values():
            for part in (places[s : s + 16] for s in range(0, len(places), 16)):
                found = self._scores(torch.tensor([rows[i] for i in part])).tolist()
                for place, score in zip(part, found, strict=True):
                    scores[place] = score
        return scores

    def check(self, judged: Judged, room: int) -> None:
        """See whether it can read these responses with so many tokens more.

        Raises:
            UserError: which one it cannot.
        """
        for place in range(len(judged.completions)):
            self._ids(judged, place, room)

    def _ids(self, judged: Judged, place: int, room: int = 0) -> list[int]:
        """A response behind its prompt, as the model reads it."""
        prompt = judged.prompts[place]
        row = judged.where[place] if judged.where else f"the prompt {prompt!r:.60}"
        finished = not judged.finished or judged.finished[place]
        try:
            ids = self.encode(prompt, judged.completions[place], finished)
        except (RowError, UserError) as error:
            raise UserError(
                f"reward '{self.name}': it cannot read {row}: {str(error).rstrip('.')}. Leave the "
                "row out, or give a reward model whose chat template takes it."
            ) from error
        if self.context is not None and len(ids) + room > self.context:
            raise UserError(
                f"reward '{self.name}': it takes {self.context} tokens, and {row} may have "
                f"{len(ids) + room} with a response. Give a smaller max_new_tokens or max_length, "
                "or a reward model that takes more."
            )
        return ids

    def _scores(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.model.device)
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

    def each(self, judged: Judged) -> list[list[float]]:
        """Each part's rewards, before the weights; each is checked by itself.

        NaN where a part returned None, which leaves the response to the others.

        Raises:
            UserError: a response that no part judges.
        """
        columns = [judge(r, judged, may_pass=True) for _, r in self.parts]
        for place, row in enumerate(zip(*columns, strict=True)):
            if all(map(math.isnan, row)):
                raise UserError(
                    f"reward: no function of {self.name} judges response {place} "
                    f"({judged.completions[place]!r:.60}): each returned None. "
                    "Let one return a number."
                )
        return columns

    def total(self, columns: Sequence[Sequence[float]]) -> list[float]:
        """The weighted sum of what `each` gave, over the parts that judged."""
        return [
            sum(w * x for (w, _), x in zip(self.parts, row, strict=True) if not math.isnan(x))
            for row in zip(*columns, strict=True)
        ]

    def __call__(self, judged: Judged) -> list[float]:
        """The sum."""
        return self.total(self.each(judged))


@dataclass(frozen=True)
class Ensemble:
    """Several reward models: their mean, less `kappa` standard deviations (a pessimistic reward).

    Where the members disagree, no data told them what is good there; a policy that is trained on
    the plain mean finds such places.
    """

    members: tuple[Reward, ...]
    kappa: float = 0.0
    label_source = "rm_other"

    @property
    def name(self) -> str:
        """As it is written in a config."""
        kappa = f";kappa={self.kappa:g}" if self.kappa else ""
        return f"ensemble:{','.join(m.name for m in self.members)}{kappa}"

    def __call__(self, judged: Judged) -> list[float]:
        """Mean - kappa x spread, one a response."""
        scores = self._scores(judged)
        return (scores.mean(0) - self.kappa * _spread(scores)).tolist()

    def spread(self, judged: Judged) -> list[float]:
        """Standard deviation (unbiased) over the members of each response's reward."""
        return _spread(self._scores(judged)).tolist()

    def _scores(self, judged: Judged) -> Tensor:
        """[members, responses], float64; each member is checked by itself."""
        return torch.tensor([judge(m, judged) for m in self.members], dtype=torch.float64)


def _spread(scores: Tensor) -> Tensor:
    return scores.std(0) if len(scores) > 1 else torch.zeros_like(scores[0])


def judge(reward: Reward, judged: Judged, *, may_pass: bool = False) -> list[float]:
    """The rewards, checked.

    Args:
        may_pass: None for a response leaves it to other rewards, and is NaN here.

    Raises:
        UserError: not one finite number a response.
    """
    given = reward(judged)
    wanted = f"reward '{reward.name}' must return a list of numbers, one a response"
    if isinstance(given, (str, bytes, Mapping)):
        raise UserError(f"{wanted}, not {_shown(given):.80}.")
    try:
        found = list(given)
    except TypeError as error:
        raise UserError(f"{wanted}, not {_shown(given):.80}.") from error
    if len(found) != len(judged.completions):
        raise UserError(
            f"{wanted}, in order: {len(found)} for {len(judged.completions)} responses."
        )
    return [
        math.nan if x is None and may_pass else _number(reward, judged, i, x)
        for i, x in enumerate(found)
    ]


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # somebody else's class; an integer of more digits than Python prints
        return type(value).__name__


def _number(reward: Reward, judged: Judged, place: int, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    # a tensor of several numbers; an integer beyond all floats
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"reward '{reward.name}' returned {_shown(value):.40} for response {place} "
            f"({judged.completions[place]!r:.60}). Return a finite number for each."
        )
    return number
