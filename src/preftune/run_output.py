"""What a run leaves in its folder: figures, alarms, checkpoints, the model."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from preftune import (
    adapter_saving,
    building,
    checkpoint,
    durable,
    loop,
    model_card,
    resuming,
    rewards,
)
from preftune.alarms import Fired
from preftune.errors import UserError
from preftune.events import Tell
from preftune.parts import Parts
from preftune.policies.sharding import whole_state
from preftune.reward_model import RewardModel
from preftune.runs import JUDGED, RunFolder
from preftune.team import current


def keep_answers(parts: Parts, folder: RunFolder) -> None:
    """A judge is asked each question once in a run, however often the run is resumed."""
    path = folder.path / JUDGED
    parts.reward = parts.reward and rewards.kept(parts.reward, path)
    parts.gold = parts.gold and rewards.kept(parts.gold, path)


def log(folder: RunFolder, tell: Tell, total: int, step: int, metrics: dict[str, Any]) -> None:
    """An update's figures, times apart, and an evaluation's."""
    row = {"step": step, **metrics}
    times = {name: row.pop(name) for name in metrics if name.startswith(loop.OF_TIME)}
    folder.append("metrics.jsonl", [row])  # but for `seconds` the same, however often it is run
    if times:
        folder.append("times.jsonl", [{"step": step, **times}])
    tell("step", step=step, total=total, metrics=row)


def alarm(fired: Fired, folder: RunFolder, tell: Tell) -> None:
    """What an alarm said."""
    folder.append("alarms.jsonl", [asdict(fired)])
    tell("note", message=fired.message)


def save(state: loop.State, folder: RunFolder, tell: Tell) -> None:
    """A checkpoint."""
    path = checkpoint.save(state, folder.path / "checkpoints")
    tell("save", step=state.step, message=str(path))


def take_best(state: loop.State, folder: RunFolder, tell: Tell) -> None:
    """With `best_by`, the model of the best evaluation is what the run leaves."""
    if state.best is None or state.best[0] == state.step:
        return
    place = folder.path / "checkpoints"
    before = checkpoint.last(place)
    if before is None or checkpoint.step_of(before) < state.step:
        resuming.keep(state, folder)  # from where more steps go on
    state.torn = True
    path = place / f"step-{state.best[0]:06d}"
    checkpoint.load_weights(state.world.policy, path)
    tell("note", message=f"the model is that of step {state.best[0]}, the best")


def save_model(parts: Parts, folder: RunFolder) -> None:
    """Write `model/`, which appears whole.

    Raises:
        UserError: it cannot be written.
    """
    state = whole_state(parts.model.model) if current().sharded else None
    if not current().main:
        return
    work, place = folder.path / ".tmp-model", folder.path / "model"
    try:
        shutil.rmtree(work, ignore_errors=True)
        _write_model(parts, folder, work, state)
        shutil.rmtree(place, ignore_errors=True)
        durable.reach("model")
        work.rename(place)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(
            f"model: '{place}' cannot be written ({error}). Free space, then go on with --resume."
        ) from error


def _write_model(
    parts: Parts, folder: RunFolder, work: Path, state: dict[str, Tensor] | None
) -> None:
    """Weights, tokenizer and card."""
    if isinstance(parts.model, RewardModel):
        parts.model.save(work, building.as_scored(parts.tokenizer, parts.renderer), state)
    else:
        tokenizer = building.as_rendered(parts.tokenizer, parts.renderer)
        if parts.model.controls is not None:
            tokenizer = building.asking_for_good(tokenizer)
        adapter_saving.save_model(parts.model.model, tokenizer, work, parts.model.value_head, state)
    durable.write_text(work / "README.md", model_card.text(parts, folder))
