"""A problem to advise on, as a file: reference, true reward, pairs, who labels, prices.

The schema is that of `Problem`; docs/advise.md has an example. Responses of an enumerable problem
are all `vocab ** length` strings of tokens, numbered with the first token counting most.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune import durable, fingerprint
from preftune.advising.stated import FORMAT, Kind, LabelSource, Prices
from preftune.numerics import first_wins, normal, stream_key, uniform
from preftune.policies.tree import invert, response_features
from preftune.theory.linear_reward import fit_linear_reward

WIDTH = 192
"""Random features of a reward model."""
MOST_RESPONSES, MOST_IN_ALL, MOST_PAIRS = 4096, 8192, 100_000
"""Responses of an enumerable problem to a state and in all (a reward model counts wins of each over
each), and pairs."""
Features = Literal["network", "neighbours", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Who judges fresh samples."""

    source: LabelSource
    features: Features = "network"
    """What the reward model of `rm_same` sees (see `features_of`)."""
    ridge: float = 0.03
    reward: Any = None
    """[S][A], of `rm_other`: what it says of each response."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem. S states (prompts), A = vocab ** length responses to each."""

    kind: ClassVar[Kind] = "enumerable"
    name: str
    family: str
    """Problems of one family are never in both halves of a cross-validation."""
    states: int
    vocab: int
    length: int
    reference: Any
    """[S][A] logits of responses (log-probs up to a constant)."""
    reward: Any
    """[S][A], the true one, in nats: pairs and humans prefer by Bradley-Terry on it."""
    pairs: Any
    """[n][3]: state, chosen, rejected."""
    labels: Labels
    prices: Prices
    beta: float
    """What a nat of KL costs in reward: U = E reward - beta KL."""
    budget: float
    """All that may be spent, in the prices' unit."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """How it was drawn."""

    @property
    def shape(self) -> tuple[int, int, int, int, float]:
        """Problems of one shape are run together."""
        return self.states, self.vocab, self.length, len(self.pairs), self.beta

    @property
    def digest(self) -> str:
        """Of all that it is."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return fingerprint.digest(json.dumps(_rounded(asdict(self)), sort_keys=True))

    def ref_logp(self) -> Float[Tensor, "S A"]:
        """Log-probs of the reference."""
        return torch.tensor(self.reference, dtype=torch.float64).log_softmax(-1)

    def true_reward(self) -> Float[Tensor, "S A"]:
        """Of every response."""
        return torch.tensor(self.reward, dtype=torch.float64)

    def pair_table(self) -> Int[Tensor, "n 3"]:
        """State, chosen, rejected."""
        return torch.tensor(self.pairs, dtype=torch.long).view(-1, 3)


def features_of(states: int, vocab: int, length: int, kind: Features) -> Float[Tensor, "SA F"]:
    """What a reward model sees of each response to each state.

    tokens: each position's token, for all states and for each; neighbours: each two neighbours too,
    for all states; network: fixed random tanh features of state and tokens.
    """
    own = response_features(vocab, length)
    single = own[:, : length * vocab]
    state = torch.eye(states, dtype=torch.float64).repeat_interleave(len(own), 0)
    shared, alone = own.repeat(states, 1), single.repeat(states, 1)
    if kind == "network":
        x = torch.cat([state, alone], -1)
        key = stream_key("reward features", states, vocab, length)
        weight = normal(key, torch.arange(x.shape[-1])[:, None], torch.arange(WIDTH))
        return torch.tanh(x @ weight + normal(stream_key(key, "bias"), torch.arange(WIDTH)))
    each = (state[:, :, None] * alone[:, None, :]).flatten(1)
    return torch.cat([shared if kind == "neighbours" else alone, each], -1)


def fit_reward(
    table: Int[Tensor, "n 3"], shape: tuple[int, int, int], kind: Features, ridge: float
) -> Float[Tensor, "S A"]:
    """A reward model of pairs: Bradley-Terry by maximum likelihood, linear in its features."""
    states, vocab, length = shape
    size = vocab**length
    state, chosen, rejected = table.unbind(-1)
    wins = torch.zeros(states * size, states * size, dtype=torch.float64)
    ones = torch.ones(len(table), dtype=torch.float64)
    wins.index_put_((state * size + chosen, state * size + rejected), ones, accumulate=True)
    features = features_of(states, vocab, length, kind)
    return fit_linear_reward(features, wins, ridge).view(states, size)


def judge_of(problem: Problem) -> Float[Tensor, "S A"]:
    """What the judge of fresh samples goes by: a reward model's scores, or the true reward (of
    which a human's preferences are draws)."""
    labels = problem.labels
    if labels.source == "rm_other":
        return torch.tensor(labels.reward, dtype=torch.float64)
    if labels.source != "rm_same":
        return problem.true_reward()
    shape = problem.states, problem.vocab, problem.length
    return fit_reward(problem.pair_table(), shape, labels.features, labels.ridge)


def draw_pairs(
    laws: Float[Tensor, "2 S A"],
    reward: Float[Tensor, "S A"],
    count: int,
    key: int,
    *,
    noise: float,
    by_origin: bool = False,
) -> Int[Tensor, "n 3"]:
    """State, chosen, rejected.

    Args:
        laws: what the two responses of a pair are drawn from.
        noise: share of labels flipped.
        by_origin: the first law's is the chosen one; otherwise by Bradley-Terry on the reward.
    """  # fmt: skip
    state = torch.arange(count) % len(reward)
    u = uniform(key, torch.arange(count)[:, None], torch.arange(4))
    cdf = laws.cumsum(-1)[:, state]
    both = invert(cdf, u[:, :2].T.unsqueeze(-1)).squeeze(-1).T
    own = reward[state[:, None], both]
    first = first_chosen(own[:, 0] - own[:, 1], u[:, 2:], noise, by_origin)
    return torch.cat([state[:, None], torch.where(first[:, None], both, both.flip(-1))], -1)


