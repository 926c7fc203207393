"""The plain loop of `benchmarks/plain_bandit.py` as oracle: one call of the model a sample."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from preftune import loop
from preftune.numerics import stream_keys
from preftune.policies.stacked import StackedTransformer
from preftune.problems.arms import reward_of
from preftune.problems.drawn import Drawn, mean_reward
from preftune.reproduce import rows
from preftune.rounds import World, group_terms

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from plain_bandit import PlainGPT, ipo_loss

RUNS, PROMPTS, RESPONSES, TAU = 2, 3, 4, 0.05


def _world() -> World:
    keys = stream_keys((5, 8), "oracle")
    policy = StackedTransformer(keys, dtype=torch.float64)
    reference = policy.frozen_copy()
    with torch.no_grad():
        for i, (_, w) in enumerate(policy.tensors()):
            noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(i), dtype=w.dtype)
            w.add_(0.05 * noise)
    prompt = torch.tensor([[[3], [70], [99]], [[0], [12], [55]]])
    data = Drawn(prompt=prompt)
    return World(
        policy=policy, reference=reference, data=data, prompts=data, seed=(5, 8),
        reward=partial(mean_reward, reward_of("far")), batch_size=PROMPTS * 6,
        micro_batch_tokens=None,
    )  # fmt: skip


def test_an_update_is_that_of_the_plain_loop() -> None:
    """Loss and gradient of on-policy IPO over all pairs, each run by itself."""
    world = _world()
    groups = group_terms(rows.ipo(rows.fresh(PROMPTS, 1, RESPONSES), TAU, 0.0))
    found = loop.gradient(groups, world, 0)
    current = groups[0].round
    assert current is not None and found.loss is not None
    samples = current.samples
    for r in range(RUNS):
        policy, reference = (
            PlainGPT({name: w.detach()[r] for name, w in p.tensors()})
            for p in (world.policy, world.reference)
        )
        loss = ipo_loss(
            policy, reference, samples.prompt[r], samples.tokens[r], samples.reward[r], TAU
        )
        loss.backward()
        torch.testing.assert_close(found.loss[r], loss.detach(), rtol=1e-10, atol=1e-10)
        grads = {name: w.grad[r] for name, w in world.policy.tensors()}
        plain = {
            "token": policy.token.weight.grad, "position": policy.position.weight.grad,
            "head": policy.head.weight.grad.T, "gain": policy.norm.weight.grad,
        }  # fmt: skip
        for name, grad in plain.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-10)
        for i, block in enumerate(policy.blocks):
            torch.testing.assert_close(
                grads["up"][i], block.up.weight.grad.T, rtol=1e-8, atol=1e-10
            )
            torch.testing.assert_close(
                grads["attend"][i], block.attend.weight.grad.T, rtol=1e-8, atol=1e-10
            )


def test_another_margin_is_another_gradient() -> None:
    """The comparison can fail."""
    world = _world()
    losses = []
    for tau in (TAU, 2 * TAU):
        groups = group_terms(rows.ipo(rows.fresh(PROMPTS, 1, RESPONSES), tau, 0.0))
        losses.append(loop.gradient(groups, replace(world), 0).loss)
    assert not torch.allclose(losses[0], losses[1])
