"""The synthetic length problems of arXiv 2404.14367 section 4: a reward of the length alone, whose
best answers are unlikely (min), the most common (mode), or unlikely where also the preference data
do not cover what the model says (skew). What is optimised is a reward model learned from the data.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from preftune import config, durable
from preftune.errors import UserError
from preftune.numerics import permutation, stream_key
from preftune.problems import sentences, small_models
from preftune.problems.answering import answers
from preftune.problems.preferences import Pairs, Task
from preftune.problems.small_models import Shape

Kind = Literal["min", "mode", "skew"]
KINDS: tuple[Kind, ...] = ("min", "mode", "skew")
HELD_OUT = 64
"""Prompts that no run trains on."""
UPDATES, EARLY = 600, 100
"""Of the small reference, and of the older model that it was on the way."""
SHORTENED = 0.35
"""Mean of the exponential distribution of Skew Length, as a share of the model's mean length."""
ASKED, TO_EACH = 48, 8
"""Prompts and answers by which lengths are measured."""
MOST_END = 0.5
"""Share of answers that must come to an end, for their most common length to be a target."""


def small(folder: Path, shape: Shape | None = None) -> Task:
    """The small language, with a reference trained from nothing on it (half a minute).

    Args:
        folder: of its models; what is there is taken.
    """
    rows = sentences.corpus(small_models.BATCH * UPDATES, seed=0)
    early = small_models.BATCH * EARLY
    stages = {"older": rows[:early], "reference": rows[early:]}
    models = small_models.chain(folder, sentences.words(), stages, shape=shape or Shape())
    train, held_out = split(sentences.PROMPTS)
    return Task(
        model=models["reference"], prompts=train, held_out=held_out, reward="length:min",
        max_new_tokens=sentences.LONGEST, writers={"older": models["older"]},
        own=small_models.PLAIN,
    )  # fmt: skip


def of_model(model: str, prompts: Sequence[Any] = (), max_new_tokens: int = 48) -> Task:
    """Any model on these prompts (by default the short instructions that come with preftune)."""
    train, held_out = split(prompts or _instructions())
    return Task(
        model=model, prompts=train, held_out=held_out, reward="length:min",
        max_new_tokens=max_new_tokens,
    )  # fmt: skip


def split(prompts: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Prompts to train on, and others by chance: `HELD_OUT`, or half of them where they are few."""
    order = permutation(stream_key("length", "prompts"), 0, len(prompts)).tolist()
    mixed, held = [prompts[i] for i in order], min(HELD_OUT, len(prompts) // 2)
    return tuple(mixed[held:]), tuple(mixed[:held])


def _instructions() -> list[Any]:
    found = []
    for name in ("pairs.jsonl", "heldout.jsonl"):
        text = resources.files("preftune.data").joinpath("default", name).read_text("utf-8")
        found += [json.loads(line)["prompt"] for line in text.splitlines()]
    unique = {json.dumps(prompt): prompt for prompt in found}
    return list(unique.values())


def measured(
    task: Task, folder: Path, tick: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, float]:
    """What the reference's lengths are: `mean`, `mode` and `finished`, the share that came to an
    end; in tokens, kept in a file of the folder.

    The mode is that of answers which came to an end, for those that are cut all have the limit's
    length; and of lengths smoothed over three neighbours: of a few hundred answers, the most
    common one alone would be by chance.
    """
    path = folder / "lengths.json"
    if path.is_file() and "finished" in (found := json.loads(path.read_text())):
        return found
    asked = answers(
        config.load(task.settings()), task.prompts[:ASKED], TO_EACH,
        seed=stream_key("length", "measured"), tick=tick,
    )  # fmt: skip
    said = [one for own in asked for one in own]
    ended = [len(one.ids) for one in said if one.finished]
    count = [ended.count(k) for k in range(task.max_new_tokens + 2)]
    near = [sum(count[max(0, k - 1) : k + 2]) for k in range(1, task.max_new_tokens)]
    out = {
        "mean": statistics.mean(len(one.ids) for one in said),
        "mode": 1 + near.index(max(near)), "finished": len(ended) / len(said),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, json.dumps(out) + "\n")
    return out


def problem(
    task: Task, kind: Kind, lengths: dict[str, float], target: int | None = None
) -> tuple[Task, Pairs]:
    """One of the three: the task with its true reward, and how its preference data come about.

    Args:
        lengths: the reference's (`measured`).
        target: of Mode Length; by default the mode of the reference's lengths.

    Raises:
        UserError: most of its answers are cut, so that they have no common length of their own.
    """
    if kind == "mode" and target is None and lengths["finished"] < MOST_END:
        raise UserError(
            f"Mode Length: {lengths['finished']:.0%} of the answers of '{task.model}' end within "
            f"{task.max_new_tokens} tokens, so their most common length is not known. Give more "
            "max_new_tokens, or a target."
        )
    reward = f"length:mode={target or int(lengths['mode'])}" if kind == "mode" else "length:min"
    shortened = SHORTENED * lengths["mean"] if kind == "skew" else None
    return replace(task, reward=reward), Pairs(shortened=shortened)
