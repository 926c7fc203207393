"""Going on with a run: its settings, its folder, and where it stood."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from preftune import checkpoint, loop
from preftune.errors import UserError
from preftune.parts import Parts
from preftune.runs import RunFolder
from preftune.team import current


def resumed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """With `resume`, the settings of the folder's own config.yaml, and what is given besides."""
    output = values.get("output")
    if values.get("resume") and output and (Path(output) / "config.yaml").is_file():
        before = RunFolder(Path(output)).read_config()
        return {**before, **values, **_adapter(before, values)}
    return values


def _adapter(before: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's settings of which some are given: the others are as they were."""
    held, given = before.get("adapter"), values.get("adapter")
    given = {"kind": given} if isinstance(given, str) else given
    if not isinstance(held, Mapping) or not isinstance(given, Mapping):
        return {}
    return {"adapter": {**held, **given}}


def finished(folder: RunFolder, settings: loop.Settings) -> bool:
    """Whether its last step is logged and its model written."""

    def look() -> bool:
        rows = folder.read("metrics.jsonl")
        if not rows or not (folder.path / "model").is_dir():
            return False
        # where the data ended it, there may be more now
        ended = rows[-1].get("ended", "data") != "data"
        return rows[-1]["step"] == settings.max_steps or ended

    return current().by_main(look)


def open_folder(parts: Parts, resolved: dict[str, Any]) -> RunFolder:
    """The run folder: a new one, or on resume the one that is there, if its settings agree."""
    there = current().by_main(lambda: (parts.output / "config.yaml").exists())
    if not (parts.config.resume and there):
        return RunFolder.create(parts.output, resolved)
    folder = RunFolder(parts.output)
    before = folder.read_config()
    free = {"max_steps", "epochs", "log_every", "eval_every", "save_every", "threads", "device"}
    free |= {"max_skipped", "trackers"}
    if ("follow" in before) == ("follow" in resolved):  # else an epoch is something else
        free |= {"follow"}
    free |= {"reference_cache"}  # the same values, up to rounding
    free |= {"sampler"}  # another server, which has the same weights
    if "follow" in resolved:  # how often each wave is gone through
        free -= {"epochs"}
    old, new = _flat(before), _flat(resolved)
    differs = [k for k in {**old, **new} if k not in free and old.get(k) != new.get(k)]
    if differs:
        changes = "; ".join(f"{k}: {old.get(k)!r} became {new.get(k)!r}" for k in sorted(differs))
        raise UserError(
            f"resume '{parts.output}': the settings differ: {changes}. "
            "Only the number of steps and logging may."
        )
    folder.write_config(resolved)
    return folder


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested settings by dotted path, so that a difference names the one that changed."""
    if isinstance(value, Mapping):
        pairs = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        pairs = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {path: value}
    return {p: x for k, v in pairs for p, x in _flat(v, f"{path}.{k}" if path else k).items()}


def go_on(state: loop.State, folder: RunFolder, note: Callable[[str], None]) -> None:
    """Put the run back to its newest whole checkpoint, and its logs with it."""
    found, notes = current().by_main(lambda: checkpoint.newest(folder.path / "checkpoints"))
    for message in notes:
        note(message)
    if found is None:
        note(f"{folder.path} holds no checkpoint: starting from step 0")
    else:
        checkpoint.load(state, found)
        note(f"going on from {found}")
    folder.cut_back(state.step if found else -1)
