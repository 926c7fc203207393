"""A language so small that all of it is enumerated: prompts, three tokens of six, a small network.

The pairs that one learns from may cover all responses or leave out a token that the reference
hardly ever says; labels are drawn by Bradley-Terry from the true reward.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune import loop, methods
from preftune.method import Method
from preftune.numerics import first_wins, normal, stream_keys, uniform
from preftune.policies.nets import Mlp
from preftune.policies.tree import Tree, all_responses, context_features, response_features
from preftune.problems.drawn import Drawn, gumbel, recorded, reward_at, scored
from preftune.rounds import World
from preftune.samples import Samples
from preftune.theory.closed_form import kl, tilted
from preftune.theory.linear_reward import fit_linear_reward

PROMPTS, VOCAB, DEPTH = 8, 6, 3
RARE = VOCAB - 1
"""The token that covered data leave out: PENALTY nats rarer; a response with it is worth -LIMIT."""
PENALTY, LIMIT = 6.0, 2.0
HIDDEN = (32, 32)

Coverage = Literal["covered", "reference", "expert", "uniform"]


def responses() -> Int[Tensor, "A T"]:
    """All of them."""
    return all_responses(VOCAB, DEPTH)


def features() -> Float[Tensor, "A F"]:
    """One-hots of each position's token and of each two neighbours: what learned rewards see."""
    return response_features(VOCAB, DEPTH)


def _pieces(seeds: tuple[int, ...], name: str, scale: float) -> Float[Tensor, "R S A"]:
    """Random sums of those features, by prompt."""
    seen = features()
    keys = stream_keys(seeds, "words", name)[:, None, None]
    weight = scale * normal(keys, torch.arange(PROMPTS)[:, None], torch.arange(seen.shape[-1]))
    return (weight.unsqueeze(-2) * seen).sum(-1)  # no matrix product: the same bits in any batch


def _has_rare() -> Tensor:
    return (responses() == RARE).any(-1)


@lru_cache(maxsize=16)
def true_reward(seeds: tuple[int, ...]) -> Float[Tensor, "R S A"]:
    """Of every response to every prompt, within +-LIMIT."""
    reward = _pieces(seeds, "reward", 0.7).clamp(-LIMIT, LIMIT)
    return reward.masked_fill(_has_rare(), -LIMIT)


def energies(seeds: tuple[int, ...]) -> Float[Tensor, "R S A"]:
    """Log-probs of the distribution that the reference is trained on."""
    rare = (responses() == RARE).sum(-1) * PENALTY
    return (_pieces(seeds, "energies", 0.5) - rare).log_softmax(-1)


def reference_log_probs(seeds: tuple[int, ...]) -> Float[Tensor, "R S A"]:
    """Of the trained reference, float64."""
    return _trained(seeds).log_joint().detach().double()


def pair_law(
    coverage: Coverage, ref_logp: Tensor, reward: Tensor, temperature: float
) -> Float[Tensor, "R S A"]:
    """What each response of a pair is drawn from.

    covered: the reference without the rare token; reference; expert: exp(reward / temperature);
    uniform.
    """
    if coverage == "reference":
        return ref_logp.exp()
    if coverage == "covered":
        return ref_logp.masked_fill(_has_rare(), -torch.inf).softmax(-1)
    if coverage == "expert":
        return (reward / temperature).softmax(-1)
    return torch.full_like(reward, 1 / reward.shape[-1])


def draw_pairs(
    law: Float[Tensor, "R S A"], reward: Float[Tensor, "R S A"], count: int, seeds: tuple[int, ...]
) -> tuple[Int[Tensor, "R n"], Int[Tensor, "R n 2"]]:
    """Prompts and pairs of responses by number, the chosen first (Bradley-Terry on the reward)."""
    runs = len(seeds)
    keys = stream_keys(seeds, "pairs")[:, None, None]
    prompt = (torch.arange(count) % PROMPTS).expand(runs, count)
    u = uniform(keys, torch.arange(count)[:, None], torch.arange(3))  # [R, n, 3]
    cdf = law.cumsum(-1)
    both = torch.empty(runs, count, 2, dtype=torch.long)
    for s in range(PROMPTS):
        mine = slice(s, None, PROMPTS)
        query = (u[:, mine, :2] * cdf[:, s, -1, None, None]).flatten(1)
        found = torch.searchsorted(cdf[:, s].contiguous(), query, right=True)
        both[:, mine] = found.clamp(max=law.shape[-1] - 1).view(runs, -1, 2)
    own = reward.gather(1, prompt[..., None].expand(-1, -1, reward.shape[-1])).gather(-1, both)
    first = first_wins(own[..., 0] - own[..., 1], u[..., 2])
    return prompt, torch.where(first.unsqueeze(-1), both, both.flip(-1))


