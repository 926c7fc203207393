"""Nine tokens of a hundred from a small transformer: the several-token bandit of arXiv 2404.14367.

The reward is the mean over the nine tokens (not the prompt) of one token's reward. Sequences are
too many to enumerate: figures are of sampled prefixes, with the exact expectation over each next
token, so that only the prefixes are noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from preftune import loop, methods
from preftune.method import Method
from preftune.numerics import stream_keys, uniform
from preftune.policies.stacked import StackedTransformer
from preftune.problems.arms import reward_of
from preftune.problems.bandit import ARMS, CONTINUOUS, coordinates, reference_probs
from preftune.problems.drawn import Drawn, draws, mean_reward, recorded, scored
from preftune.rounds import World
from preftune.samples import Samples

LENGTH = 9
JUDGED = 100
"""Prompts, with two prefixes each, that a policy is judged on."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A prompt is one token, uniform; responses have nine tokens."""

    reward: str = "far"
    """One token's, of which the mean is taken (`far`, `near` or of `REWARDS`), or one of all nine
    as a vector (of `CONTINUOUS`)."""
    prompts: int = 500
    """That the policy is trained on, once an epoch each."""
    responses: int = 0
    """Responses a prompt that were drawn from the reference beforehand; 0: none."""
    chunk: int = 2
    cost: float = 10.0

    def world(
        self, method: Method, seeds: tuple[int, ...], batch_size: int, data: Samples | None = None
    ) -> World:
        """See `Problem.world`."""
        policy = _network(seeds)
        for (_, own), trained in zip(policy.tensors(), _pretrained(seeds), strict=True):
            own.detach().copy_(trained)
        reference = policy.frozen_copy()
        prompt = _prompts(seeds, "prompts", self.prompts)
        rows = Drawn(prompt=prompt) if data is None else scored(recorded(data), reference)
        if data is None and self.responses:
            mask = torch.ones_like(prompt, dtype=torch.bool)
            drawn = reference.sample(prompt, mask, self.responses, draws(seeds, "offline"), -1)
            rows = scored(recorded(drawn), reference)
        return World(
            policy=policy, reference=reference, data=rows, prompts=rows,
            reward=_judge(self.reward), seed=seeds, batch_size=batch_size,
            micro_batch_tokens=None,
        )  # fmt: skip

    def evaluate(self, run: loop.State) -> dict[str, Tensor]:
        """Reward, KL and entropy a sequence, from sampled prefixes with exact next tokens."""
        policy, reference, seeds = run.world.policy, run.world.reference, run.world.seed
        assert isinstance(policy, StackedTransformer) and isinstance(seeds, tuple)
        assert isinstance(reference, StackedTransformer)
        prompt = _prompts(seeds, "judged", JUDGED)
        mask = torch.ones_like(prompt, dtype=torch.bool)
        with torch.no_grad():
            drawn = policy.sample(prompt, mask, 2, draws(seeds, "judged", run.step), 0)
            logp, ref = (p.next_log_probs(prompt, drawn.tokens) for p in (policy, reference))
            p = logp.exp()
            if self.reward in CONTINUOUS:
                each = _judge(self.reward)(drawn).unsqueeze(-1)
            else:
                each = (p * reward_of(self.reward).float()).sum(-1)  # [R, n, 2, T]
            kl = (p * (logp - ref)).sum((-2, -1))
            entropy = -(p * logp).sum((-2, -1))
        return {
            "reward": each.mean(-1).double().mean((-2, -1)),
            "reverse_kl": kl.double().mean((-2, -1)),
            "entropy": entropy.double().mean((-2, -1)),
        }


def _judge(name: str) -> Callable[[Samples], Tensor]:
    """The reward of whole responses."""
    if name in CONTINUOUS:
        return lambda samples: CONTINUOUS[name](coordinates(samples.tokens).float())
    return partial(mean_reward, reward_of(name).float())


def _prompts(seeds: tuple[int, ...], name: str, count: int) -> Tensor:
    u = uniform(stream_keys(seeds, "tokens", name)[:, None], torch.arange(count))
    return (u * ARMS).long().unsqueeze(-1)


def _network(seeds: tuple[int, ...]) -> StackedTransformer:
    return StackedTransformer(stream_keys(seeds, "tokens", "weights"), vocab=ARMS, length=LENGTH)


@lru_cache(maxsize=64)
def _pretrained(seeds: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Weights after the row `sft` on independent draws from the closed form at each token: 150
    updates of 100 sequences, rate 0.01 falling to 0."""
    updates, batch = 150, 100
    cdf = reference_probs().cumsum(0)
    keys = stream_keys(seeds, "tokens", "demonstrations")[:, None, None]
    u = uniform(keys, torch.arange(updates * batch)[:, None], torch.arange(LENGTH))
    tokens = torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=ARMS - 1)
    rows = Drawn(
        prompt=_prompts(seeds, "demonstrations", updates * batch), tokens=tokens.unsqueeze(-2)
    )
    policy = _network(seeds)
    world = World(
        policy=policy, reference=None, data=rows, prompts=rows, reward=None, seed=seeds,
        batch_size=batch, micro_batch_tokens=None,
    )  # fmt: skip
    settings = loop.Settings(
        max_steps=updates, learning_rate=0.01, warmup_ratio=0.0, log_every=updates
    )
    loop.advance(loop.start(methods.get("sft"), world, settings), settings, loop.Hooks())
    return tuple(t.detach().clone() for _, t in policy.tensors())
