"""Figure 3 of arXiv 2406.01462: tables of logits, pairs from the first arms only."""

from dataclasses import dataclass

import torch
from torch import Tensor

from preftune import loop
from preftune.method import Method
from preftune.numerics import first_wins, stream_keys, uniform
from preftune.policies.nets import Table
from preftune.policies.tree import Tree
from preftune.problems.bandit import anti_aligned
from preftune.problems.drawn import Drawn, scored
from preftune.rounds import World
from preftune.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """Rewards uniform within +-reward_range; labels by Bradley-Terry."""

    arms: int
    seen: int
    """Pairs are of the first so many arms."""
    reward_range: float
    pairs: int
    states: int = 1
    """Each with a table and pairs of its own, one reward for all."""
    anti: float = 0.0
    """0: a uniform reference; else one that prefers what the reward does not, so strongly."""
    chunk: int = 32
    cost: float = 0.05

    def world(
        self, method: Method, seeds: tuple[int, ...], batch_size: int, data: Samples | None = None
    ) -> World:
        """See `Problem.world`."""
        assert data is None, "this problem has its own pairs"
        limit = self.reward_range
        reward = limit * (2 * uniform(stream_keys(seeds, "unseen", "reward")[:, None],
                                      torch.arange(self.arms)) - 1)  # fmt: skip
        logits = torch.zeros(len(seeds), self.arms, dtype=torch.float64)
        if self.anti:
            logits = torch.stack([anti_aligned(r, self.anti) for r in reward])
        table = logits.float().unsqueeze(1).expand(-1, self.states, -1)
        policy = Tree(Table(table), self.states)
        reference = policy.frozen_copy()
        keys = stream_keys(seeds, "unseen", "pairs")[:, None, None]
        u = uniform(keys, torch.arange(self.pairs)[:, None], torch.arange(3))
        both = (u[..., :2] * self.seen).long()
        own = reward.gather(1, both.flatten(1)).view(both.shape)
        first = first_wins(own[..., 0] - own[..., 1], u[..., 2])
        both = torch.where(first.unsqueeze(-1), both, both.flip(-1))
        state = (torch.arange(self.pairs) % self.states)[:, None]
        prompt = state.expand(len(seeds), self.pairs, 1)
        rows = scored(Drawn(prompt=prompt, tokens=both.unsqueeze(-1)), reference)
        return World(
            policy=policy, reference=reference, data=rows, prompts=rows, reward=None, seed=seeds,
            batch_size=batch_size, micro_batch_tokens=None,
        )  # fmt: skip

    def evaluate(self, run: loop.State) -> dict[str, Tensor]:
        """Mass of the arms that no pair contains."""
        policy = run.world.policy
        assert isinstance(policy, Tree)
        with torch.no_grad():
            p = policy.log_joint().double().exp()
        return {"mass_unseen": p[..., self.seen :].sum(-1).mean(-1)}
