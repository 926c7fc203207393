"""Held-out prompts of a comparison, apart from training and from one another: by some of them rates
are chosen, by the others methods are compared. What chose a rate must not judge it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune import durable
from preftune.comparing.job import DATA
from preftune.config import Config
from preftune.data import Example, check_bad_rows, load_examples
from preftune.errors import UserError
from preftune.numerics import permutation, stream_key
from preftune.runs import dumps

SHARE = 1 / 3
"""Of the data's prompts, where no held-out ones are given."""
MOST_SELECTION, MOST_FINAL = 24, 64
LEAST_SELECTION, LEAST_FINAL, LEAST_TRAINED = 3, 6, 9
"""Prompts."""
SPLIT = "split.json"


@dataclass(frozen=True, kw_only=True)
class Split:
    """How many prompts (and rows to train on) there are of each kind."""

    rows: int
    train: int
    selection: int
    final: int
    given: bool
    """The held-out ones were given as a file of their own."""


def train_file(folder: Path) -> Path:
    """The rows that are trained on."""
    return folder / DATA / "train.jsonl"


def prompts_file(folder: Path) -> Path:
    """Prompts that fresh samples answer, where they are not those of the data."""
    return folder / DATA / "prompts.jsonl"


def held_out_file(folder: Path, kind: str) -> Path:
    """The prompts of the final evaluation, or of the choice of rates (and of the timing)."""
    return folder / DATA / f"{'final' if kind in ('final', 'reference') else 'selection'}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Rows and prompts of each kind, by the name of their file."""

    kept: dict[str, list[Example]]
    """train, prompts: what is trained on."""
    held: dict[str, dict[str, Example]]
    """selection, final."""
    split: Split


def there(folder: Path) -> Split | None:
    """What `write` has left in the folder; None where it has not."""
    done = folder / DATA / SPLIT
    return Split(**json.loads(done.read_text("utf-8"))) if done.is_file() else None


def cut(config: Config) -> Cut:
    """The rows and prompts; the same from the same data and seed.

    Raises:
        UserError: the data cannot be used, or have too few prompts.
    """
    rows = _load(config, config.data, "any") if config.data else []
    drawn = _load(config, config.prompts, "prompts") if config.prompts else []
    asked = _load(config, config.eval_data, "prompts") if config.eval_data else None
    by_prompt = _by_prompt([*rows, *drawn])
    held = _held_out(by_prompt, asked, config.seed)
    apart = {*held["selection"], *held["final"]}
    kept = {n: [e for e in own if _key(e) not in apart] for n, own in
            {"train": rows, "prompts": drawn}.items()}  # fmt: skip
    count = len(_by_prompt([*kept["train"], *kept["prompts"]]))
    _check(count, held, given=asked is not None)
    found = Split(
        rows=len(kept["train"]) or len(kept["prompts"]), train=count,
        selection=len(held["selection"]), final=len(held["final"]), given=asked is not None,
    )  # fmt: skip
    return Cut(kept=kept, held=held, split=found)


def write(cut: Cut, folder: Path) -> Split:
    """Write the files of `cut` into the folder."""
    (folder / DATA).mkdir(parents=True, exist_ok=True)
    for name, path in (("train", train_file(folder)), ("prompts", prompts_file(folder))):
        if cut.kept[name]:
            _write(path, [e.as_row() for e in cut.kept[name]])
    for name, own in cut.held.items():
        _write(held_out_file(folder, name), [_prompt_row(e) for e in own.values()])
    durable.write_text(folder / DATA / SPLIT, dumps(vars(cut.split)) + "\n")  # all are there
    return cut.split


def _load(config: Config, source: str | None, want: str) -> list[Example]:
    loaded = load_examples(source, want=want, max_rows=config.max_rows if want == "any" else None)
    check_bad_rows(loaded, config.bad_rows)
    return loaded.examples


def _key(example: Example) -> str:
    """A prompt as text: rows of one prompt stay together."""
    return json.dumps(example.prompt)


def _by_prompt(examples: Sequence[Example]) -> dict[str, Example]:
    """The first row of each prompt."""
    found: dict[str, Example] = {}
    for example in examples:
        found.setdefault(_key(example), example)
    return found


def _held_out(
    by_prompt: Mapping[str, Example], asked: Sequence[Example] | None, seed: int
) -> dict[str, dict[str, Example]]:
    """Prompts for the choice of rates and for the comparison, in an order drawn once."""
    source = by_prompt if asked is None else _by_prompt(asked)
    listed = list(source)
    order = permutation(stream_key(seed, "held out"), 0, len(listed)).tolist()
    count = round(SHARE * len(listed)) if asked is None else len(listed)
    count = min(count, MOST_SELECTION + MOST_FINAL)
    chosen = [listed[i] for i in order[:count]]
    few = min(MOST_SELECTION, count // 3)
    parts = {"selection": chosen[:few], "final": chosen[few:]}
    return {name: {key: source[key] for key in keys} for name, keys in parts.items()}


def _prompt_row(example: Example) -> dict[str, Any]:
    """What a reward may read beside the prompt stays; answers do not."""
    answers = ("chosen", "rejected", "completion", "messages")
    beside = {k: v for k, v in example.columns.items() if k not in answers}
    return {"prompt": example.prompt, **beside}


def _check(count: int, held: Mapping[str, Mapping[str, Example]], *, given: bool) -> None:
    selection, final = len(held["selection"]), len(held["final"])
    if selection >= LEAST_SELECTION and final >= LEAST_FINAL and count >= LEAST_TRAINED:
        return
    least = LEAST_SELECTION + LEAST_FINAL
    if given:
        raise UserError(
            f"eval_data: {selection + final} prompts are held out and {count} others are left to "
            f"train on. Give at least {least} of the first and {LEAST_TRAINED} of the others."
        )
    raise UserError(
        f"data: {count + selection + final} prompts are too few to hold some of them out. Give at "
        f"least {math.ceil((least - 0.5) / SHARE)}, or held-out ones of their own with --eval-data."
    )


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    durable.write_text(path, "".join(dumps(row) + "\n" for row in rows))
