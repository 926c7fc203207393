"""What a source is given and how far it is: the data, a cursor, the context of a collection.

A source is frozen and holds no tensors; what it must remember (how far it is in the data) is a
`Cursor`, kept and saved by the loop. Its random numbers are keyed by what it is.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from preftune.errors import UserError
from preftune.numerics import permutation, stream_key, stream_keys
from preftune.policies.base import Policy, Sampler, Trainable, as_policy
from preftune.samples import Samples


@runtime_checkable
class Data(Protocol):
    """Prompts with the responses that the data hold for them."""

    def __len__(self) -> int: ...
    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        """The data's responses; those at the places `responses`, all if None."""
        ...

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [n, P] and their mask."""
        ...


@runtime_checkable
class Growing(Data, Protocol):
    """Data to which rows are added: an epoch goes through those that came last."""

    def span(self, epoch: int) -> tuple[int, int]:
        """First row of an epoch, and the row behind its last."""
        ...


def span(data: Data, epoch: int) -> tuple[int, int]:
    """First row of an epoch, and the row behind its last: all, of data that stay as they are."""
    return data.span(epoch) if isinstance(data, Growing) else (0, len(data))


@dataclass
class Cursor:
    """How far a source is: all of its state, in a few integers."""

    epoch: int = 0
    position: int = 0
    """Prompts of this epoch already taken."""
    drawn: int = 0
    """Prompts ever taken: the counter of the random stream."""


def shared_seed(seed: int | tuple[int, ...]) -> int:
    """The seed of what all runs of a study share: the order of rows."""
    return seed if isinstance(seed, int) else 0


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a source may use while it collects."""

    data: Data | None
    """What the source reads, or whose prompts it draws responses to."""
    policy: Trainable
    reference: Policy | None
    version: int
    """Optimizer steps that the policy has taken."""
    seed: int | tuple[int, ...]
    """Of a study, one a run."""
    cursor: Cursor
    kept: dict[int, Samples]
    """What a source drew once and for all, by row of the data."""
    place: int = 0
    """Among the members of a pool."""
    given: Samples | None = None
    """Stands in for what an on-policy source would draw."""
    engine: Sampler | None = None
    """Draws in the policy's place."""

    @property
    def sampler(self) -> Policy:
        """The policy, for sources that draw from it or condition on it."""
        return as_policy(self.policy)

    @property
    def rows(self) -> Data:
        """The data, which a source that collects must have."""
        assert self.data is not None, "the source has no data to take prompts from"
        return self.data

    def key(self, source: "Source") -> int:
        """The stream of the source's order: by what it is, and its place inside a pool. It is one
        for all runs of a study, whose data differ row by row."""
        return stream_key(shared_seed(self.seed), *self._name(source))

    def draw_key(self, source: "Source") -> int | Tensor:
        """The stream of the source's draws; of a study, [R]: each run has its own."""
        if isinstance(self.seed, int):
            return stream_key(self.seed, *self._name(source))
        return stream_keys(self.seed, *self._name(source))

    def _name(self, source: "Source") -> list[object]:
        return [source, *([self.place] if self.place else [])]

    def next_rows(self, n: int, key: int, *, wrap: bool) -> Tensor:
        """The next n rows, in a fresh order each epoch; unless `wrap`, its end cuts them short."""
        rows: list[Tensor] = []
        while n > 0:
            first, end = span(self.rows, self.cursor.epoch)
            order = permutation(
                stream_key(shared_seed(self.seed), key, "order"), self.cursor.epoch, end - first
            )
            part = first + order[self.cursor.position : self.cursor.position + n]
            rows.append(part)
            self.cursor.position += len(part)
            self.cursor.drawn += len(part)
            n -= len(part)
            if self.cursor.position >= end - first:
                self.cursor.epoch, self.cursor.position = self.cursor.epoch + 1, 0
                if not wrap:
                    break
        return torch.cat(rows)


@runtime_checkable
class Source(Protocol):
    """Frozen, hashable, no tensors. Equal sources share samples, minibatches and forwards."""

    @property
    def on_policy(self) -> bool:
        """Responses are drawn from the policy as it is trained."""
        ...

    @property
    def draws(self) -> bool:
        """It samples responses (to the prompts set); otherwise it reads the data's."""
        ...

    @property
    def passes(self) -> int:
        """How often a round is gone through: sample reuse."""
        ...

    @property
    def prompts_per_round(self) -> int | None:
        """None: as many as one update takes."""
        ...

    @property
    def num_responses(self) -> int:
        """K."""
        ...

    @property
    def reads(self) -> int:
        """Responses a row that the data must hold for it."""
        ...

    @property
    def prompts_per_row(self) -> int:
        """Prompts that it makes of a row of the data."""
        ...

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """Responses to the next n prompts, or to the rows given."""
        ...


def rows_of(data: Data, samples: Samples) -> Tensor:
    """The rows of the data that hold these prompts, in their order.

    Raises:
        UserError: a prompt that the data do not hold.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    prompt, mask = data.prompts_only(torch.arange(len(data)))
    for row, (ids, keep) in enumerate(zip(prompt, mask, strict=True)):
        places.setdefault(tuple(ids[keep].tolist()), []).append(row)
    found = []
    for place, (ids, keep) in enumerate(zip(samples.prompt, samples.prompt_mask, strict=True)):
        rows = places.get(tuple(ids[keep].tolist()))
        if not rows:
            raise UserError(
                f"samples: prompt {place} stands in no row of the data, whose responses this "
                "method sets beside the samples. Give samples of the data's own prompts."
            )
        found.append(rows.pop(0))
    return torch.tensor(found)
