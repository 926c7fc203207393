"""Where responses come from.

A source is frozen and holds no tensors; what it must remember (how far it is in the data) is a
`Cursor`, kept and saved by the loop. Its random numbers are keyed by what it is.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from preftune.numerics import permutation, stream_key, uniform
from preftune.policies.base import Policy
from preftune.samples import DATA, REFERENCE, Samples


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


@dataclass
class Cursor:
    """How far a source is: all of its state, in a few integers."""

    epoch: int = 0
    position: int = 0
    """Prompts of this epoch already taken."""
    drawn: int = 0
    """Prompts ever taken: the counter of the random stream."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a source may use while it collects."""

    data: Data | None
    """What the source reads, or whose prompts it draws responses to."""
    policy: Policy
    reference: Policy | None
    version: int
    """Optimizer steps that the policy has taken."""
    seed: int
    cursor: Cursor
    kept: dict[int, Samples]
    """What a source drew once and for all, by row of the data."""

    @property
    def rows(self) -> Data:
        """The data, which a source that collects must have."""
        assert self.data is not None, "the source has no data to take prompts from"
        return self.data

    def next_rows(self, n: int, key: int, *, wrap: bool) -> Tensor:
        """The next n rows, in a fresh order each epoch; unless `wrap`, its end cuts them short."""
        total = len(self.rows)
        rows: list[Tensor] = []
        while n > 0:
            order = permutation(stream_key(self.seed, key, "order"), self.cursor.epoch, total)
            part = order[self.cursor.position : self.cursor.position + n]
            rows.append(part)
            self.cursor.position += len(part)
            self.cursor.drawn += len(part)
            n -= len(part)
            if self.cursor.position >= total:
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

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """Responses to the next n prompts, or to the rows given."""
        ...


@dataclass(frozen=True, kw_only=True)
class Offline:
    """The data set, epoch by epoch. Its round is one minibatch; the last of an epoch is short."""

    take: Literal["all", "chosen"] = "all"
    """All responses, or the first alone (the chosen of a pair, the one of a completion)."""
    on_policy = False
    draws = False
    passes = 1
    prompts_per_round = None

    @property
    def num_responses(self) -> int:
        """See `Source.num_responses`."""
        return 1 if self.take == "chosen" else 2

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """See `Source.collect`."""
        rows = ctx.next_rows(n, stream_key("Offline"), wrap=False) if prompts is None else prompts
        out = ctx.rows.samples(rows, responses=[0] if self.take == "chosen" else None)
        return replace(out, origin=torch.full_like(out.origin, DATA))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Responses drawn once from the reference policy, when a prompt is first met, and kept."""

    samples_per_prompt: int = 4
    on_policy = False
    draws = True
    passes = 1
    prompts_per_round = None

    @property
    def num_responses(self) -> int:
        """See `Source.num_responses`."""
        return self.samples_per_prompt

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """See `Source.collect`."""
        assert ctx.reference is not None, "the reference source needs the reference policy"
        key = stream_key(ctx.seed, self)
        rows = ctx.next_rows(n, key, wrap=False) if prompts is None else prompts
        fresh = torch.tensor([int(r) for r in rows if int(r) not in ctx.kept], dtype=torch.long)
        if len(fresh):
            drawn = _draw(
                ctx.reference, ctx.rows, fresh, self.samples_per_prompt, key, fresh, REFERENCE
            )
            for i, row in enumerate(fresh):
                ctx.kept[int(row)] = drawn.take(torch.tensor([i]))
        return join([ctx.kept[int(r)] for r in rows])


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Fresh rounds from the policy as it is when a round begins."""

    samples_per_prompt: int = 2
    prompts_per_round: int | None = None
    """None: one update's worth, which is fully on-policy at one pass."""
    passes: int = 1
    on_policy = True
    draws = True

    @property
    def num_responses(self) -> int:
        """See `Source.num_responses`."""
        return self.samples_per_prompt

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """See `Source.collect`."""
        key = stream_key(ctx.seed, self)
        first = ctx.cursor.drawn
        rows = ctx.next_rows(n, key, wrap=True) if prompts is None else prompts
        counters = first + torch.arange(len(rows))
        return _draw(
            ctx.policy, ctx.rows, rows, self.samples_per_prompt, key, counters, ctx.version
        )


def _draw(
    policy: Policy,
    data: Data,
    rows: Tensor,
    num_responses: int,
    key: int,
    counters: Tensor,
    origin: int,
) -> Samples:
    """Sample responses to rows; `counters` [n] name each prompt's own random numbers."""

    def stream(t: int, shape: tuple[int, ...]) -> Tensor:
        response = torch.arange(shape[-1])
        return uniform(key, t, (counters[:, None] * num_responses + response).expand(shape))

    prompt, prompt_mask = data.prompts_only(rows)
    return replace(policy.sample(prompt, prompt_mask, num_responses, stream, origin), row=rows)


def join(parts: list[Samples]) -> Samples:
    """Concatenate along the prompts; prompts are padded on the left, responses on the right."""
    prompt_width = max(p.prompt.shape[-1] for p in parts)
    width = max(p.tokens.shape[-1] for p in parts)

    def wide(x: Tensor | None, to: int, left: bool) -> Tensor | None:
        if x is None:
            return None
        gap = to - x.shape[-1]
        return torch.nn.functional.pad(x, (gap, 0) if left else (0, gap))

    def cat(name: str) -> Tensor | None:
        values = [getattr(p, name) for p in parts]
        if any(v is None for v in values):
            return None
        if name in ("prompt", "prompt_mask"):
            values = [wide(v, prompt_width, True) for v in values]
        elif name in ("tokens", "mask", "logp", "ref_logp", "value"):
            values = [wide(v, width, False) for v in values]
        return torch.cat(values, parts[0].row.ndim - 1)

    names = ("prompt", "prompt_mask", "tokens", "mask", "finished", "origin", "row")
    optional = ("logp", "ref_logp", "value", "reward")
    return Samples(**{name: cat(name) for name in (*names, *optional)})  # type: ignore[arg-type]