@dataclass(frozen=True, kw_only=True)
class Words:
    """Offline pairs, and fresh samples judged by the true reward or by one learned from pairs."""

    data: Coverage = "reference"
    pairs: int = 1000
    temperature: float = 0.3
    """Of expert data."""
    labels: Literal["true", "rm_same"] = "true"
    """Who judges fresh samples: the reward itself, or one fitted to the run's own pairs."""
    ridge: float = 0.01
    """Of that fit, on its weights, an observation."""
    beta: float = 0.1
    """Of the regularised value that policies are judged by."""
    chunk: int = 32
    cost: float = 0.4

    def world(
        self, method: Method, seeds: tuple[int, ...], batch_size: int, data: Samples | None = None
    ) -> World:
        """See `Problem.world`."""
        policy = _trained(seeds)
        reference = policy.frozen_copy()
        ref_logp = reference_log_probs(seeds)
        reward = true_reward(seeds)
        law = pair_law(self.data, ref_logp, reward, self.temperature)
        prompt, both = draw_pairs(law, reward, self.pairs, seeds)
        rows = Drawn(prompt=prompt.unsqueeze(-1), tokens=responses()[both])
        judge = reward
        if self.labels == "rm_same":
            judge = fit_linear_reward(features(), counts(prompt, both), self.ridge)
        drawn = scored(rows if data is None else recorded(data), reference)
        keys = stream_keys(seeds, "labels")[:, None, None]

        def judged(samples: Samples) -> Tensor:
            """With Gumbel noise: a ranking of two is then a draw of Bradley-Terry."""
            return reward_at(judge, samples, VOCAB) + gumbel(keys, samples)

        return World(
            policy=policy, reference=reference, data=drawn, prompts=rows, reward=judged,
            seed=seeds, batch_size=batch_size, micro_batch_tokens=None,
        )  # fmt: skip

    def evaluate(self, run: loop.State) -> dict[str, Tensor]:
        """Exact reward, KL, regularised value and its distance to the best there is."""
        policy, reference = run.world.policy, run.world.reference
        assert isinstance(policy, Tree) and isinstance(reference, Tree)
        assert isinstance(run.world.seed, tuple)
        with torch.no_grad():
            logp, ref = (p.log_joint().double() for p in (policy, reference))
        return worth(logp, ref, true_reward(run.world.seed), self.beta)


def worth(logp: Tensor, ref: Tensor, reward: Tensor, beta: float) -> dict[str, Tensor]:
    """Exact figures, [R] each, of log-probs [R, S, A]."""
    p = logp.exp()
    expected = (p * reward).sum(-1).mean(-1)
    divergence = kl(logp, ref).mean(-1)
    best = tilted(ref, reward, beta)
    optimum = ((best.exp() * reward).sum(-1) - beta * kl(best, ref)).mean(-1)
    value = expected - beta * divergence
    return {
        "reward": expected, "reverse_kl": divergence, "value": value,
        "suboptimality": optimum - value,
        "mass_rare": torch.where(_has_rare(), p, 0.0).sum(-1).mean(-1),
    }  # fmt: skip


def counts(prompt: Tensor, both: Tensor) -> Float[Tensor, "R S A A"]:
    """How often the first of two responses was chosen over the second, by prompt."""
    runs, size = len(prompt), VOCAB**DEPTH
    flat = (prompt * size + both[..., 0]) * size + both[..., 1]
    out = torch.zeros(runs, PROMPTS * size * size, dtype=torch.float64)
    out.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    return out.view(runs, PROMPTS, size, size)


@lru_cache(maxsize=64)
def _weights(seeds: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The reference's, after the row `sft`: 400 updates of 64 demonstrations, rate 0.01."""
    updates, batch = 400, 64
    cdf = energies(seeds).exp().cumsum(-1)
    prompt = (torch.arange(updates * batch) % PROMPTS).expand(len(seeds), -1)
    u = uniform(stream_keys(seeds, "demonstrations")[:, None], torch.arange(updates * batch))
    number = torch.empty_like(prompt)
    for s in range(PROMPTS):
        query = (u[:, s::PROMPTS] * cdf[:, s, -1:]).contiguous()
        number[:, s::PROMPTS] = torch.searchsorted(cdf[:, s].contiguous(), query, right=True)
    tokens = responses()[number.clamp(max=cdf.shape[-1] - 1)].unsqueeze(-2)
    rows = Drawn(prompt=prompt.unsqueeze(-1), tokens=tokens)
    policy = _untrained(seeds)
    world = World(
        policy=policy, reference=None, data=rows, prompts=rows, reward=None, seed=seeds,
        batch_size=batch, micro_batch_tokens=None,
    )  # fmt: skip
    settings = loop.Settings(
        max_steps=updates, learning_rate=0.01, warmup_ratio=0.0, log_every=updates
    )
    loop.advance(loop.start(methods.get("sft"), world, settings), settings, loop.Hooks())
    return tuple(t.detach().clone() for _, t in policy.tensors())


def _untrained(seeds: tuple[int, ...]) -> Tree:
    net = Mlp(
        context_features(PROMPTS, VOCAB, DEPTH), stream_keys(seeds, "words", "weights"), VOCAB,
        HIDDEN, activation="relu", norm_first=False, gain=1.0,
    )  # fmt: skip
    return Tree(net, PROMPTS, DEPTH)


def _trained(seeds: tuple[int, ...]) -> Tree:
    policy = _untrained(seeds)
    for (_, own), trained in zip(policy.tensors(), _weights(seeds), strict=True):
        own.detach().copy_(trained)
    return policy