def first_chosen(
    gap: Float[Tensor, " n"], u: Float[Tensor, "n 2"], noise: float, by_origin: bool
) -> Bool[Tensor, " n"]:
    """Whether the first of two is the chosen one in the end (see `draw_pairs`)."""
    first = torch.ones_like(u[:, 0], dtype=torch.bool) if by_origin else first_wins(gap, u[:, 0])
    return first ^ (u[:, 1] < noise)


def save(problem: Problem, folder: Path) -> Path:
    """Write NAME.json; reals at four decimals."""
    path = folder / f"{problem.name}.json"
    plain = {"format": FORMAT, **asdict(problem)}
    durable.write_text(path, json.dumps(_rounded(plain), separators=(",", ":")) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def checked(plain: Mapping[str, Any]) -> Problem:
    """A problem of plain data.

    Raises:
        KeyError, TypeError, ValueError: it is not as the schema says.
    """
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ValueError(f"'format' is not '{FORMAT}'")
    rest = {k: v for k, v in plain.items() if k not in ("format", "labels", "prices")}
    data = rest.pop("data", None)
    size = _size(rest)
    if data is not None:
        rest["pairs"] = _drawn_pairs(data, rest)
    labels, prices = plain["labels"], {k: float(v) for k, v in plain["prices"].items()}
    _check_labels(labels)
    for name in ("beta", "budget"):
        rest[name] = float(rest[name])
        if not (math.isfinite(rest[name]) and rest[name] > 0):
            raise ValueError(f"'{name}' is not a number above 0")
    if not all(math.isfinite(p) and p >= 0 for p in prices.values()):
        raise ValueError("a price is not a number of 0 or more")
    if not all(isinstance(rest[name], str) for name in ("name", "family")):
        raise ValueError("'name' and 'family' are texts")
    found = Problem(**rest, labels=Labels(**labels), prices=Prices(**prices))
    _finite("reference", found.reference, (found.states, size))
    _finite("reward", found.reward, (found.states, size))
    if found.labels.source == "rm_other":
        _finite("labels.reward", found.labels.reward, (found.states, size))
    _check_pairs(found.pairs, found.states, size)
    return found


def _check_labels(labels: Mapping[str, Any]) -> None:
    for name, kind, at_first in (("source", LabelSource, None), ("features", Features, "network")):
        value = labels.get(name, at_first)
        if value not in get_args(kind):
            raise ValueError(f"labels.{name} '{value}' is none of {', '.join(get_args(kind))}")
    ridge = labels.get("ridge", 1.0)
    if not isinstance(ridge, float) or not (math.isfinite(ridge) and ridge > 0):
        raise ValueError("labels.ridge is not a number above 0")


def _size(rest: Mapping[str, Any]) -> int:
    """Responses to a state."""
    counts = [rest[name] for name in ("states", "vocab", "length")]
    if not all(type(n) is int and n > 0 for n in counts) or counts[1] < 2:
        raise ValueError("'states', 'vocab' (2 or more) and 'length' are whole numbers above 0")
    if counts[2] > 12 or counts[1] ** counts[2] > MOST_RESPONSES:
        raise ValueError(f"more than {MOST_RESPONSES} responses to a state")
    size = counts[1] ** counts[2]
    if counts[0] * size > MOST_IN_ALL:
        raise ValueError(f"{counts[0] * size} responses in all are more than {MOST_IN_ALL}")
    return size


def _finite(name: str, value: Any, shape: tuple[int, int]) -> None:
    table = torch.tensor(value, dtype=torch.float64)
    if tuple(table.shape) != shape or not bool(table.isfinite().all()):
        raise ValueError(f"'{name}' is not a finite table of {shape[0]} x {shape[1]}")


def _check_pairs(pairs: Any, states: int, size: int) -> None:
    limits = (states, size, size)
    for row in pairs:
        whole = isinstance(row, list) and len(row) == 3 and all(type(n) is int for n in row)
        if not whole or not all(0 <= n < most for n, most in zip(row, limits, strict=True)):
            raise ValueError("'pairs' are not rows of [state, chosen, rejected] within range")
    if not pairs:
        raise ValueError("'pairs' is empty")


def _drawn_pairs(data: Mapping[str, Any], rest: Mapping[str, Any]) -> Sequence[Sequence[int]]:
    """Pairs of a data policy: `policy` [S][A] logits, `pairs` how many, `noise` the share of labels
    flipped, `seed`; preferred by Bradley-Terry on the true reward."""
    law = torch.tensor(data["policy"], dtype=torch.float64).softmax(-1)
    reward = torch.tensor(rest["reward"], dtype=torch.float64)
    if law.shape != reward.shape or not bool(law.isfinite().all()):
        raise ValueError("'data.policy' is not a finite table like 'reward'")
    if not (type(data["pairs"]) is int and 0 < data["pairs"] <= MOST_PAIRS):
        raise ValueError(f"'data.pairs' is not a whole number of 1 to {MOST_PAIRS}")
    key, noise = stream_key(int(data.get("seed", 0)), "pairs"), float(data.get("noise", 0.0))
    laws = law.expand(2, *law.shape)
    return draw_pairs(laws, reward, data["pairs"], key, noise=noise).tolist()
