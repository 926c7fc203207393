"""`train`: the parts put together around the loop."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from preftune import (
    automatic,
    checkpoint,
    engines,
    fingerprint,
    following,
    held_out,
    loop,
    reference_cache,
    resuming,
    reward_evaluation,
    run_output,
    trackers,
)
from preftune import config as configs
from preftune.config import Config
from preftune.errors import Saved, UserError
from preftune.events import Callback, Tell, teller
from preftune.parts import (
    Parts,
    blocks_are,
    keeps_reference,
    make_settings,
    make_world,
    resolved_config,
)
from preftune.policies.base import Sampler
from preftune.policies.sharding import gathered
from preftune.policies.transformer import Transformer
from preftune.preparing import prepare
from preftune.report import write_report
from preftune.reward_model import RewardModel
from preftune.rounds import World
from preftune.runs import RunFolder
from preftune.signals import Signals
from preftune.team import current, together


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
        reward: in place of `reward`: a function `(prompts, completions, **columns) -> list[float]`
            as TRL's trainers take it, a sequence-classification model, or a list of these.
        callbacks: called with an `Event` as the run goes on.
        overrides: dotted paths below `terms` to values (the command line's --set).
    Raises:
        UserError: a mistake in the settings, data or reward.
        GuardStop: the run diverged.
    """
    config = configs.load(config)
    if config.resume and config.output is None:
        raise UserError("resume: give the run's folder with --output.")
    objects = {"model": model, "data": data, "reward": reward}
    with together() as team, ExitStack() as held:
        if config.resume:  # what was automatic stays as it was found
            own, given = config.model_dump(exclude_unset=True), objects.items()
            names = [name for name, x in given if x is not None]
            config = configs.load(team.by_main(lambda: resuming.resumed(own, names)))
        told = callbacks if team.main else ()
        return _train(config, held, told, overrides, model, tokenizer, data, reward)


def _train(
    config: Config, held: ExitStack, callbacks: Sequence[Callback],
    overrides: Mapping[str, Any] | None, model: Any, tokenizer: Any, data: Any, reward: Any,
) -> Run:  # fmt: skip
    """`train`; what is held is let go of afterwards."""
    tell = teller(callbacks)
    if config.output is not None and config.resume and Path(config.output).is_dir():
        held.enter_context(RunFolder.held(Path(config.output)))
    elif config.output is not None:
        RunFolder.check_free(Path(config.output))
    trackers.check(config.trackers or ())
    parts = prepare(
        config, model=model, tokenizer=tokenizer, data=data, reward=reward, overrides=overrides
    )
    for note in parts.notes:
        tell("note", message=note)
    settings = make_settings(parts)
    if not RunFolder.is_held(parts.output):  # it is made only now
        held.enter_context(RunFolder.held(parts.output))
        RunFolder.check_free(parts.output)
    folder = resuming.open_folder(parts, resolved_config(parts, settings))
    if config.trackers and current().main:
        follow = trackers.following(config.trackers, folder, folder.read_config())
        tell = teller((*callbacks, held.enter_context(follow)))
    run_output.keep_answers(parts, folder)
    if parts.followed is not None:
        parts.followed.keep_in(folder)
    evaluate = None
    if parts.held_out is not None:
        scores = isinstance(parts.model, RewardModel)
        evaluate = (reward_evaluation if scores else held_out).evaluator(parts, folder)
    execute(parts, settings, folder, evaluate=evaluate, tell=tell)
    current().by_main(lambda: write_report([folder.path], folder.path / "report.html"))
    tell("end", step=settings.max_steps, total=settings.max_steps, message=str(folder.path))
    return Run(
        folder=folder.path, metrics=folder.read("metrics.jsonl"), policy=parts.model, parts=parts
    )


