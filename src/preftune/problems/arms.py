"""Bandits of one token: one state and a table, or many states and a network; all figures exact."""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from preftune import loop, methods
from preftune.method import Method
from preftune.numerics import stream_keys, uniform
from preftune.policies.nets import Mlp, Table
from preftune.policies.tree import Tree
from preftune.problems.bandit import ARMS, REWARDS, Peaks, exact, near, reference_probs
from preftune.problems.drawn import Drawn, draws, mean_reward, recorded, scored
from preftune.rounds import World
from preftune.samples import Samples

PRETRAINED, HELD_OUT, FEATURES = 100, 100, 100
"""States that the reference is trained on, states that policies are judged on, numbers a state."""
HIDDEN = (50, 256, 256)
NAMES = {"far": "r4", "near": "r5"}
"""Of rewards, as claims call them."""


def reward_of(name: str, modes: Peaks | None = None) -> Tensor:
    """The reward of each arm, [V] float64: a name of `REWARDS`, `far`, `near`, or several modes."""
    return modes() if modes is not None else REWARDS[NAMES.get(name, name)]()


@dataclass(frozen=True, kw_only=True)
class Arms:
    """One state, a table of logits that starts at the reference."""

    reward: str = "far"
    modes: Peaks | None = None
    """Several equal modes in place of the reward's one."""
    rows: int = 1
    """Prompts of an epoch (all the same state); of offline data, rows with own responses."""
    responses: int = 0
    """Responses a row that were drawn from the reference beforehand; 0: none."""
    chunk: int = 32
    cost: float = 0.02

    def world(
        self, method: Method, seeds: tuple[int, ...], batch_size: int, data: Samples | None = None
    ) -> World:
        """See `Problem.world`."""
        logits = reference_probs().log().expand(len(seeds), 1, ARMS)
        policy, reference = (Tree(Table(logits.float()), 1) for _ in range(2))
        reference = reference.frozen_copy()
        rows = _with_responses(
            reference, torch.zeros(len(seeds), self.rows, 1, dtype=torch.long), self.responses,
            seeds, data,
        )  # fmt: skip
        return _world(
            policy, reference, rows, reward_of(self.reward, self.modes), seeds, batch_size
        )

    def evaluate(self, run: loop.State) -> dict[str, Tensor]:
        """Exact reward, KLs, entropy, and the mass near each mode."""
        policy, reference = run.world.policy, run.world.reference
        assert isinstance(policy, Tree) and isinstance(reference, Tree)
        with torch.no_grad():
            logp, ref = (p.log_joint().double() for p in (policy, reference))
        return _figures(logp, ref, self.reward, self.modes)


@dataclass(frozen=True, kw_only=True)
class States:
    """States from [0, 1]^100 and the network of arXiv 2404.14367's bandit; the reward does not look
    at the state. The reference is the network after supervised training on the closed form."""

    reward: str = "far"
    states: int = 100
    """That the policy is trained on, once an epoch each."""
    responses: int = 0
    """Responses a state that were drawn from the reference beforehand; 0: none."""
    similar: int = 5
    """Arms this near to a prompt's best sample count as similar to it."""
    chunk: int = 16
    cost: float = 1.0

    def world(
        self, method: Method, seeds: tuple[int, ...], batch_size: int, data: Samples | None = None
    ) -> World:
        """See `Problem.world`."""
        start = _pretrained(seeds)
        count = PRETRAINED + HELD_OUT + self.states
        policy, reference = (_network(seeds, count) for _ in range(2))
        for p in (policy, reference):
            for (_, own), trained in zip(p.tensors(), start, strict=True):
                own.detach().copy_(trained)
        reference = reference.frozen_copy()
        state = PRETRAINED + HELD_OUT + torch.arange(self.states)
        prompt = state[:, None].expand(len(seeds), self.states, 1)
        rows = _with_responses(reference, prompt, self.responses, seeds, data)
        return _world(policy, reference, rows, reward_of(self.reward), seeds, batch_size)

    def evaluate(self, run: loop.State) -> dict[str, Tensor]:
        """Exact figures on held-out states, and where mass went on those of fixed responses."""
        policy, reference, data = run.world.policy, run.world.reference, run.world.data
        assert isinstance(policy, Tree) and isinstance(reference, Tree)
        held_out = PRETRAINED + torch.arange(HELD_OUT)
        with torch.no_grad():
            logp, ref = (_at(p, held_out) for p in (policy, reference))
            found = _figures(logp, ref, self.reward, None)
            if self.responses and isinstance(data, Drawn) and data.tokens is not None:
                where = PRETRAINED + HELD_OUT + torch.arange(self.states)
                logp, ref = (_at(p, where) for p in (policy, reference))
                arms = data.tokens.squeeze(-1)
                found |= _moved(logp, ref, arms, reward_of(self.reward), self.similar)
        return found


