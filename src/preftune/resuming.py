"""Going on with a run: its settings, its folder, where it stood, and how that is kept."""

import hashlib
from array import array
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from preftune import checkpoint, fingerprint, loop
from preftune.data import Rows
from preftune.data.canonical import LABELS
from preftune.errors import GuardStop, UserError
from preftune.parts import Parts
from preftune.runs import RunFolder
from preftune.team import current


def resumed(values: Mapping[str, Any], objects: Collection[str] = ()) -> Mapping[str, Any]:
    """With `resume`, the settings of the folder's own config.yaml, and what is given besides.

    Args:
        objects: settings in whose place objects are given.
    """
    output = values.get("output")
    if not (values.get("resume") and output and (Path(output) / "config.yaml").is_file()):
        return values
    before = RunFolder(Path(output)).read_config()
    left_out = {*objects, *(("max_steps",) if _other_epochs(before, values) else ())}
    kept = {name: value for name, value in before.items() if name not in left_out}
    return {**kept, **values, **_adapter(before, values)}


def _other_epochs(before: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether epochs are given anew, from which the number of steps follows."""
    given = values.get("epochs", before.get("epochs"))
    return given != before.get("epochs") and "max_steps" not in values and "follow" not in before


def _adapter(before: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's settings of which some are given: the others are as they were."""
    held, given = before.get("adapter"), values.get("adapter")
    given = {"kind": given} if isinstance(given, str) else given
    if not isinstance(held, Mapping) or not isinstance(given, Mapping):
        return {}
    return {"adapter": {**held, **given}}


def finished(folder: RunFolder, settings: loop.Settings) -> bool:
    """Whether its last step is logged and its model written."""
    return _finished(folder, settings.max_steps)


def _finished(folder: RunFolder, steps: int) -> bool:
    def look() -> bool:
        rows = folder.read("metrics.jsonl")
        if not rows or not (folder.path / "model").is_dir():
            return False
        # where the data ended it, there may be more now
        ended = rows[-1].get("ended", "data") != "data"
        return rows[-1]["step"] == steps or ended

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
    kept = checkpoint.last(folder.path / "checkpoints") is not None
    if not (kept or _finished(folder, resolved["max_steps"])):
        _refuse_to_forget(folder)
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


def _refuse_to_forget(folder: RunFolder) -> None:
    """A run that came to its end and kept no checkpoint: going on would train it anew, and drop
    its logs and its model."""

    def ended() -> int | None:
        rows = folder.read("metrics.jsonl")
        return rows[-1]["step"] if rows and (folder.path / "model").is_dir() else None

    step = current().by_main(ended)
    if step is not None:
        raise UserError(
            f"resume '{folder.path}': it ended at step {step} and kept no checkpoint to go on from "
            f"(it ran without --save-every). Train on from its model: --model {folder.path}/model "
            "and another --output."
        )


def go_on(state: loop.State, folder: RunFolder, note: Callable[[str], None]) -> None:
    """Put the run back to its newest whole checkpoint, and its logs with it."""
    found, notes = current().by_main(lambda: checkpoint.newest(folder.path / "checkpoints"))
    for message in notes:
        note(message)
    if found is None:
        _refuse_to_forget(folder)
        note(f"{folder.path} holds no checkpoint: starting from step 0")
    else:
        checkpoint.load(state, found)
        note(f"going on from {found}")
    folder.cut_back(state.step if found else -1)
    if state.pending is not None:  # its step is logged anew
        for name in ("metrics.jsonl", "times.jsonl"):
            folder.drop(name, state.step)


def identity(parts: Parts) -> dict[str, str]:
    """Hashes of what a run needs beside its checkpoint: weights that stay as they were loaded, and
    its rows, of which it keeps no copy."""
    found = {}
    if any(not p.requires_grad for p in parts.model.model.parameters()):
        found["model"] = fingerprint.of_weights(parts.model.model, frozen=True)
    if parts.reference is not None and parts.method.reference_update == "fixed":
        found["reference"] = fingerprint.of_weights(parts.reference.model, frozen=True)
    prompts = None if parts.prompts is parts.data else parts.prompts
    each = zip(checkpoint.ROWS, (parts.data, prompts, parts.held_out), strict=True)
    return found | {name: _of_rows(rows) for name, rows in each if rows is not None}


def _of_rows(rows: Rows) -> str:
    """A hash of the token ids, of what came to its end, and of labels."""
    found = hashlib.sha256()
    for prompt, responses in zip(rows.prompts, rows.responses, strict=True):
        for ids in (prompt, *responses):
            found.update(array("q", [len(ids), *ids]).tobytes())
    labels = {name: rows.columns[name] for name in LABELS if name in rows.columns}
    found.update(fingerprint.as_json([rows.kind, rows.finished, labels]).encode())
    return found.hexdigest()


def keep(state: loop.State, folder: RunFolder) -> Path | None:
    """A checkpoint of where the run stands, if that can be told and written."""
    if not state.step or state.torn or current().sharded:  # of which no process has all
        return None
    with suppress(Exception):  # a full disk, say, which may be why it ends
        return checkpoint.save(state, folder.path / "checkpoints")
    return None


def saved(error: BaseException, state: loop.State, folder: RunFolder) -> BaseException:
    """The same error, with what was reached saved: a reward or a judge that failed may be back
    later, an update that was not finite may be left out then, and a fault of ours be mended."""
    said, details = str(error), {}
    if isinstance(error, GuardStop) and error.details:
        details = error.details
        folder.write_json("guard.json", details)
        said += f" The batch is in {folder.path / 'guard.json'}."
    path = keep(state, folder)
    cure = f"Saved {path}: --output {folder.path} --resume goes on from there."
    if isinstance(error, UserError | GuardStop):
        said += f" {cure}" if path else ""
        return GuardStop(said, details) if isinstance(error, GuardStop) else UserError(said)
    if path:
        error.add_note(cure)
    return error