def execute(
    parts: Parts,
    settings: loop.Settings,
    folder: RunFolder,
    *,
    evaluate: Callable[[int, bool], dict[str, Any]] | None,
    tell: Tell,
    watch: Callable[[loop.State], None] = lambda state: None,
    keep_model: bool = True,
) -> None:
    """Run the loop in a run folder, from its last checkpoint on resume, and save the model.

    Args:
        watch: called after each step and what follows it.
        keep_model: False writes no model, so a run that ended is not known as finished.
    """
    if parts.config.resume and resuming.finished(folder, settings):
        tell("note", message=f"{folder.path} is finished")
        return
    _make_blocks(parts, settings, tell)
    world = make_world(parts)
    identity = resuming.identity(parts)
    if keeps_reference(parts):
        world = _with_known(parts, world, settings, tell)
    team = current()
    _check_alike(parts, settings)
    if team.sharded:
        parts.model.shard(team.size)
    state = loop.start(parts.method, world, settings)
    state.identity = identity
    if parts.config.resume:
        resuming.go_on(state, folder, lambda message: tell("note", message=message))
    with _engine(parts, folder, tell) as engine, Signals() as signals:
        state.world = replace(state.world, engine=engine)
        hooks = loop.Hooks(
            log=lambda step, metrics: run_output.log(
                folder, tell, settings.max_steps, step, metrics
            ),
            evaluate=evaluate and (lambda step, last: _evaluate(evaluate, step, last, parts)),
            save=lambda s: run_output.save(s, folder, tell),
            alarm=lambda fired: run_output.alarm(fired, folder, tell),
            after=watch,
            ready=lambda s: _ready(s, parts, signals, tell),
            stop=lambda: _asked(signals) is not None,
        )
        tell("start", step=state.step, total=settings.max_steps, message=parts.method.name)
        with _saving(state, folder):
            loop.advance(state, settings, hooks)
        asked = _asked(signals)
        if asked is not None:
            path = checkpoint.save(state, folder.path / "checkpoints")
            message = f"saved {path}; go on with --output {folder.path} --resume"
            raise _left(asked, state, message, tell)
        if state.plateau.reached(state.method.patience) and state.step < settings.max_steps:
            tell("note", message=f"step {state.step}: the reward no longer rises: ended (patience)")
        with _saving(state, folder):
            run_output.take_best(state, folder, tell)
            if keep_model:
                run_output.save_model(parts, folder)
        asked = _asked(signals)  # while that was written
        if asked is not None:
            message = f"all of {folder.path} but its page is written: --resume adds it"
            raise _left(asked, state, message, tell)


@contextmanager
def _saving(state: loop.State, folder: RunFolder) -> Iterator[None]:
    """Whatever fails in it, what was reached is saved (`resuming.saved`)."""
    try:
        yield
    except Exception as error:
        ended = resuming.saved(current().ended(error), state, folder)
        if ended is error:
            raise
        raise ended from error


def _left(asked: int, state: loop.State, message: str, tell: Tell) -> BaseException:
    """What to raise once everything is in order, where a signal asked the run to end."""
    tell("interrupted", step=state.step, message=message)
    return KeyboardInterrupt() if asked == signal.SIGINT else Saved(message)


def _check_alike(parts: Parts, settings: loop.Settings) -> None:
    """Every process must have loaded the same: on several machines, files may differ."""
    team = current()
    if team.size == 1:
        return
    rows = [(len(r), sum(map(len, r.prompts))) for r in (parts.data, parts.prompts) if r]
    weights = [float(p.detach().double().sum()) for p in parts.model.model.parameters()]
    held = fingerprint.as_json([rows, weights, asdict(settings)])
    other = [rank for rank, x in enumerate(team.gather(held)) if x != held]
    if other:
        raise UserError(
            f"processes {team.rank} and {other[0]} loaded different weights, data or settings. "
            "Give all machines the same files and the same version of preftune."
        )


def _asked(signals: Signals) -> int | None:
    """A signal that some process was sent; each must end after the same step."""
    return next((x for x in current().gather(signals.asked) if x is not None), None)


def _ready(state: loop.State, parts: Parts, signals: Signals, tell: Tell) -> bool:
    """Whether the next update has its rows, which are waited for where more are to come."""
    if parts.followed is None or parts.config.follow is None:
        return True
    there = following.wait(
        parts.followed, state.groups, parts.config.batch_size, parts.config.follow,
        asked=lambda: _asked(signals) is not None,
        note=lambda message: tell("note", message=message),
    )  # fmt: skip
    if not there and _asked(signals) is None:
        tell("note", message=f"step {state.step}: no new row of {parts.config.data} came: ended")
    return there


def _evaluate(
    evaluate: Callable[[int, bool], dict[str, Any]], step: int, last: bool, parts: Parts
) -> dict[str, Any]:
    """An evaluation, in which no weights are spread over the processes."""
    with gathered(parts.model):
        return evaluate(step, last)


def _engine(parts: Parts, folder: RunFolder, tell: Tell) -> AbstractContextManager[Sampler | None]:
    """What draws fresh responses in the model's place, if the settings want it."""
    prompts = parts.prompts.prompts if parts.prompts is not None else []
    return engines.engine(
        parts.config, parts.method, parts.model, prompts, folder.path,
        lambda message: tell("note", message=message),
    )  # fmt: skip


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
