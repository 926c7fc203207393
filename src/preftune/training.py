"""`train`: the parts put together around the loop."""

import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune import (
    automatic,
    building,
    checkpoint,
    durable,
    fingerprint,
    held_out,
    huggingface,
    loop,
    reference_cache,
    reward_evaluation,
    rewards,
)
from preftune import config as configs
from preftune.config import Config
from preftune.errors import GuardStop, Saved, UserError
from preftune.parts import (
    Parts,
    blocks_are,
    keeps_reference,
    make_settings,
    make_world,
    prepare,
    resolved_config,
)
from preftune.policies.transformer import Transformer
from preftune.report import write_report
from preftune.reward_model import RewardModel
from preftune.rounds import World
from preftune.runs import JUDGED, RunFolder
from preftune.signals import Signals


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a callback is told."""

    kind: str
    """note, stage (work before the first update), start, step, save, end or interrupted."""
    step: int = 0
    total: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""


Callback = Callable[[Event], None]
Tell = Callable[..., None]
"""tell(kind, **fields of Event)."""


@dataclass(kw_only=True)
class Run:
    """A finished run."""

    folder: Path
    metrics: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    policy: Transformer | RewardModel
    """The model that was trained; a reward model where the row trains one."""
    parts: Parts


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    reward: Any = None,
    callbacks: Sequence[Callback] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Run:
    """Tune a model on preferences.

    Args:
        config: a Config, a mapping of settings, or the path of a YAML file.
        model, tokenizer: objects in place of `model`.
        data: a list of rows or a data set in place of `data`.
        reward: a function `(prompts, completions, **columns) -> list[float]` in place of `reward`.
        callbacks: called with an `Event` as the run goes on.
        overrides: dotted paths below `terms` to values (the command line's --set).
    Raises:
        UserError: a mistake in the settings, data or reward.
        GuardStop: the run diverged.
    """
    config = configs.load(config)
    if config.resume and config.output is None:
        raise UserError("resume: give the run's folder with --output.")
    with ExitStack() as held:
        return _train(config, held, teller(callbacks), overrides, model, tokenizer, data, reward)


def _train(
    config: Config, held: ExitStack, tell: Tell, overrides: Mapping[str, Any] | None,
    model: Any, tokenizer: Any, data: Any, reward: Any,
) -> Run:  # fmt: skip
    """`train`; what is held is let go of afterwards."""
    if config.output is not None and config.resume and Path(config.output).is_dir():
        held.enter_context(RunFolder.held(Path(config.output)))
    elif config.output is not None:
        RunFolder.check_free(Path(config.output))
    parts = prepare(
        config, model=model, tokenizer=tokenizer, data=data, reward=reward, overrides=overrides
    )
    for note in parts.notes:
        tell("note", message=note)
    settings = make_settings(parts)
    if not RunFolder.is_held(parts.output):  # it is made only now
        held.enter_context(RunFolder.held(parts.output))
        RunFolder.check_free(parts.output)
    folder = _open_folder(parts, resolved_config(parts, settings))
    _keep_answers(parts, folder)
    evaluate = None
    if parts.held_out is not None:
        scores = isinstance(parts.model, RewardModel)
        evaluate = (reward_evaluation if scores else held_out).evaluator(parts, folder)
    execute(parts, settings, folder, evaluate=evaluate, tell=tell)
    write_report([folder.path], folder.path / "report.html")
    tell("end", step=settings.max_steps, total=settings.max_steps, message=str(folder.path))
    return Run(
        folder=folder.path, metrics=folder.read("metrics.jsonl"), policy=parts.model, parts=parts
    )


def teller(callbacks: Sequence[Callback]) -> Tell:
    """Tell every callback."""

    def tell(kind: str, **details: Any) -> None:
        for callback in callbacks:
            callback(Event(kind=kind, **details))

    return tell


def execute(
    parts: Parts,
    settings: loop.Settings,
    folder: RunFolder,
    *,
    evaluate: Callable[[int], dict[str, Any]] | None,
    tell: Tell,
) -> None:
    """Run the loop in a run folder, from its last checkpoint on resume, and save the model."""
    if parts.config.resume and _finished(folder, settings):
        tell("note", message=f"{folder.path} is finished")
        return
    _make_blocks(parts, settings, tell)
    world = make_world(parts)
    identity = _identity(parts)
    if keeps_reference(parts):
        world = _with_known(parts, world, settings, tell)
    state = loop.start(parts.method, world, settings)
    state.identity = identity
    if parts.config.resume:
        _go_on(state, folder, tell)
    with Signals() as signals:
        hooks = loop.Hooks(
            log=lambda step, metrics: _log(folder, tell, settings.max_steps, step, metrics),
            evaluate=evaluate,
            save=lambda s: _save(s, folder, tell),
            warn=lambda message: tell("note", message=message),
            stop=lambda: signals.asked is not None,
        )
        tell("start", step=state.step, total=settings.max_steps, message=parts.method.name)
        try:
            loop.advance(state, settings, hooks)
        except (UserError, GuardStop) as error:
            raise _saved(error, state, folder) from error
        if signals.asked is not None:
            path = checkpoint.save(state, folder.path / "checkpoints")
            message = f"saved {path}; go on with --output {folder.path} --resume"
            tell("interrupted", step=state.step, message=message)
            raise KeyboardInterrupt if signals.asked == signal.SIGINT else Saved(message)
    _take_best(state, folder, tell)
    _save_model(parts, folder)


def _keep_answers(parts: Parts, folder: RunFolder) -> None:
    """A judge is asked each question once in a run, however often the run is resumed."""
    path = folder.path / JUDGED
    parts.reward = parts.reward and rewards.kept(parts.reward, path)
    parts.gold = parts.gold and rewards.kept(parts.gold, path)


def _identity(parts: Parts) -> dict[str, str]:
    """Hashes of what a run needs beside its checkpoint: weights that stay as they were loaded."""
    found = {}
    if any(not p.requires_grad for p in parts.model.model.parameters()):
        found["model"] = fingerprint.of_weights(parts.model.model, frozen=True)
    if parts.reference is not None and parts.method.reference_update == "fixed":
        found["reference"] = fingerprint.of_weights(parts.reference.model, frozen=True)
    return found


def _saved(
    error: UserError | GuardStop, state: loop.State, folder: RunFolder
) -> UserError | GuardStop:
    """The same error, with what was reached saved: a reward or a judge that failed may be back
    later, and an update that was not finite may be left out then."""
    said, details = str(error), {}
    if isinstance(error, GuardStop) and error.details:
        details = error.details
        folder.write_json("guard.json", details)
        said += f" The batch is in {folder.path / 'guard.json'}."
    # a reference that moves at rounds has moved already
    if state.step and state.method.reference_update != "round":
        with suppress(UserError, GuardStop):  # a full disk, say, which may be the error itself
            path = checkpoint.save(state, folder.path / "checkpoints")
            said += f" Saved {path}: --output {folder.path} --resume goes on from there."
    return GuardStop(said, details) if isinstance(error, GuardStop) else UserError(said)


def _take_best(state: loop.State, folder: RunFolder, tell: Tell) -> None:
    """With `best_by`, the model of the best evaluation is what the run leaves."""
    if state.best is None or state.best[0] == state.step:
        return
    path = folder.path / "checkpoints" / f"step-{state.best[0]:06d}"
    checkpoint.load_weights(state, path)
    tell("note", message=f"the model is that of step {state.best[0]}, the best")


def _make_blocks(parts: Parts, settings: loop.Settings, tell: Tell) -> None:
    """Compile the models' blocks, or have their activations recomputed, as settled."""
    chosen = blocks_are(parts, settings)
    compiled, recomputed = chosen["compile"], chosen["activation_checkpointing"]
    if compiled:
        tell("note", message="the model's blocks are compiled: the first steps take a minute more")
    automatic.apply(parts.model.trunk, compiled=compiled, recomputed=recomputed)
    if parts.reference is not None and not parts.reference.trunk.adapter_off:
        automatic.apply(parts.reference.trunk, compiled=compiled, recomputed=False)


def _with_known(parts: Parts, world: World, settings: loop.Settings, tell: Tell) -> World:
    """The world with the reference's log-probs of the data; without a reference that nothing else
    asks for, whose memory is free then."""
    config, renderer = parts.config, parts.renderer
    assert renderer is not None, "data were rendered"
    world = reference_cache.attach(
        world,
        parts.method,
        settings.max_steps,
        reference_cache.text_settings(renderer, config.truncation, config.max_length),
        note=lambda message: tell("note", message=message),
        tick=lambda stage, done, total: tell("stage", step=done, total=total, message=stage),
    )
    if world.reference is None and parts.held_out is None:
        parts.reference = None
    return world


def resumed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """With `resume`, the settings of the folder's own config.yaml, and what is given besides."""
    output = values.get("output")
    if values.get("resume") and output and (Path(output) / "config.yaml").is_file():
        return {**RunFolder(Path(output)).read_config(), **values}
    return values


def _finished(folder: RunFolder, settings: loop.Settings) -> bool:
    rows = folder.read("metrics.jsonl")
    return (
        bool(rows) and rows[-1]["step"] == settings.max_steps and (folder.path / "model").is_dir()
    )


def _open_folder(parts: Parts, resolved: dict[str, Any]) -> RunFolder:
    """The run folder: a new one, or on resume the one that is there, if its settings agree."""
    if not (parts.config.resume and (parts.output / "config.yaml").exists()):
        return RunFolder.create(parts.output, resolved)
    folder = RunFolder(parts.output)
    before = folder.read_config()
    free = {"max_steps", "epochs", "log_every", "eval_every", "save_every", "threads", "device"}
    free |= {"max_skipped"}
    free |= {"reference_cache"}  # the same values, up to rounding
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


def _go_on(state: loop.State, folder: RunFolder, tell: Tell) -> None:
    found, notes = checkpoint.newest(folder.path / "checkpoints")
    for note in notes:
        tell("note", message=note)
    if found is None:
        tell("note", message=f"{folder.path} holds no checkpoint: starting from step 0")
    else:
        checkpoint.load(state, found)
        tell("note", message=f"going on from {found}")
    folder.cut_back(state.step if found else -1)


def _log(folder: RunFolder, tell: Tell, total: int, step: int, metrics: dict[str, Any]) -> None:
    row = {"step": step, **metrics}
    times = {name: row.pop(name) for name in metrics if name.startswith(loop.OF_TIME)}
    folder.append("metrics.jsonl", [row])  # but for `seconds` the same, however often it is run
    if times:
        folder.append("times.jsonl", [{"step": step, **times}])
    tell("step", step=step, total=total, metrics=row)


def _save(state: loop.State, folder: RunFolder, tell: Tell) -> None:
    path = checkpoint.save(state, folder.path / "checkpoints")
    tell("save", step=state.step, message=str(path))


def _save_model(parts: Parts, folder: RunFolder) -> None:
    """Write `model/`, which appears whole."""
    work = folder.path / ".tmp-model"
    shutil.rmtree(work, ignore_errors=True)
    if isinstance(parts.model, RewardModel):
        parts.model.save(work, parts.tokenizer)
    else:
        tokenizer = parts.tokenizer
        if parts.model.controls is not None:
            tokenizer = building.asking_for_good(tokenizer)
        huggingface.save_model(parts.model.model, tokenizer, work)
    shutil.rmtree(folder.path / "model", ignore_errors=True)
    durable.reach("model")
    work.rename(folder.path / "model")
