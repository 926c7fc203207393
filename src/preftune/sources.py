"""Where responses come from: the data, the reference, the policy as it is, or several of these."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from preftune.collecting import Context, Data, Source, rows_of
from preftune.numerics import stream_key, uniform
from preftune.policies.base import Policy, Sampler
from preftune.samples import DATA, REFERENCE, Samples, beside, join
from preftune.team import current


@dataclass(frozen=True, kw_only=True)
class Offline:
    """The data set, epoch by epoch. Its round is one minibatch; the last of an epoch is short."""

    take: Literal["all", "chosen", "conditioned", "mismatched"] = "all"
    """all: every response of a row.
    chosen: the first alone (the chosen of a pair, the one of a completion).
    conditioned: each response to its prompt with a control token for good or bad.
    mismatched: all, and the first response of the next row with another prompt, which is scored and
    not trained."""
    responses: int = 2
    """Of a row of the data: 2 of a pair, 1 of a completion (told from the data at the start)."""
    scored: bool = False
    """Rewards are the data's own scores, score_chosen and score_rejected (told at the start: where
    the data have them and no reward is given)."""
    on_policy = False
    draws = False
    passes = 1
    prompts_per_round = None

    @property
    def num_responses(self) -> int:
        """See `Source.num_responses`."""
        single = self.take in ("chosen", "conditioned")
        return 1 if single else self.responses + (self.take == "mismatched")

    @property
    def reads(self) -> int:
        """See `Source.reads`."""
        return 1 if self.take == "chosen" else self.responses

    @property
    def prompts_per_row(self) -> int:
        """See `Source.prompts_per_row`."""
        return self.responses if self.take == "conditioned" else 1

    def next_rows(self, ctx: Context, n: int) -> Tensor:
        """The rows of the data that the next n prompts are of."""
        return ctx.next_rows(max(1, n // self.prompts_per_row), stream_key("Offline"), wrap=False)

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """See `Source.collect`."""
        rows = self.next_rows(ctx, n) if prompts is None else prompts
        out = ctx.rows.samples(rows, responses=[0] if self.take == "chosen" else None)
        reward = _scores(out) if self.scored else None
        out = replace(out, origin=torch.full_like(out.origin, DATA), reward=reward)
        if self.take == "mismatched":
            return replace(beside([out, _mismatched(ctx, rows, out)]), extra=out.extra)
        return _conditioned(out, ctx.sampler) if self.take == "conditioned" else out


def good(samples: Samples) -> Bool[Tensor, "*R N K"]:
    """Which of the data's responses are good: by their label, else the first of a pair."""
    num_responses = samples.tokens.shape[-2]
    if "label" in samples.extra and num_responses == 1:
        return (samples.extra["label"].nan_to_num(nan=1.0) > 0.5).unsqueeze(-1)
    return (torch.arange(num_responses) == 0).expand(samples.finished.shape)


def origins(source: Source) -> list[int]:
    """`Samples.origin` of the responses that a source makes of a prompt; 0 is the policy."""
    if isinstance(source, Pool):
        return [origin for member in source.members for origin in origins(member)]
    own = 0 if source.on_policy else REFERENCE if source.draws else DATA
    return [own] * source.num_responses


_NEAR = 8
"""Rows that are looked at one by one."""


def _mismatched(ctx: Context, rows: Tensor, own: Samples) -> Samples:
    """The first response of the next row with another prompt, as far as the model's context holds
    it. Looked at are the next rows, then ones ever farther off; where all have the prompt, the next
    stays."""
    count = len(ctx.rows)
    far = (2**i for i in range(_NEAR.bit_length(), count.bit_length()) if 2**i < count)

    def row_at(step: int) -> Samples:
        found = ctx.rows.samples((rows + step) % count, responses=[0])
        # what is known of it is known of it behind its own prompt
        return replace(found, reward=None, logp=None, ref_logp=None, value=None)

    found = row_at(1)
    alike = _same_prompt(own, found)
    for step in (*range(2, min(_NEAR + 1, count)), *far):
        if not alike.any():
            break
        other = row_at(step)
        differs = alike & ~_same_prompt(own, other)
        found = beside([found, other]).at(differs.long().unsqueeze(-1))
        alike = alike & ~differs
    return _fitting(found, own, getattr(getattr(ctx.policy, "trunk", None), "context", None))


