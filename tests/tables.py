"""A world of tables for tests: states, arms, one token a response; every number can be worked out.

With a run axis too: data and policies of shape (R,).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preftune import loop, methods
from preftune.policies.categorical import Categorical, TabularReward
from preftune.rounds import World
from preftune.samples import DATA, Samples

STATES, ARMS = 6, 5


@dataclass(frozen=True)
class Table:
    """What the data hold: for each state the arms of its row."""

    rows: tuple[tuple[int, ...], ...] = tuple((s % ARMS, (s + 1) % ARMS) for s in range(STATES))
    runs: tuple[int, ...] = ()
    extra: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Columns of the rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        prompt = torch.as_tensor(index)[:, None].expand(*self.runs, len(index), 1)
        return prompt, torch.ones_like(prompt, dtype=torch.bool)

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        prompt, prompt_mask = self.prompts_only(index)
        arms = torch.tensor(self.rows)[torch.as_tensor(index)]
        arms = arms if responses is None else arms[:, responses]
        arms = arms.expand(*self.runs, *arms.shape)
        tokens = arms.unsqueeze(-1)
        row = torch.as_tensor(index).expand(*self.runs, len(index))
        columns = {k: torch.tensor(v, dtype=torch.float64)[index] for k, v in self.extra.items()}
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            finished=torch.ones_like(arms, dtype=torch.bool),
            origin=torch.full_like(arms, DATA), row=row,
            extra={k: v.expand(*self.runs, *v.shape) for k, v in columns.items()},
        )  # fmt: skip


def by_arm(samples: Samples) -> Tensor:
    """The reward of an arm is its number."""
    return samples.tokens.squeeze(-1).double()


def logits(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_world(
    name: str = "dpo",
    *,
    reward: Callable[[Samples], Tensor] | None = by_arm,
    seed: int = 0,
    batch_size: int = 4,
    table: Table | None = None,
    shape: tuple[int, int] = (STATES, ARMS),
    at_reference: bool = False,
    **more: Any,
) -> World:
    """A table of logits with what the row of that name needs, for one run or for (R,) of them.

    Args:
        at_reference: the policy starts as the reference.
    """
    table = table or Table()
    row = methods.get(name)
    start, anchor = (logits(100 * seed + i, *table.runs, *shape) for i in (1, 2))
    if "score" in row.outputs:
        policy: Any = TabularReward(torch.zeros_like(start))
    else:
        controls = any(getattr(t.source, "take", "") == "conditioned" for t in row.terms)
        policy = Categorical(
            anchor if at_reference else start, value_head="value" in row.needs, controls=controls
        )
    return World(**{
        "policy": policy, "reference": Categorical(anchor), "data": table, "prompts": table,
        "reward": reward, "seed": seed, "batch_size": batch_size, "micro_batch_tokens": None,
    } | more)  # fmt: skip


def row_of(name: str, **settings: Any) -> methods.Method:
    return methods.resolve(methods.configure(methods.get(name), settings))


def gradient(*args: Any) -> tuple[Tensor | None, dict[str, Any]]:
    """An update's loss and metrics; its gradient stands in the parameters."""
    found = loop.gradient(*args)
    return found.loss, found.measures.result()


def begin(
    row: methods.Method, world: World, max_steps: int = 6, rate: float = 0.05, **more: Any
) -> tuple[loop.State, loop.Settings]:
    settings = loop.Settings(max_steps=max_steps, learning_rate=rate, **more)
    return loop.start(row, world, settings), settings


def run(
    row: methods.Method, world: World, max_steps: int = 6, rate: float = 0.05, **more: Any
) -> tuple[loop.State, list[dict[str, Any]]]:
    """A whole run, and what it logged."""
    state, settings = begin(row, world, max_steps, rate, **more)
    logged: list[dict[str, Any]] = []
    hooks = loop.Hooks(log=lambda step, metrics: logged.append({"step": step, **metrics}))
    loop.advance(state, settings, hooks)
    return state, logged


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scored(
    reward: Any = None,
    *,
    logp: Any = None,
    ref_logp: Any = None,
    value: Any = None,
    lengths: Any = None,
    finished: Any = None,
    origin: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Samples:
    """A scored round from nested lists: reward [*R, N, K]; logp, ref_logp, value [*R, N, K, T], or
    without T where responses have one token; response k of a prompt is token k, T times."""
    given = {"logp": logp, "ref_logp": ref_logp, "value": value}
    tensors = {k: None if v is None else f64(v) for k, v in given.items()}
    shape = _shape(reward, lengths, finished, extra, tensors)
    tokens_of = {k: _with_tokens(x, len(shape)) for k, x in tensors.items() if x is not None}
    length = torch.ones(shape, dtype=torch.long) if lengths is None else torch.tensor(lengths)
    width = max([int(length.max()), *(x.shape[-1] for x in tokens_of.values())])
    mask = torch.arange(width) < length.unsqueeze(-1)
    tokens = torch.arange(shape[-1]).unsqueeze(-1).expand(*shape, width)
    prompt = torch.arange(shape[-2]).expand(shape[:-1]).unsqueeze(-1)
    return Samples(
        prompt=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        tokens=tokens,
        mask=mask,
        finished=torch.ones(shape, dtype=torch.bool)
        if finished is None
        else torch.tensor(finished),
        origin=torch.zeros(shape, dtype=torch.long) if origin is None else torch.tensor(origin),
        row=prompt.squeeze(-1),
        reward=None if reward is None else f64(reward),
        extra={k: f64(v) for k, v in (extra or {}).items()},
        **tokens_of,
    )


def _shape(
    reward: Any, lengths: Any, finished: Any, extra: Any, tensors: Mapping[str, Tensor | None]
) -> tuple[int, ...]:
    for x in (reward, lengths, finished):
        if x is not None:
            return tuple(torch.tensor(x).shape)
    return tuple(next(x for x in tensors.values() if x is not None).shape)


def _with_tokens(x: Tensor, ndim: int) -> Tensor:
    return x if x.ndim > ndim else x.unsqueeze(-1)


def exact_kl(world: World) -> Tensor:
    """KL(policy || reference) of each state, [*R, S]."""
    logp = world.policy.logits.detach().log_softmax(-1)
    ref = world.reference.logits.detach().log_softmax(-1)
    return (logp.exp() * (logp - ref)).sum(-1)
