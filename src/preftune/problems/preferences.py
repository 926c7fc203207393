"""Pairs labelled by a true reward, made of a model's own answers in several compositions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from preftune import config, judges, rewards
from preftune.errors import UserError
from preftune.numerics import stream_key
from preftune.problems.answering import Said, answers

Tick = Callable[[int, int], None]
Compose = Literal["two", "extremes", "near", "expert", "mixed", "alike"]
OF = 8
"""Answers to choose from, where a composition chooses."""
SPARE = 1.5
"""Pairs are drawn so many times over, since some tie."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is to do."""

    model: str
    """Folder or Hub id of the reference."""
    prompts: tuple[Any, ...]
    held_out: tuple[Any, ...]
    reward: str
    """The true one, as in a config; a mode has its length."""
    max_new_tokens: int
    writers: Mapping[str, str] = field(default_factory=dict)
    """Other models by name, whose answers may stand in pairs."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Settings by which the model is used, as its dtype."""

    def settings(self, model: str | None = None) -> dict[str, Any]:
        """Of any run with its model, or with that one."""
        return {"model": model or self.model, "max_new_tokens": self.max_new_tokens, **self.own}


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How preference data come about. The better by the true reward is chosen; pairs that it ties
    are left out, and those of which one is empty."""

    compose: Compose = "two"
    """two: any two answers. extremes: the best against the worst of eight. near: neighbours in the
    order of eight. expert: two of the best three of eight. mixed: one answer of the writer's and
    one of the reference's. alike: an answer and its first half, so that the two are as much alike
    as can be."""
    writer: str | None = None
    """Whose answers: one of the task's; None is the reference."""
    count: int = 512
    shortened: float | None = None
    """Mean, in tokens, of an exponential distribution: an answer longer than a draw of it is cut
    there and ends (Skew Length, arXiv 2404.14367 section 4)."""
    noise: float = 0.0
    """Share of labels that are turned."""


def make_pairs(
    task: Task, spec: Pairs, *, seed: int, tick: Tick = lambda done, total: None
) -> list[dict[str, Any]]:
    """Rows of prompt, chosen and rejected, with the true score of each.

    Raises:
        UserError: the answers give fewer pairs than half of those asked for.
    """
    rng = np.random.default_rng([stream_key(seed, "composition"), 5])
    true = judges.make_reward(task.reward, None)
    assert true is not None and not rewards.is_open(true), "the true reward is settled"

    def worth(prompt: Any, said: Sequence[Said]) -> list[float]:
        return rewards.judge(
            true,
            rewards.Judged(
                prompts=[prompt] * len(said), completions=[s.text for s in said],
                tokens=[len(s.ids) for s in said], finished=[s.finished for s in said],
            ),
        )  # fmt: skip

    need = math.ceil(SPARE * spec.count / len(task.prompts))
    found: list[dict[str, Any]] = []
    for prompt, pool in zip(task.prompts, _pool(task, spec, need, seed, tick), strict=True):
        pool = [said.cut(_limit(spec.shortened, rng)) for said in pool]
        scores = worth(prompt, pool)
        for a, b in _picked(spec.compose, scores, need, rng):
            first, second = pool[a], pool[b]
            if spec.compose == "alike":
                second = first.cut(len(first.ids) // 2)
            won, lost = worth(prompt, [first, second])
            if won < lost:
                first, second, won, lost = second, first, lost, won
            # a pair of which one side is empty is refused by every command
            if won > lost and first.text.strip() and second.text.strip():
                turned = rng.random() < spec.noise
                found.append(_row(prompt, (first, second), (won, lost), turned))
    if len(found) < spec.count / 2:
        raise UserError(
            f"data: {len(found)} of {need * len(task.prompts)} pairs of answers differ by "
            f"{task.reward} and say anything. Give more prompts, or another reward."
        )
    return [found[i] for i in rng.permutation(len(found))[: spec.count]]


def _limit(mean: float | None, rng: np.random.Generator) -> int:
    return 10**9 if mean is None else 1 + int(rng.exponential(mean))


def _pool(task: Task, spec: Pairs, need: int, seed: int, tick: Tick) -> list[list[Said]]:
    """By prompt: the answers that its pairs are picked from."""
    per_pair = {"two": 2, "mixed": 1, "alike": 1}.get(spec.compose, OF)

    def drawn(writer: str | None) -> list[list[Said]]:
        settings = config.load(task.settings(writer and task.writers[writer]))
        own = stream_key(seed, "answers", writer)
        return answers(settings, task.prompts, per_pair * need, seed=own, tick=tick)

    if spec.compose != "mixed":
        return drawn(spec.writer)
    pairs = zip(drawn(spec.writer), drawn(None), strict=True)
    return [[*theirs, *own] for theirs, own in pairs]


def _picked(
    compose: Compose, scores: Sequence[float], need: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Places in the pool of the two of each pair."""
    if compose == "two":
        return [(2 * i, 2 * i + 1) for i in range(need)]
    if compose == "mixed":
        return [(i, need + i) for i in range(need)]
    if compose == "alike":
        return [(i, i) for i in range(need)]
    out = []
    for i in range(need):
        group = sorted(range(OF * i, OF * (i + 1)), key=lambda j: scores[j])
        if compose == "extremes":
            out.append((group[-1], group[0]))
        elif compose == "near":
            place = int(rng.integers(OF - 1))
            out.append((group[place + 1], group[place]))
        else:
            a, b = rng.choice(3, 2, replace=False)
            out.append((group[-1 - a], group[-1 - b]))
    return out


def _row(
    prompt: Any, pair: tuple[Said, Said], scores: tuple[float, float], turned: bool
) -> dict[str, Any]:
    first, second = pair[::-1] if turned else pair
    one, two = scores[::-1] if turned else scores
    row = {
        "prompt": prompt, "chosen": first.text, "rejected": second.text,
        "score_chosen": one, "score_rejected": two,
    }  # fmt: skip
    flags = {"chosen_finished": first.finished, "rejected_finished": second.finished}
    return row | {name: False for name, done in flags.items() if not done}
