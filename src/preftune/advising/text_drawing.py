"""Draws problems of a language model: a family decides what is good, and members of it differ in
where their pairs come from, in who labels, and in prices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune import judges, rewards
from preftune.advising import text_models
from preftune.advising.drawing import source_of, stakes
from preftune.advising.problem import first_chosen
from preftune.advising.texts import TextLabels, TextProblem, settings_of
from preftune.numerics import stream_key
from preftune.problems import answering, story

HELD_OUT = 16
"""Prompts."""
PAIRS = (256, 512)
"""Multiples of every minibatch."""
SPREADS = (0.7, 1.5)
"""Standard deviations of the true reward over the reference's answers, nats."""
TOKENS = 28
LUCK = 4
"""So many times the answers that are needed are drawn: two that are equal make no pair."""
_HERE = "preftune.problems.story:"
FAMILIES: dict[str, tuple[str, ...]] = {
    "text_length": ("length:mode=6", "length:within=7", "length:mode=16", "length:min"),
    "text_words": (f"{_HERE}praise", f"{_HERE}loud"),
    "text_style": (f"{_HERE}ascending", f"{_HERE}fresh_words"),
    "text_topic": (f"{_HERE}to_the_point",),
    "text_modes": (f"{_HERE}either_way",),
}
"""The rewards that members of a family take in turn."""
SPURIOUS = {
    "text_length": f"{_HERE}loud", "text_words": "length:min", "text_style": f"{_HERE}loud",
    "text_topic": "length:min", "text_modes": f"{_HERE}praise",
}  # fmt: skip
"""What the reward model of `rm_other` also likes."""


@dataclass(frozen=True)
class Said:
    """An answer, and what it is truly worth."""

    text: str
    finished: bool
    worth: float


Pick = Callable[[Sequence[Said]], list[int]]
"""Places of the answers that are left, in the order in which they are taken."""


def _as_drawn(found: Sequence[Said]) -> list[int]:
    return list(range(len(found)))