def _same_prompt(a: Samples, b: Samples) -> Bool[Tensor, "*R N"]:
    """Whether two rounds' prompts are the same, one by one."""
    width = max(a.prompt.shape[-1], b.prompt.shape[-1])
    ids = [
        torch.nn.functional.pad(
            torch.where(x.prompt_mask, x.prompt, -1), (width - x.prompt.shape[-1], 0), value=-1
        )
        for x in (a, b)
    ]
    return (ids[0] == ids[1]).all(-1)


def _fitting(responses: Samples, behind: Samples, context: int | None) -> Samples:
    """Responses cut to the tokens that the context leaves behind the prompts of others."""
    if context is None:
        return responses
    room = (context - behind.prompt_mask.sum(-1))[..., None]
    mask = responses.mask & (torch.arange(responses.mask.shape[-1]) < room[..., None])
    finished = responses.finished & (responses.lengths() <= room)
    return replace(responses, mask=mask, finished=finished)


def _scores(samples: Samples) -> Tensor:
    """The data's own scores of a pair."""
    columns = [samples.extra.get(name) for name in ("score_chosen", "score_rejected")]
    assert all(c is not None and not c.isnan().any() for c in columns), "a row has no score"
    both = torch.stack([c for c in columns if c is not None], -1)
    return both[..., : samples.tokens.shape[-2]]


