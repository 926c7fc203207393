"""A small language whose answers have a known distribution of lengths, whatever they speak of.

A prompt is two topics and a tone, as "sea king glad :". An answer has as many words as a length
drawn from `LENGTHS`: nouns of the topics, adjectives of the tone, in the order of English. A word
is a token.
"""

from typing import Any

import numpy as np

NOUNS = {
    "sea": ("ship", "wave", "fish", "sail"), "farm": ("cow", "barn", "field", "hen"),
    "town": ("street", "shop", "tower", "crowd"), "king": ("crown", "sword", "queen", "throne"),
    "sky": ("star", "moon", "cloud", "bird"), "meal": ("bread", "soup", "plum", "cake"),
    "game": ("ball", "goal", "team", "score"), "road": ("cart", "bridge", "inn", "mile"),
}  # fmt: skip
TONES = {
    "glad": ("bright", "kind", "sweet", "fine"), "grim": ("dark", "cruel", "sour", "grey"),
    "even": ("old", "small", "long", "round"),
}  # fmt: skip
STARTS = ("the", "a", "one", "this")
VERBS = ("falls", "grows", "rests", "runs", "sings", "waits")
JOINS = ("and", "while", "then", "but")
PROMPTS = tuple(f"{a} {b} {tone} :" for a in NOUNS for b in NOUNS if a != b for tone in TONES)

FAILURES, MEAN = 6, 9.0
LONGEST = 24
"""Tokens of an answer at most, the end token not counted."""


def _lengths() -> np.ndarray:
    """P[length = k] for k = 0 to `LONGEST`: 1 + a negative binomial of `FAILURES` and `MEAN`, what
    would be longer left out. The most common is 8; one in sixty has three words or fewer."""
    success = FAILURES / (FAILURES + MEAN)
    mass = [0.0, success**FAILURES]
    for k in range(1, LONGEST):
        mass.append(mass[-1] * (1 - success) * (FAILURES + k - 1) / k)
    return np.array(mass) / sum(mass)


LENGTHS = _lengths()


def words() -> list[str]:
    """All of them, in a fixed order."""
    nouns = [noun for group in NOUNS.values() for noun in group]
    adjectives = [word for group in TONES.values() for word in group]
    return [*NOUNS, *TONES, ":", *nouns, *adjectives, *STARTS, *VERBS, *JOINS]


def answer(prompt: str, rng: np.random.Generator) -> str:
    """One draw of the language."""
    first, second, tone, _ = prompt.split()
    own = (*NOUNS[first], *NOUNS[second])
    length, out = int(rng.choice(LONGEST + 1, p=LENGTHS)), []
    while len(out) < length:
        adjectives = [str(rng.choice(TONES[tone])) for _ in range(int(rng.integers(0, 3)))]
        clause = [str(rng.choice(STARTS)), *adjectives, str(rng.choice(own))]
        out += [*clause, str(rng.choice(VERBS)), str(rng.choice(JOINS))]
    return " ".join(out[:length])


def corpus(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of prompt and completion; prompts take turns."""
    rng = np.random.default_rng([seed, 41])
    return [
        {"prompt": p, "completion": answer(p, rng)}
        for p in (PROMPTS[i % len(PROMPTS)] for i in range(count))
    ]