def _best(found: Sequence[Said]) -> list[int]:
    """The better quarter, in the order in which they were drawn."""
    order = sorted(range(len(found)), key=lambda i: -found[i].worth)
    return sorted(order[: len(order) // LUCK])


def _worst(found: Sequence[Said]) -> list[int]:
    order = sorted(range(len(found)), key=lambda i: found[i].worth)
    return sorted(order[: len(order) // LUCK])


@dataclass(frozen=True, kw_only=True)
class Side:
    """Where the responses of one side come from: some of these models, picked, at a temperature."""

    models: tuple[str, ...] = (text_models.REFERENCE,)
    pick: Pick = _as_drawn
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Where pairs come from."""

    first: Side = Side()
    second: Side | None = None
    """None: as the first."""
    by_origin: bool = False
    """The first is always the chosen one; otherwise by Bradley-Terry on the true reward."""
    noise: float = 0.0
    """Share of labels flipped."""


_OLDER, _EXPERT = Side(models=(text_models.OLDER,)), Side(pick=_best)
POLICIES: dict[str, Policy] = {
    "own": Policy(),
    "stale": Policy(first=_OLDER),
    "expert": Policy(first=_EXPERT),
    "narrow": Policy(first=Side(temperature=0.6)),
    "several": Policy(first=Side(models=(text_models.REFERENCE, text_models.OLDER), pick=_best),
                      second=_OLDER),
    "strong_against_own": Policy(first=_EXPERT, second=Side(), by_origin=True),
    "anti": Policy(first=Side(pick=_worst)),
    "noisy": Policy(noise=0.25),
}  # fmt: skip


def name_of(number: int) -> str:
    """Of a problem, and of its file."""
    return f"{list(FAMILIES)[number % len(FAMILIES)]}-{number:04d}"


def draw(number: int, folder: Path, seed_base: int = 0) -> TextProblem:
    """Problem `number`; families take turns, and in each of them the policies; all else is by
    chance. The models must be there (`text_models.make`)."""
    rng = np.random.default_rng([seed_base, number, 29])
    family = list(FAMILIES)[number % len(FAMILIES)]
    member = number // len(FAMILIES)
    # families begin at different policies, so that a few problems show many of them
    place = (member + 3 * (number % len(FAMILIES))) % len(POLICIES)
    name, policy = list(POLICIES.items())[place]
    spec = FAMILIES[family][member % len(FAMILIES[family])]
    prompts = [story.PROMPTS[i] for i in rng.permutation(len(story.PROMPTS))]
    asked, held_out = sorted(prompts[HELD_OUT:]), sorted(prompts[:HELD_OUT])
    writer = _Writer(folder, seed_base, number)
    spread = float(rng.choice(SPREADS))
    weight = round(spread / writer.spread(spec, asked), 4)
    count = int(rng.choice(PAIRS))
    rows = writer.pairs(policy, asked, count, judges.make_reward(spec, [weight]), rng)
    source = source_of(rng)
    labels = TextLabels(source=source)
    if source == "rm_other":
        spurious = SPURIOUS[family]
        also = round(0.5 * spread / writer.spread(spurious, asked), 4)
        labels = replace(labels, reward=(spec, spurious), reward_weights=(0.8 * weight, also))
    return TextProblem(
        name=name_of(number), family=family, folder=folder,
        reference={"model": text_models.REFERENCE}, reward=[spec], reward_weights=[weight],
        pairs=rows, held_out=[{"prompt": p} for p in held_out], labels=labels,
        max_new_tokens=TOKENS, about={"data": name, "noise": policy.noise},
        **stakes(source, count, rng),
    )  # fmt: skip


class _Writer:
    """Lets the folder's models answer."""

    def __init__(self, folder: Path, *key: int) -> None:
        self.folder, self.key, self.asked = folder, key, 0

    def answers(
        self, model: str, prompts: Sequence[str], count: int, temperature: float
    ) -> list[list[tuple[str, bool]]]:
        """Texts, and whether each ended by itself: `count` to each prompt."""
        self.asked += 1
        seed = stream_key("answers of drawn problems", *self.key, self.asked)
        config = settings_of(str(self.folder / model), TOKENS)
        found = answering.answers(config, prompts, count, seed=seed, temperature=temperature)
        return [[(said.text, said.finished) for said in own] for own in found]

    def spread(self, spec: str, prompts: Sequence[str]) -> float:
        """Standard deviation of a reward over the reference's answers."""
        found = self.answers(text_models.REFERENCE, prompts, 16, 1.0)
        made = judges.make_reward(spec, None)
        each = [_judged(made, p, texts) for p, texts in zip(prompts, found, strict=True)]
        return float(np.std([said.worth for own in each for said in own]))

    def pairs(
        self, policy: Policy, prompts: Sequence[str], count: int, true: Any,
        rng: np.random.Generator,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Rows of prompt, chosen and rejected; prompts take turns."""
        need = -(-count // len(prompts))
        sides = [
            self._side(side, prompts, 2 * LUCK * need, true, rng)
            for side in (policy.first, policy.second)
            if side is not None
        ]
        found: list[tuple[str, Said, Said]] = []
        for i, prompt in enumerate(prompts):
            first = sides[0][i]
            second = sides[-1][i] if len(sides) > 1 else first[1::2]
            first = first if len(sides) > 1 else first[::2]
            different = [(a, b) for a, b in zip(first, second, strict=False) if a.text != b.text]
            # few different answers: they come again
            found += [(prompt, *different[k % len(different)]) for k in range(need) if different]
        found = [found[i] for i in rng.permutation(len(found))[:count]]
        gap = torch.tensor([a.worth - b.worth for _, a, b in found]).double()
        u = torch.from_numpy(rng.random((len(found), 2)))
        first = first_chosen(gap, u, policy.noise, policy.by_origin).tolist()
        return [
            _row(prompt, a, b) if won else _row(prompt, b, a)
            for (prompt, a, b), won in zip(found, first, strict=True)
        ]

    def _side(
        self, side: Side, prompts: Sequence[str], count: int, true: Any, rng: np.random.Generator
    ) -> list[list[Said]]:
        """Each prompt's answers that were picked."""
        share = count // len(side.models)
        each = [self.answers(m, prompts, share, side.temperature) for m in side.models]
        out = []
        for i, prompt in enumerate(prompts):
            found = _judged(true, prompt, [x for of_model in each for x in of_model[i]])
            places = side.pick(found)
            mixed = rng.permutation(places) if len(side.models) > 1 else places
            out.append([found[j] for j in mixed])
        return out


def _judged(reward: Any, prompt: str, answers: Sequence[tuple[str, bool]]) -> list[Said]:
    """The answers that say anything, with what they are worth."""
    said = [(text, done) for text, done in answers if text.strip()]
    texts = [text for text, _ in said]
    judged = rewards.Judged(
        prompts=[prompt] * len(texts), completions=texts,
        tokens=[len(text.split()) for text in texts], finished=[done for _, done in said],
    )  # fmt: skip
    worth = rewards.judge(reward, judged)
    return [Said(*one, w) for one, w in zip(said, worth, strict=True)]


def _row(prompt: str, chosen: Said, rejected: Said) -> dict[str, Any]:
    row = {"prompt": prompt, "chosen": chosen.text, "rejected": rejected.text}
    flags = {"chosen_finished": chosen.finished, "rejected_finished": rejected.finished}
    return row | {name: False for name, done in flags.items() if not done}
