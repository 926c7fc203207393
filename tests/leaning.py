"""Worlds for runs that go wrong: arms that share features, arms that are rare, two rewards.

One token a response, one state a prompt, so a run of a hundred updates takes a second.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tables
from preftune import alarms, loop
from preftune.evaluate import Answers, answer, figures
from preftune.held_out import eval_metrics
from preftune.method import Method
from preftune.policies.categorical import Categorical
from preftune.rounds import World
from preftune.samples import Samples


class Leaning(Categorical):
    """Log-linear: every state's logits are `logits` + features [V, F] @ weight, one weight for all.

    What a pair teaches goes to every arm by its features, as it does in a network.
    """

    def __init__(self, logits: Tensor, features: Tensor, weight: Tensor | None = None) -> None:
        super().__init__(logits)
        self.logits.requires_grad_(False)
        self.features = features
        start = torch.zeros(features.shape[-1], dtype=logits.dtype) if weight is None else weight
        self.weight = start.detach().clone().requires_grad_()

    def log_probs(self, prompt: Tensor) -> Tensor:
        table = (self.logits + self.features @ self.weight).log_softmax(-1)
        return table.gather(-2, prompt.expand(*prompt.shape[:-1], table.shape[-1]))

    def tensors(self) -> list[tuple[str, Tensor]]:
        return [("weight", self.weight)]

    def frozen_copy(self) -> "Leaning":
        twin = Leaning(self.logits, self.features, self.weight)
        twin.weight.requires_grad_(False)
        return twin


APART = torch.eye(4, dtype=torch.float64)
"""Arms that share nothing: what a pair raises is its chosen arm."""
ALIKE = torch.tensor([[1.0, 0.2], [1.0, -0.2], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
"""Arms 0 and 1 differ in little, and the last arm, which is in no pair, has most of that."""


def leaning_world(features: Tensor, **more: Any) -> World:
    """Six states that prefer arm 0 to arm 1; the reference seldom says the last arm."""
    logits = torch.tensor([0.5, 0.5, 0.0, -3.0], dtype=torch.float64).repeat(6, 1)
    table = tables.Table(rows=((0, 1),) * 6)
    policy = Leaning(logits, features)
    return World(**{
        "policy": policy, "reference": Categorical(logits), "data": table, "prompts": table,
        "reward": None, "seed": 0, "batch_size": 6, "micro_batch_tokens": None,
    } | more)  # fmt: skip


def pairs_world(logits: list[float], pair: tuple[int, int]) -> World:
    """Six states with these logits, all of which prefer the one arm of the pair to the other."""
    start = torch.tensor(logits, dtype=torch.float64).repeat(6, 1)
    table = tables.Table(rows=(pair,) * 6)
    return World(
        policy=Categorical(start), reference=Categorical(start), data=table, prompts=table,
        reward=None, seed=0, batch_size=6, micro_batch_tokens=None,
    )  # fmt: skip


def peaks(*centres: int) -> Callable[[Samples], Tensor]:
    """A reward of 0 at these arms, all equally good, and less away from them."""

    def reward(samples: Samples) -> Tensor:
        arm = samples.tokens.squeeze(-1).double()
        return -torch.stack([(arm - c).abs() for c in centres]).amin(0)

    return reward


def judged_world(
    reward: Callable[[Samples], Tensor], states: int = 64, slope: float = 0.2, seed: int = 0
) -> World:
    """Many states and 21 arms in a row, of which the reference prefers the first by `slope`."""
    logits = (-slope * torch.arange(21, dtype=torch.float64)).repeat(states, 1)
    table = tables.Table(rows=((0, 1),) * states)
    return World(
        policy=Categorical(logits), reference=Categorical(logits), data=table, prompts=table,
        reward=reward, seed=seed, batch_size=4 * states, micro_batch_tokens=None,
    )  # fmt: skip


def far_world(centre: float) -> World:
    """A policy with a value head, and a reward whose values lie around `centre`."""
    near = judged_world(lambda samples: peaks(10)(samples) + centre, states=8, slope=0.0)
    policy = Categorical(near.policy.logits, value_head=True)
    return replace(near, policy=policy)


def evaluator(
    world: World, judges: Mapping[str, Callable[[Samples], Tensor]]
) -> Callable[[int, bool], dict[str, Any]]:
    """Held-out evaluation of the policy as it is, by the library's own figures."""

    def answers(policy: Categorical) -> Answers:
        return answer(policy, world.reference, world.prompts, judges, samples_per_prompt=2, seed=0)

    other = answers(world.reference)  # which stays as it is

    def evaluate(step: int, last: bool) -> dict[str, Any]:
        return eval_metrics(figures(answers(world.policy), other))

    return evaluate


def watched(
    row: Method, world: World, steps: int, rate: float, **more: Any
) -> tuple[dict[str, alarms.Fired], list[dict[str, Any]]]:
    """A whole run: the alarms that fired, by name, and what it logged."""
    evaluate = more.pop("evaluate", None)
    state, settings = tables.begin(
        row, world, steps, rate, lr_schedule="constant", warmup_ratio=0.0, **more
    )
    logged: list[dict[str, Any]] = []
    fired: list[alarms.Fired] = []
    hooks = loop.Hooks(
        log=lambda step, metrics: logged.append({"step": step, **metrics}),
        alarm=fired.append, evaluate=evaluate,
    )  # fmt: skip
    loop.advance(state, settings, hooks)
    assert len({f.alarm for f in fired}) == len(fired), "each is said once"
    return {f.alarm: f for f in fired}, logged