def _world(
    policy: Tree, reference: Tree, rows: Drawn, reward: Tensor, seeds: tuple[int, ...], batch: int
) -> World:
    return World(
        policy=policy, reference=reference, data=rows, prompts=rows,
        reward=partial(mean_reward, reward.float()), seed=seeds, batch_size=batch,
        micro_batch_tokens=None,
    )  # fmt: skip


def _with_responses(
    reference: Tree, prompt: Tensor, responses: int, seeds: tuple[int, ...], data: Samples | None
) -> Drawn:
    """Rows with that many responses of the reference, or what was drawn elsewhere."""
    if data is not None:
        return scored(recorded(data), reference)
    if not responses:
        return Drawn(prompt=prompt)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    drawn = reference.sample(prompt, mask, responses, draws(seeds, "offline"), -1)
    return scored(recorded(drawn), reference)


def _figures(logp: Tensor, ref: Tensor, reward: str, modes: Peaks | None) -> dict[str, Tensor]:
    """Those of `bandit.exact`, by name; of several modes, the mass near each."""
    value = reward_of(reward, modes)
    peaks = modes.peaks if modes is not None else (REWARDS[NAMES.get(reward, reward)],)
    found = exact(logp, ref, value, near(peaks[0]))
    out = {
        "reward": found.reward, "reverse_kl": found.reverse_kl, "forward_kl": found.forward_kl,
        "entropy": found.entropy,
    }  # fmt: skip
    p = logp.exp()
    return out | {f"mass_{i}": (p * near(k)).sum(-1).mean(-1) for i, k in enumerate(peaks)}


def _at(policy: Tree, states: Tensor) -> Tensor:
    """Log-probs of every arm in these states, [R, n, V] float64."""
    index = states.expand(*policy.batch_shape, -1)
    return policy.net.logits(index).double().log_softmax(-1)


def _moved(
    logp: Tensor, ref: Tensor, arms: Tensor, reward: Tensor, similar: int
) -> dict[str, Tensor]:
    """What training did to a prompt's samples, means over prompts.

    Args:
        logp, ref: [R, n, V]; arms: [R, n, K], the samples of each prompt.
    """
    value = reward[arms]
    best = arms.gather(-1, value.argmax(-1, keepdim=True))
    log_ratio = logp - ref
    h = log_ratio.gather(-1, arms)
    chosen = h.gather(-1, value.argmax(-1, keepdim=True)).squeeze(-1)
    others = (h.sum(-1) - chosen) / (arms.shape[-1] - 1)

    kind = torch.zeros_like(logp, dtype=torch.long)  # 0 other
    kind = torch.where((torch.arange(logp.shape[-1]) - best).abs() <= similar, 1, kind)
    kind = kind.scatter(-1, arms, 2).scatter(-1, best, 3)  # 2 rejected, 3 chosen
    change = logp.exp() - ref.exp()
    mass = {
        name: torch.where(kind == i, change, 0.0).sum(-1).mean(-1)
        for i, name in enumerate(("other", "similar", "rejected", "chosen"))
    }
    return {
        "h_best": chosen.mean(-1), "h_others": others.mean(-1),
        **{f"gained_{name}": m for name, m in mass.items()},
    }  # fmt: skip


def _network(seeds: tuple[int, ...], count: int) -> Tree:
    """Untrained, with `count` states a run, the same first ones whatever the count."""
    keys = stream_keys(seeds, "states")[:, None, None]
    features = uniform(keys, torch.arange(count)[:, None], torch.arange(FEATURES)).float()
    net = Mlp(
        features, stream_keys(seeds, "weights"), ARMS, HIDDEN, activation="relu", norm_first=True,
        gain=1e-2,
    )  # fmt: skip
    return Tree(net, count)


@lru_cache(maxsize=64)
def _pretrained(seeds: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Weights after the row `sft` on draws from the closed form: 100 updates of 200, rate 0.01."""
    updates, batch = 100, 200
    policy = _network(seeds, PRETRAINED)
    cdf = reference_probs().cumsum(0)
    keys = stream_keys(seeds, "demonstrations")[:, None]
    u = uniform(keys, torch.arange(updates * batch))
    arms = torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=ARMS - 1)
    state = torch.arange(updates * batch) % PRETRAINED
    rows = Drawn(
        prompt=state[:, None].expand(len(seeds), -1, 1).contiguous(),
        tokens=arms[:, :, None, None],
    )
    world = World(
        policy=policy, reference=None, data=rows, prompts=rows, reward=None, seed=seeds,
        batch_size=batch, micro_batch_tokens=None,
    )  # fmt: skip
    settings = loop.Settings(
        max_steps=updates, learning_rate=0.01, warmup_ratio=0.0, log_every=updates
    )
    loop.advance(loop.start(methods.get("sft"), world, settings), settings, loop.Hooks())
    return tuple(t.detach().clone() for _, t in policy.tensors())