def _conditioned(samples: Samples, policy: Policy) -> Samples:
    """Each response by itself, its prompt with the control token that its label asks for."""
    axis, num_responses = samples.row.ndim - 1, samples.tokens.shape[-2]

    def flat(x: Tensor) -> Tensor:  # [*R, N, K, ...] -> [*R, N * K, ...]
        return x.flatten(axis, axis + 1)

    prompt, prompt_mask = policy.condition(
        samples.prompt.repeat_interleave(num_responses, axis),
        samples.prompt_mask.repeat_interleave(num_responses, axis),
        flat(good(samples)),
    )
    return Samples(
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=flat(samples.tokens).unsqueeze(-2),
        mask=flat(samples.mask).unsqueeze(-2),
        finished=flat(samples.finished).unsqueeze(-1),
        origin=flat(samples.origin).unsqueeze(-1),
        row=samples.row.repeat_interleave(num_responses, axis),
        reward=None if samples.reward is None else flat(samples.reward).unsqueeze(-1),
    )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Responses drawn once from the reference policy, when a prompt is first met, and kept."""

    samples_per_prompt: int = 4
    """Responses drawn to a prompt."""
    on_policy = False
    draws = True
    passes = 1
    prompts_per_round = None
    reads = 0
    prompts_per_row = 1

    @property
    def num_responses(self) -> int:
        """See `Source.num_responses`."""
        return self.samples_per_prompt

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """See `Source.collect`."""
        assert ctx.reference is not None, "the reference source needs the reference policy"
        key = ctx.key(self)
        rows = ctx.next_rows(n, key, wrap=False) if prompts is None else prompts
        keys = {r: ctx.place << 40 | r for r in rows.tolist()}  # members of a pool keep their own
        fresh = torch.tensor([r for r in rows.tolist() if keys[r] not in ctx.kept])
        if len(fresh):
            drawn = _draw(
                ctx.reference,
                ctx.rows,
                fresh,
                self.samples_per_prompt,
                ctx.draw_key(self),
                fresh,
                REFERENCE,
            )
            drawn = replace(drawn, logp=None)  # the reference's, not the policy's
            for i, row in enumerate(fresh.tolist()):
                ctx.kept[keys[row]] = drawn.take(torch.tensor([i]))
        return join([ctx.kept[keys[r]] for r in rows.tolist()])


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Fresh rounds from the policy as it is when a round begins."""

    samples_per_prompt: int = 2
    """Responses drawn to a prompt."""
    prompts_per_round: int | None = None
    """None: one update's worth, which is fully on-policy at one pass."""
    passes: int = 1
    """Times that a round is gone through: sample reuse."""
    on_policy = True
    draws = True
    reads = 0
    prompts_per_row = 1

    @property
    def num_responses(self) -> int:
        """See `Source.num_responses`."""
        return self.samples_per_prompt

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """See `Source.collect`."""
        if ctx.given is not None:
            return ctx.given
        key = ctx.key(self)
        first = ctx.cursor.drawn
        rows = ctx.next_rows(n, key, wrap=True) if prompts is None else prompts
        counters = first + torch.arange(len(rows))
        return _draw(
            ctx.engine or ctx.sampler,
            ctx.rows,
            rows,
            self.samples_per_prompt,
            ctx.draw_key(self),
            counters,
            ctx.version,
        )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Several sources' responses to the same prompts: the first draws the prompts, the others
    answer them, and K adds up in this order. The data's soft labels do not carry over."""

    members: tuple["Source", ...]
    """Two sources or more; an on-policy one brings passes and prompts_per_round."""

    @property
    def _fresh(self) -> "Source | None":
        return next((m for m in self.members if m.on_policy), None)

    @property
    def on_policy(self) -> bool:
        """See `Source.on_policy`: a member is."""
        return self._fresh is not None

    @property
    def draws(self) -> bool:
        """See `Source.draws`: of the member that brings the prompts."""
        return self.members[0].draws

    @property
    def passes(self) -> int:
        """See `Source.passes`: its on-policy member's."""
        return self._fresh.passes if self._fresh else 1

    @property
    def prompts_per_round(self) -> int | None:
        """See `Source.prompts_per_round`: its on-policy member's."""
        return self._fresh.prompts_per_round if self._fresh else None

    @property
    def num_responses(self) -> int:
        """See `Source.num_responses`."""
        return sum(m.num_responses for m in self.members)

    @property
    def reads(self) -> int:
        """See `Source.reads`."""
        return max(m.reads for m in self.members)

    @property
    def prompts_per_row(self) -> int:
        """See `Source.prompts_per_row`."""
        return 1

    def collect(self, ctx: Context, n: int, prompts: Tensor | None = None) -> Samples:
        """See `Source.collect`."""
        if prompts is None and ctx.given is not None:
            prompts = rows_of(ctx.rows, ctx.given)
        parts: list[Samples] = []
        for place, member in enumerate(self.members):
            parts.append(member.collect(replace(ctx, place=place), n, prompts))
            if prompts is None:  # the same rows in every run of a study
                prompts = parts[0].row.flatten(0, -2)[0] if parts[0].row.ndim > 1 else parts[0].row
        return beside(parts)


def _draw(
    policy: Sampler,
    data: Data,
    rows: Tensor,
    num_responses: int,
    key: int | Tensor,
    counters: Tensor,
    origin: int,
) -> Samples:
    """Sample responses to rows; `counters` [n] name each prompt's own random numbers, whichever
    process draws with them."""

    keys = key[..., None, None] if isinstance(key, Tensor) else key

    def draw(own: Tensor) -> Samples:
        def stream(t: int, shape: tuple[int, ...]) -> Tensor:
            response = torch.arange(shape[-1])
            count = counters[own][:, None] * num_responses + response
            return uniform(keys, t, count.expand(shape))

        prompt, prompt_mask = data.prompts_only(rows[own])
        drawn = policy.sample(prompt, prompt_mask, num_responses, stream, origin)
        return replace(drawn, row=rows[own].expand(*policy.batch_shape, len(own)))

    return current().rows(len(rows), draw)
