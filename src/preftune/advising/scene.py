"""Enumerable problems of one shape as runs that advance together, each with its own files."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from preftune import loop
from preftune.advising import files
from preftune.advising.problem import Problem, judge_of
from preftune.counting import counts
from preftune.method import Method
from preftune.numerics import permutation, stream_keys
from preftune.policies.nets import Mlp, Shifted
from preftune.policies.tree import Tree, all_responses, context_features
from preftune.problems.drawn import Drawn, gumbel, reward_at, scored
from preftune.rounds import World
from preftune.samples import Samples
from preftune.theory.closed_form import kl

HIDDEN = (32, 32)
SEEDS, PROBLEMS = 100, 10_000
"""At most, of a problem and of a folder."""
SHARE_TO_NATS = 4.0
"""Who is better by x nats, x small, wins in Bradley-Terry by 1/2 + x / 4."""


def run_number(problem: int, seed: int, base: int = 0) -> int:
    """By which all random draws of a run are keyed."""
    assert problem < PROBLEMS and seed < SEEDS, "more problems or seeds than there are numbers"
    return (base * PROBLEMS + problem) * SEEDS + seed


def of_number(run: int) -> tuple[int, int]:
    """The problem and the seed of a run."""
    return run // SEEDS % PROBLEMS, run % SEEDS


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The problems of a folder whose shapes are equal (see `Problem.shape`)."""

    folder: str = field(repr=False)
    digest: str
    """Of the files: other files are another scene."""
    chunk: int = field(default=40, repr=False)
    cost: float = field(default=0.8, repr=False)

    @cached_property
    def _names(self) -> list[Path]:
        return files.enumerable(Path(self.folder))

    def path(self, run: int) -> Path:
        """The file of a run's number."""
        return self._names[of_number(run)[0]]

    def problem(self, run: int) -> Problem:
        """Of a run's number."""
        return files.table(self.path(run))

    def world(
        self, method: Method, seeds: tuple[int, ...], batch_size: int, data: Samples | None = None
    ) -> World:
        """See `study.Problem.world`; the seeds are numbers of runs."""
        assert data is None, "a problem has pairs of its own"
        each = [self.problem(s) for s in seeds]
        first = each[0]
        assert all(p.shape == first.shape for p in each), "problems of one shape"
        ref_logp, judge = (torch.stack([_tables(self.path(s))[i] for s in seeds]) for i in (0, 2))
        policy = _policy(first, ref_logp, seeds)
        # each run reads its pairs in an order of its own
        own = stream_keys(seeds, "pairs").tolist()
        pairs = torch.stack([
            p.pair_table()[permutation(k, 0, len(p.pairs))] for p, k in zip(each, own, strict=True)
        ])  # fmt: skip
        tokens = all_responses(first.vocab, first.length)[pairs[..., 1:]]
        reference = policy.frozen_copy()
        rows = scored(Drawn(prompt=pairs[..., :1], tokens=tokens), reference)
        human = torch.tensor([p.labels.source == "human" for p in each])[:, None, None]
        keys = stream_keys(seeds, "labels")[:, None, None]

        def judged(samples: Samples) -> Tensor:
            scores = reward_at(judge, samples, first.vocab)
            return torch.where(human, ranked(scores + gumbel(keys, samples)), scores)

        return World(
            policy=policy, reference=reference, data=rows, prompts=rows, reward=judged,
            seed=seeds, batch_size=batch_size, micro_batch_tokens=None,
        )  # fmt: skip

    def evaluate(self, run: loop.State) -> dict[str, Tensor]:
        """Exact figures, [R] each, and what has been spent."""
        policy, seeds = run.world.policy, run.world.seed
        assert isinstance(policy, Tree) and isinstance(seeds, tuple), "a study's"
        with torch.no_grad():
            logp = policy.log_joint().double()
        found = [worth(one, self.path(s)) for one, s in zip(logp, seeds, strict=True)]
        figures = {k: torch.stack([f[k] for f in found]) for k in found[0]}
        spent = {k: torch.full((len(seeds),), v).double() for k, v in counts(run).items()}
        return figures | spent


def ranked(utility: Float[Tensor, "*R N K"]) -> Float[Tensor, "*R N K"]:
    """What a ranking of a prompt's responses says of each, in nats: the share of the others that
    it beats. Nobody but its ranker sees the utilities."""
    others = max(utility.shape[-1] - 1, 1)
    beaten = (utility.unsqueeze(-1) > utility.unsqueeze(-2)).sum(-1) / others
    return SHARE_TO_NATS * (beaten.to(utility) - 0.5)


def worth(logp: Float[Tensor, "S A"], path: Path) -> dict[str, Tensor]:
    """What a policy is worth, means over states.

    value: E true reward - beta KL; proxy: the same by the judge; proxy_spread: standard deviation
    of the judge's scores of samples to one prompt; win: how often a human prefers it to the
    reference.
    """
    ref, reward, judge, beaten = _tables(path)
    beta = files.table(path).beta
    p = logp.exp()
    divergence = kl(logp, ref).mean()
    earned, judged = (p * reward).sum(-1).mean(), (p * judge).sum(-1).mean()
    spread = (p * judge.square()).sum(-1) - (p * judge).sum(-1).square()
    return {
        "value": earned - beta * divergence,
        "proxy": judged - beta * divergence,
        "proxy_spread": spread.clamp(min=0).mean().sqrt(),
        "win": (p * beaten).sum(-1).mean(),
        "reverse_kl": divergence,
    }


@lru_cache(maxsize=1024)
def _tables(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference, reward, judge, and the chance of each response to beat the reference's."""
    problem = files.table(path)
    ref, reward = problem.ref_logp(), problem.true_reward()
    gap = reward[:, :, None] - reward[:, None, :]
    beaten = (torch.sigmoid(gap) * ref.exp()[:, None, :]).sum(-1)
    return ref, reward, judge_of(problem), beaten


def _policy(p: Problem, ref_logp: Float[Tensor, "R S A"], seeds: tuple[int, ...]) -> Tree:
    """A network that is added to the reference's logits, and starts at 0."""
    net = _network(p, stream_keys(seeds, "advise", "weights"))
    with torch.no_grad():
        net.weights[f"weight_{len(HIDDEN)}"].zero_()
    logits = context_logits(ref_logp, p.vocab, p.length).float()
    return Tree(Shifted(net, logits), p.states, p.length)


def parameters(p: Problem) -> int:
    """Trained numbers of a policy."""
    return _network(p, torch.zeros(1, dtype=torch.long)).num_weights


def _network(p: Problem, keys: Tensor) -> Mlp:
    return Mlp(
        context_features(p.states, p.vocab, p.length), keys, p.vocab, HIDDEN, activation="relu",
        norm_first=False, gain=1.0,
    )  # fmt: skip


def context_logits(logp: Float[Tensor, "R S A"], vocab: int, length: int) -> Float[Tensor, "R C V"]:
    """Next-token log-probs in every context (in the order of `Tree`) of log-probs of responses."""
    levels, mass = [], logp
    for t in range(length - 1, -1, -1):
        by_token = mass.unflatten(-1, (vocab**t, vocab))
        levels.append(by_token.log_softmax(-1))
        mass = by_token.logsumexp(-1)
    return torch.cat(levels[::-1], -2).flatten(-3, -2)


@lru_cache(maxsize=8)
def digest(folder: str) -> str:
    """Of the enumerable problems of a folder: what else is there is no part of their scene."""
    from preftune import fingerprint

    paths = files.enumerable(Path(folder))
    return fingerprint.digest("".join(p.name + p.read_text() for p in paths))
