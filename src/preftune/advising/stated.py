"""What is common to problems of either kind, and how much is run of each."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

FORMAT = "preftune-problem/1"
LabelSource = Literal["rm_same", "rm_other", "human", "true"]
Kind = Literal["enumerable", "text"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Runs of a problem."""

    settings: int
    """Of each row, at most."""
    selection: tuple[int, ...]
    """Seeds on which settings and best rows are chosen."""
    fresh: tuple[int, ...]
    """And those on which all is measured."""


EFFORT: dict[str, Effort] = {
    "enumerable": Effort(settings=6, selection=(0, 1), fresh=(10, 11, 12, 13)),
    "text": Effort(settings=2, selection=(0,), fresh=(10, 11)),
}
"""By kind: a run of a language model takes a hundred times as long."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Of one response each, in units of one response's forward and backward pass."""

    label: float
    """Of judging a fresh response."""
    sample: float
    """Of drawing one."""
    score: float = 0.3
    """Of one forward pass, as a diagnosis makes over the data."""


@runtime_checkable
class Labelled(Protocol):
    """What is common to their labels."""

    @property
    def source(self) -> LabelSource:
        """Who judges fresh samples."""
        ...


@runtime_checkable
class Stated(Protocol):
    """An enumerable problem (`problem.Problem`) or one of a language model
    (`texts.TextProblem`)."""

    kind: ClassVar[Kind]

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def labels(self) -> Labelled: ...
    @property
    def prices(self) -> Prices: ...
    @property
    def pairs(self) -> Sized: ...
    @property
    def beta(self) -> float: ...
    @property
    def budget(self) -> float: ...
    @property
    def about(self) -> Mapping[str, Any]: ...
    @property
    def shape(self) -> tuple[Any, ...]: ...
    @property
    def digest(self) -> str: ...


def effort(problem: Stated) -> Effort:
    """What is run of it."""
    return EFFORT[problem.kind]
