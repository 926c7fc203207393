"""What a run folder holds, read once and forgivingly.

Only `config.yaml` is required. A half-written last line (an interrupted run) is left out; any other
line that is not a JSON object is an error, because a page that silently lacks data misleads.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from preftune import plain_yaml
from preftune.errors import UserError

REFERENCE = "reference"
"""The method's name in the folder of the untrained model."""

Row = Mapping[str, Any]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A measured number with its 95 % interval; None stands for absent or not finite."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """One run folder in memory."""

    folder: Path
    label: str
    """The method's name, made unique on the page."""
    method: str
    settings: dict[str, str]
    """Dotted path of a setting to its value as text."""
    written: str
    """When `config.yaml` was written (UTC), for runs whose settings hold no date."""
    metrics: list[Row]
    evaluation: dict[str, Estimate]
    answers: list[Row]
    """Rows of `samples.jsonl` on held-out prompts at the last step that has any."""
    alarms: list[Row]
    """Rows of `alarms.jsonl`."""

    @property
    def is_reference(self) -> bool:
        """Whether this is the untrained model."""
        return self.method == REFERENCE


def finite(value: object) -> float | None:
    """`value` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def series(run: RunFolder, key: str) -> list[tuple[float, float | None]]:
    """(step, value) for each row that has `key`; the value is None where it is not finite."""
    found = [(finite(row.get("step")), row) for row in run.metrics if key in row]
    return [(step, finite(row[key])) for step, row in found if step is not None]


def last_evaluation(run: RunFolder, key: str) -> Estimate:
    """The final estimate of `key`; without an evaluation.json, that of the last evaluated step."""
    if key in run.evaluation:
        return run.evaluation[key]
    for row in reversed(run.metrics):
        if f"eval_{key}" in row:
            names = (f"eval_{key}", f"eval_{key}_low", f"eval_{key}_high")
            value, low, high = (finite(row.get(name)) for name in names)
            return Estimate(value=value, low=low, high=high)
    if key == "seconds":  # of updates, where no one measured the whole
        spent = [row["seconds"] for row in run.metrics if row.get("seconds") is not None]
        return Estimate(value=finite(spent[-1])) if spent else Estimate()
    return Estimate()


def gold_of(runs: Sequence[RunFolder]) -> str | None:
    """The figure of the gold reward, `reward:NAME`: that of most runs, None where none has one."""
    names = [name for run in runs for name in run.evaluation if name.startswith("reward:")]
    return Counter(names).most_common(1)[0][0] if names else None


def best_of_n(run: RunFolder, reward: str = "reward") -> dict[int, Estimate]:
    """Reward of best-of-n from the reference by n, where the run measured it.

    Args:
        reward: the figure that it is compared with, `reward` or `reward:NAME`.
    """
    ending = reward.removeprefix("reward")
    found = {
        int(match[1]): run.evaluation[name]
        for name in run.evaluation
        if (match := _BEST_OF.fullmatch(name)) and (match[2] or "") == ending
    }
    return {n: found[n] for n in sorted(found) if found[n].value is not None}


_BEST_OF = re.compile(r"best_of_([1-9]\d{0,8})(:.*)?", re.DOTALL)


def best_of_kl(n: int) -> float:
    """Upper bound of best-of-n's KL to what it draws from, nats (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs in the order given, the untrained model first, each with a label of its own."""
    unique = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not unique:
        raise UserError("No run folder to report on: name at least one.")
    runs = _distinct([read_run(folder) for folder in unique])
    return sorted(runs, key=lambda run: not run.is_reference)


def read_run(folder: Path) -> RunFolder:
    """One run folder; raises `UserError` where there is none or a file in it cannot be read."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no config.yaml. "
            "Name the folder that `preftune train --output` wrote."
        )
    config = _read_config(path)
    method = config.get("method")
    if isinstance(method, Mapping):
        method = method.get("name")
    name = str(method) if method else folder.name
    stamp = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
    return RunFolder(
        folder=folder,
        label=name,
        method=name,
        settings=dict(_flatten(config)),
        written=f"{stamp:%Y-%m-%d %H:%M} UTC",
        metrics=_read_lines(folder / "metrics.jsonl"),
        evaluation=_read_evaluation(folder / "evaluation.json"),
        answers=_last_answers(_read_lines(folder / "samples.jsonl")),
        alarms=_read_lines(folder / "alarms.jsonl"),
    )


def _distinct(runs: list[RunFolder]) -> list[RunFolder]:
    """Equal method names get their folder's name, and its parents' where that is equal too."""
    counts = Counter(run.label for run in runs)
    depth = 1
    while True:
        labels = [
            f"{run.label} ({'/'.join(run.folder.parts[-depth:])})"
            if counts[run.label] > 1
            else run.label
            for run in runs
        ]
        if len(set(labels)) == len(runs) or depth > max(len(run.folder.parts) for run in runs):
            return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
        depth += 1


def _parse(path: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: restore the file or rerun.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. Restore the file or rerun.") from error


def _read_config(path: Path) -> Row:
    config = _parse(path, plain_yaml.load)
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings: a mapping of names to values is expected.")
    return {str(name): value for name, value in config.items()}


def _read_evaluation(path: Path) -> dict[str, Estimate]:
    if not path.is_file():
        return {}
    found = _parse(path, json.loads)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object of estimates: run `preftune evaluate` again.")
    return {str(name): _estimate(value) for name, value in found.items()}


def _estimate(found: object) -> Estimate:
    if not isinstance(found, Mapping):
        return Estimate(value=finite(found))
    value, low, high = (finite(found.get(name)) for name in ("value", "low", "high"))
    return Estimate(value=value, low=low, high=high)


def _read_lines(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    # Bytes are split at line feeds only: str.splitlines would also cut at separators inside a
    # response, and an interrupted run may have stopped inside a character.
    lines = path.read_bytes().split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # no UTF-8 and no JSON are both ValueErrors
            if number == len(lines):  # no line feed after it: the run ended while writing it
                break
            raise UserError(
                f"{path}, line {number} is not JSON: {error}. Mend or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object. Remove it.")
        rows.append(row)
    return rows


def _last_answers(rows: list[Row]) -> list[Row]:
    held_out = [row for row in rows if row.get("set", "eval") == "eval"]
    steps = [finite(row.get("step")) or 0.0 for row in held_out]
    last = max(steps, default=0.0)
    return [row for row, step in zip(held_out, steps, strict=True) if step == last]


def _flatten(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted paths as `--set` takes them; a list of plain values stays one setting."""
    if isinstance(value, Mapping) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, default=str)
        return
    for key, item in items:
        yield from _flatten(item, f"{path}.{key}" if path else key)
