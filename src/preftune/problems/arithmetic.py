"""Sums of two numbers, judged by an exact verifier.

A prompt is "3 + 5 ="; an answer is the sum, or speaks of it: "it is 8". The reference was taught
the sums and then shown wrong ones as often as right ones, so that it knows the right one better
than any other. To a model so small each sum is a fact of its own, so it is judged on the sums that
it trains on: on others nothing that it learns there would help.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preftune.problems import small_models
from preftune.problems.preferences import Task
from preftune.problems.small_models import Shape

LARGEST = 10
PROMPTS = tuple(f"{a} + {b} =" for a in range(LARGEST) for b in range(LARGEST))
OPENINGS = ("", "it is", "that makes", "i think it is")
RIGHT = 0.5
"""Share of right sums that it was shown last."""
TAUGHT, UNSURE = 900, 100
"""Updates on right sums alone, then on wrong ones among them."""
LIMIT = 8
"""Tokens of an answer."""


def words() -> list[str]:
    """All of them, in a fixed order."""
    spoken = sorted({word for text in OPENINGS for word in text.split()})
    return [*map(str, range(2 * LARGEST)), "+", "=", *spoken, "so"]


def _answer(prompt: str, right: float, openings: Sequence[str], rng: np.random.Generator) -> str:
    a, b = prompt.split()[0:3:2]
    total = int(a) + int(b)
    if rng.random() >= right:  # near the sum, as mistakes are
        wrong = [n for n in range(total - 3, total + 4) if 0 <= n < 2 * LARGEST and n != total]
        total = int(rng.choice(wrong))
    return f"{rng.choice(openings)} {total}".strip()


def corpus(count: int, seed: int, right: float = RIGHT, openings: Sequence[str] = OPENINGS) -> Any:
    """Rows of prompt and completion; prompts take turns."""
    rng = np.random.default_rng([seed, 43])
    asked = (PROMPTS[i % len(PROMPTS)] for i in range(count))
    return [{"prompt": p, "completion": _answer(p, right, openings, rng)} for p in asked]


def correct(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number of the answer is the sum, else 0."""
    out = []
    for prompt, text in zip(prompts, completions, strict=True):
        a, b = prompt.split()[0:3:2]
        said = [word for word in text.split() if word.isdigit()]
        out.append(float(bool(said) and int(said[-1]) == int(a) + int(b)))
    return out


def task(folder: Path, shape: Shape | None = None) -> Task:
    """With a writer `strong`, who is right nine times of ten and speaks in another way."""
    size = small_models.BATCH
    stages = {
        "taught": corpus(size * TAUGHT, 0, 1.0), "reference": corpus(size * UNSURE, 1),
        "strong": corpus(size * UNSURE, 2, 0.9, ("so it is",)),
    }  # fmt: skip
    models = small_models.chain(folder, words(), stages, shape=shape or Shape())
    return Task(
        model=models["reference"], prompts=PROMPTS, held_out=PROMPTS, max_new_tokens=LIMIT,
        reward=f"{__name__}:{correct.__name__}", writers={"strong": models["strong"]},
        own=small_models.PLAIN,
    )  # fmt: skip
