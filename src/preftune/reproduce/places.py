"""Language problems of claims: a reference, preference data and a judge, made once in a folder for
each seed and used by every run there.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from preftune import durable, training
from preftune.numerics import stream_key
from preftune.problems import arithmetic, length, story
from preftune.problems.preferences import Pairs, Task, make_pairs
from preftune.problems.small_models import Shape

SMALL = "small"
"""The model that is trained on the spot."""
Source = Literal["true", "rm_same", "rm_other"]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who labels fresh samples."""

    source: Source = "rm_same"
    """true: the task's reward. rm_same: a reward model of the run's own pairs. rm_other: one of
    other pairs of the same kind."""
    pairs: int | None = None
    """Of those that it learns from; None: all."""
    noise: float = 0.0
    """Share of its labels that are turned (the run's own stay)."""
    members: int = 1
    """An ensemble of so many, each of its own half of the pairs where there are several."""
    kappa: float = 0.0
    """The ensemble's mean less so many of its standard deviations."""
    epochs: int = 3
    learning_rate: float = 3e-3


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where runs happen. `folder` says where what is made stands, and is no part of what it is."""

    problem: str
    """min, mode, skew, arithmetic, story or two_modes."""
    model: str = SMALL
    width: int = 64
    """Of the small model."""
    pairs: Pairs = Pairs()
    judge: Judge = Judge()
    folder: str = field(default="", repr=False, compare=False)

    def made(self, seed: int) -> "Made":
        """Everything that a run of this seed needs."""
        task, pairs = _problem(self.problem, self.model, self.width, self.folder)
        spec = replace(self.pairs, shortened=self.pairs.shortened or pairs.shortened)
        return _made(task, spec, self.judge, seed, Path(self.folder))


@dataclass(frozen=True, kw_only=True)
class Made:
    """A place and a seed, ready."""

    task: Task
    pairs: Path
    held_out: Path
    reward: str
    """What is optimised, as in a config."""

    def settings(self) -> dict[str, Any]:
        """Of a run here."""
        learned = self.reward != self.task.reward
        return {
            **self.task.settings(), "data": str(self.pairs), "eval_data": str(self.held_out),
            "reward": self.reward, **({"gold": self.task.reward} if learned else {}),
        }  # fmt: skip


@cache
def _problem(problem: str, model: str, width: int, folder: str) -> tuple[Task, Pairs]:
    """The task, and how its pairs are by themselves."""
    place, shape = Path(folder), Shape(width=width)
    if problem == "arithmetic":
        return arithmetic.task(place / f"sums-{width}", shape), Pairs()
    if problem in ("story", "two_modes"):
        found = story.task(place / f"story-{width}", shape)
        reward = story.either_tone if problem == "two_modes" else story.tone
        return replace(found, reward=f"{story.__name__}:{reward.__name__}"), Pairs()
    if model == SMALL:
        own = place / f"sentences-{width}"
        task = length.small(own, shape)
    else:
        own = place / Path(model).name
        task = length.of_model(model)
    with FileLock(_lock(own)):
        lengths = length.measured(task, own)
    assert problem in length.KINDS, f"'{problem}' is no problem"
    return length.problem(task, problem, lengths)


def _lock(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.lock"


def _made(task: Task, pairs: Pairs, judge: Judge, seed: int, folder: Path) -> Made:
    name = f"{_digest(task, pairs)}-{seed}"
    data = folder / "pairs" / f"{name}.jsonl"
    held_out = folder / "held_out" / f"{_digest(task.held_out)}.jsonl"
    _rows(held_out, lambda: [{"prompt": p} for p in task.held_out])
    _rows(data, lambda: make_pairs(task, pairs, seed=seed))
    reward = task.reward
    if judge.source != "true":
        if judge.source == "rm_other":
            other = folder / "pairs" / f"{name}-other.jsonl"
            _rows(other, lambda: make_pairs(task, pairs, seed=stream_key(seed, "other")))
        else:
            other = data
        reward = _learned(task, judge, other, folder / "rewards" / f"{name}-{_digest(judge)}", seed)
    return Made(task=task, pairs=data, held_out=held_out, reward=reward)


def _digest(*what: Any) -> str:
    return f"{stream_key(*what):016x}"


def _rows(path: Path, make: Callable[[], list[dict[str, Any]]]) -> None:
    """A file of rows, made once."""
    with FileLock(_lock(path)):
        if not path.is_file():
            durable.write_rows(path, make())


def _learned(task: Task, judge: Judge, pairs: Path, place: Path, seed: int) -> str:
    """A reward model of these pairs, or an ensemble of them; trained once."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()][: judge.pairs]
    names = []
    for member in range(judge.members):
        folder = place / str(member)
        key = stream_key(seed, "reward", member)
        own = rows[member % 2 :: 2] if judge.members > 1 else rows
        with FileLock(_lock(folder)):
            if not (folder / "model" / "config.json").is_file():
                config: Mapping[str, Any] = {
                    "method": "reward", "output": str(folder), "resume": True,
                    "epochs": judge.epochs, "batch_size": 32, "seed": key % 2**31,
                    "learning_rate": judge.learning_rate, "eval_fraction": 0.0, "log_every": 10,
                    **task.settings(),
                }  # fmt: skip
                training.train(config, data=_turned(own, judge.noise, key))
        names.append(str(folder / "model"))
    if len(names) == 1:
        return names[0]
    return f"ensemble:{','.join(names)};kappa={judge.kappa:g}"


def _turned(rows: list[dict[str, Any]], share: float, key: int) -> list[dict[str, Any]]:
    """Some of the pairs the other way round."""
    import numpy as np

    rng = np.random.default_rng([key, 3])
    turned = rng.random(len(rows)) < share
    swap = {"chosen": "rejected", "rejected": "chosen"}

    def other(row: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, value in row.items():
            side = next((s for s in swap if s in name), None)
            out[name.replace(side, swap[side]) if side else name] = value
        return out

    return [other(r) if t else r for r, t in zip(rows, turned.tolist(), strict=True)]
