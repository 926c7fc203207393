"""The diagnosis of an enumerable problem: the same figures as of a language model, by sampling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.advising.problem import Problem, judge_of
from preftune.advising.scene import context_logits
from preftune.advising.stated import Stated
from preftune.diagnosis.measure import Measured, Surveyed
from preftune.diagnosis.reading import Figures, figures
from preftune.estimators.estimate import Estimate, share
from preftune.numerics import first_wins, normal, permutation, stream_key, uniform
from preftune.policies.tree import all_responses, invert

ROWS, PROMPTS, SAMPLES = 100, 32, 3
"""Pairs scored, prompts answered, answers to each: a few per cent of what training costs, as on a
language model."""
WIDTH = 32
"""Of the features that stand in for hidden states."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a diagnosis found, and what it cost."""

    figures: Figures
    price: dict[int, float]
    """By tier: of it and of those below, without that of a reward model of the run's own pairs."""

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        figures = {name: x.as_json() for name, x in self.figures.items()}
        return {"figures": figures, "price": {str(t): v for t, v in self.price.items()}}

    @staticmethod
    def of_plain(data: Mapping[str, Any]) -> "Seen":
        """Of plain data."""
        figures = {name: Estimate(**x) for name, x in data["figures"].items()}
        return Seen(figures=figures, price={int(t): v for t, v in data["price"].items()})


def look(problem: Problem, seed: int = 0) -> Seen:
    """Diagnose a problem as its user would.

    A human is not asked about every sample, but which of one sample and the chosen response is
    better, once a prompt.
    """
    by_human = problem.labels.source == "human"
    judge = None if by_human else judge_of(problem)
    key = stream_key(seed, problem.name, "diagnosis")
    table = problem.pair_table()
    order = permutation(key, 0, len(table))
    data, few = table[order[:ROWS]], order[:PROMPTS]
    state = table[few, 0]
    cdf = problem.ref_logp().exp().cumsum(-1)[state]
    u = uniform(key, torch.arange(len(few))[:, None], torch.arange(SAMPLES))
    drawn = invert(cdf, u)
    measured = Measured(
        data=_surveyed(problem, order[:ROWS], data[:, 0], data[:, 1:], judge),
        drawn=_surveyed(problem, few, state, drawn, judge),
    )
    found = figures(measured, seed)
    if by_human:
        reward = problem.true_reward()
        gap = reward[state, drawn[:, 0]] - reward[state, table[few, 1]]
        found["reached_chosen"] = reached(gap, key, seed)
    return Seen(figures=found, price=prices(problem, len(data), drawn.numel()))


def reached(gap: Float[Tensor, " P"], key: int, seed: int) -> Estimate:
    """How often a human prefers a sample to the chosen response, asked once a prompt.

    Args:
        gap: how much more the sample is worth.
    """
    won = first_wins(gap, uniform(key, torch.arange(len(gap)), SAMPLES))
    return share(won.double()[:, None], seed)


def prices(problem: Stated, rows: int, samples: int) -> dict[int, float]:
    """Of so many pairs scored and answers drawn, by tier."""
    p = problem.prices
    scored = 2 * rows * p.score
    drawn = scored + samples * (p.sample + p.score)
    by_human = problem.labels.source == "human"
    asked = PROMPTS if by_human else samples + 2 * rows
    return {0: scored, 1: drawn, 2: drawn + asked * p.label}


def _surveyed(
    problem: Problem,
    row: Int[Tensor, " N"],
    state: Int[Tensor, " N"],
    response: Int[Tensor, "N K"],
    judge: Float[Tensor, "S A"] | None,
) -> Surveyed:
    tokens = all_responses(problem.vocab, problem.length)[response]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    ref = context_logits(problem.ref_logp()[None], problem.vocab, problem.length)[0]
    nodes = len(ref) // problem.states
    logp, entropy, variance = _of_tokens(ref, state * nodes, tokens, problem.vocab)
    return Surveyed(
        row=row, tokens=tokens, mask=mask, finished=mask[..., 0], ref_logp=logp, entropy=entropy,
        variance=variance, hidden=_hidden(problem, state, tokens),
        reward=None if judge is None else judge[state[:, None], response],
    )  # fmt: skip


def _of_tokens(
    logits: Float[Tensor, "C V"], base: Int[Tensor, " N"], tokens: Int[Tensor, "N K T"], vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each token, and entropy and variance of the surprisal where it stands."""
    place, prefix, level, nodes = [], torch.zeros_like(tokens[..., 0]), 0, 1
    for t in range(tokens.shape[-1]):
        place.append(base[:, None] + level + prefix)
        prefix, level, nodes = prefix * vocab + tokens[..., t], level + nodes, nodes * vocab
    context = torch.stack(place, -1)
    p = logits.exp()
    entropy = -(p * logits).sum(-1)
    variance = (p * logits.square()).sum(-1) - entropy.square()
    own = logits[context].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return own, entropy[context], variance.clamp(min=0.0)[context]


def _hidden(problem: Problem, state: Tensor, tokens: Tensor) -> Float[Tensor, "N K D"]:
    """Sums over positions of tanh features of the state and the tokens so far, by fixed random
    weights: they know nothing of the reward."""
    one = torch.nn.functional.one_hot(tokens, problem.vocab).double()  # [N, K, T, V]
    so_far = torch.tril(torch.ones(problem.length, problem.length)).double()
    seen = (so_far[:, :, None] * one.unsqueeze(-3)).flatten(-2)  # [N, K, T, T V]
    where = torch.nn.functional.one_hot(state, problem.states).double()[:, None, None]
    x = torch.cat([seen, where.expand(*seen.shape[:-1], -1)], -1)
    key = stream_key("features", problem.states, problem.vocab, problem.length)
    weight = normal(key, torch.arange(x.shape[-1])[:, None], torch.arange(WIDTH))
    return torch.tanh(x @ weight).sum(-2)
