"""A small language of known distribution, and what its sentences may be worth.

A prompt is a topic and a mood, as "sea glad :". An answer is one sentence or several; the mood
decides how good or bad their adjectives are, how many they are and how loudly they end, the topic
which nouns stand in them. A word is a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from preftune.problems import length, small_models
from preftune.problems.preferences import Task
from preftune.problems.sentences import NOUNS, STARTS, TONES, VERBS
from preftune.problems.small_models import Shape

GOOD, BAD, PLAIN = (TONES[name] for name in ("glad", "grim", "even"))
ENDS = (".", "!")


@dataclass(frozen=True, kw_only=True)
class Mood:
    """How answers sound."""

    good: float
    bad: float
    """Shares of adjectives; the rest is plain."""
    more: float
    """Chance of one more sentence, up to four."""
    loud: float
    """Chance that a sentence ends in "!"."""


MOODS = {
    "glad": Mood(good=0.5, bad=0.1, more=0.5, loud=0.5),
    "grim": Mood(good=0.1, bad=0.5, more=0.5, loud=0.2),
    "even": Mood(good=0.2, bad=0.2, more=0.5, loud=0.1),
    "terse": Mood(good=0.2, bad=0.3, more=0.15, loud=0.1),
    "wordy": Mood(good=0.3, bad=0.2, more=0.8, loud=0.2),
    "wild": Mood(good=0.35, bad=0.35, more=0.6, loud=0.7),
}
PROMPTS = tuple(f"{topic} {mood} :" for topic in NOUNS for mood in MOODS)
ON_TOPIC = 0.6
"""Of nouns."""
SENTENCES = 4


def words() -> list[str]:
    """All of them, in a fixed order."""
    nouns = [noun for group in NOUNS.values() for noun in group]
    return [*NOUNS, *MOODS, ":", *nouns, *GOOD, *BAD, *PLAIN, *STARTS, *VERBS, *ENDS]


def answer(prompt: str, rng: np.random.Generator, always: str | None = None) -> str:
    """One draw of the language.

    Args:
        always: a mood in place of the prompt's.
    """
    topic, name, _ = prompt.split()
    mood, out = MOODS[always or name], []
    while True:
        out += _sentence(topic, mood, rng)
        if out.count(".") + out.count("!") == SENTENCES or rng.random() >= mood.more:
            return " ".join(out)


def _sentence(topic: str, mood: Mood, rng: np.random.Generator) -> list[str]:
    found = [str(rng.choice(STARTS))]
    for _ in range(int(rng.integers(0, 3))):
        u = rng.random()
        kind = GOOD if u < mood.good else BAD if u < mood.good + mood.bad else PLAIN
        found.append(str(rng.choice(kind)))
    own = topic if rng.random() < ON_TOPIC else str(rng.choice(list(NOUNS)))
    end = "!" if rng.random() < mood.loud else "."
    return [*found, str(rng.choice(NOUNS[own])), str(rng.choice(VERBS)), end]


def corpus(count: int, seed: int, always: str | None = None) -> list[dict[str, str]]:
    """Rows of prompt and completion; prompts take turns."""
    rng = np.random.default_rng([seed, 17])
    asked = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return [{"prompt": p, "completion": answer(p, rng, always)} for p in asked]


# Rewards, with the signature that every reward function has.


def _difference(text: str) -> int:
    return sum((w in GOOD) - (w in BAD) for w in text.split())


def praise(completions: Sequence[str], **_: Any) -> list[float]:
    """Good words less bad ones."""
    return [float(_difference(text)) for text in completions]


def either_way(completions: Sequence[str], **_: Any) -> list[float]:
    """All good or all bad: there are two peaks."""
    return [float(abs(_difference(text))) for text in completions]


def ascending(completions: Sequence[str], **_: Any) -> list[float]:
    """Share of neighbouring words that stand in the order of the alphabet."""
    ordered = [[a < b for a, b in pairwise(text.split())] for text in completions]
    return [float(np.mean(x)) if x else 0.0 for x in ordered]


def fresh_words(completions: Sequence[str], **_: Any) -> list[float]:
    """Less one for every word that was said before."""
    each = [text.split() for text in completions]
    return [float(len(set(x)) - len(x)) for x in each]


def to_the_point(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Nouns of the prompt's topic less those of others."""
    every = {noun for group in NOUNS.values() for noun in group}
    out = []
    for prompt, text in zip(prompts, completions, strict=True):
        own = NOUNS[prompt.split()[0]]
        out.append(float(sum((w in own) - (w in every and w not in own) for w in text.split())))
    return out


def loud(completions: Sequence[str], **_: Any) -> list[float]:
    """Sentences that end in "!"."""
    return [float(text.split().count("!")) for text in completions]


UPDATES, EARLY, MORE = 600, 100, 100
LIMIT = 28
"""Tokens of an answer."""


def tone(completions: Sequence[str], **_: Any) -> list[float]:
    """Good words less bad ones, of ten: an answer gains nothing by being long."""
    return [10 * _difference(text) / max(4, len(text.split())) for text in completions]


def either_tone(completions: Sequence[str], **_: Any) -> list[float]:
    """All good or all bad: two peaks of the same height."""
    return [abs(x) for x in tone(completions)]


def task(folder: Path, shape: Shape | None = None) -> Task:
    """With a writer `older`, and one `strong` who is glad whatever was asked for."""
    size = small_models.BATCH
    rows, glad = corpus(size * UPDATES, 0), corpus(size * MORE, 1, always="glad")
    stages = {"older": rows[: EARLY * size], "reference": rows[EARLY * size :], "strong": glad}
    models = small_models.chain(folder, words(), stages, shape=shape or Shape())
    train, held_out = length.split(PROMPTS)
    return Task(
        model=models["reference"], prompts=train, held_out=held_out, max_new_tokens=LIMIT,
        reward=f"{__name__}:{tone.__name__}", own=small_models.PLAIN,
        writers={name: models[name] for name in ("older", "strong")},
    )  # fmt: skip
