"""`train` and `first_gradient`: the parts put together around the loop."""

import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune import (
    automatic,
    building,
    checkpoint,
    held_out,
    huggingface,
    loop,
    reference_cache,
    reward_evaluation,
)
from preftune import config as configs
from preftune.config import Config
from preftune.errors import UserError
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
from preftune.rounds import World, group_terms
from preftune.runs import RunFolder
from preftune.samples import Samples, pad_stack


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
    if config.output is not None and not config.resume:
        RunFolder.check_free(Path(config.output))
    tell = teller(callbacks)
    parts = prepare(
        config, model=model, tokenizer=tokenizer, data=data, reward=reward, overrides=overrides
    )
    for note in parts.notes:
        tell("note", message=note)
    settings = make_settings(parts)
    folder = _open_folder(parts, resolved_config(parts, settings))
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
    if keeps_reference(parts):
        world = _with_known(parts, world, settings, tell)
    state = loop.start(parts.method, world, settings)
    if parts.config.resume:
        _go_on(state, folder, tell)
    with _Interrupt() as interrupt:
        hooks = loop.Hooks(
            log=lambda step, metrics: _log(folder, tell, settings.max_steps, step, metrics),
            evaluate=evaluate,
            save=lambda s: _save(s, folder, tell),
            warn=lambda message: tell("note", message=message),
            stop=lambda: interrupt.asked,
        )
        tell("start", step=state.step, total=settings.max_steps, message=parts.method.name)
        loop.advance(state, settings, hooks)
        if interrupt.asked:
            path = checkpoint.save(state, folder.path / "checkpoints")
            tell(
                "interrupted",
                step=state.step,
                message=f"saved {path}; go on with --output {folder.path} --resume",
            )
            raise KeyboardInterrupt
    _save_model(parts, folder)


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


class _Interrupt:
    """The first Ctrl-C asks the loop to end after its step; the second leaves at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "_Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


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
    found = checkpoint.newest(folder.path / "checkpoints")
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
    work.rename(folder.path / "model")


def first_gradient(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    model: Any = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """The first update's gradient in float64, before clipping: a check of a whole row.

    Args:
        config: as for `train`; no run folder is made.
        model: a model object in place of `model`.
        samples: on-policy responses, `{"prompt_ids", "response_ids", "reward"}` each, the end token
            in `response_ids` if the response ended. Grouped by equal prompt, they are the whole
            first round of every on-policy source. Rewards given win over `reward`.
    Returns:
        the gradient of each of the model's named parameters.
    """
    config = configs.load(config)
    # One row a response: some models normalise in float32 whatever their weights are, and then the
    # gradients of a shared prompt differ by that rounding from those of rows by themselves.
    exact = {"dtype": "float64", "share_prefix": bool(config.share_prefix)}
    config = config.model_copy(update=exact)
    parts = prepare(config, model=model, trains=False)
    given = None if samples is None else _given(samples, parts.policy.end_ids)
    groups, world = group_terms(parts.method), make_world(parts)
    for parameter in parts.model.parameters():
        parameter.grad = None
    loop.gradient(groups, world, 0, given)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in parts.model.model.named_parameters()
    }


def _given(rows: Sequence[Mapping[str, Any]], end_ids: Sequence[int]) -> Samples:
    """Given responses as a round, grouped by prompt in the order in which prompts appear."""
    by_prompt: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(tuple(row["prompt_ids"]), []).append(row)
    counts = {len(group) for group in by_prompt.values()}
    if len(counts) != 1:
        raise UserError(
            f"samples: every prompt needs the same number of responses, not {sorted(counts)}."
        )
    prompt, prompt_mask = pad_stack([torch.tensor(p) for p in by_prompt], left=True)
    flat = [row for group in by_prompt.values() for row in group]
    tokens, mask = pad_stack([torch.tensor(row["response_ids"]) for row in flat])
    shape = (len(by_prompt), counts.pop())
    ended = [bool(row["response_ids"]) and row["response_ids"][-1] in end_ids for row in flat]
    rewarded = all(row.get("reward") is not None for row in flat)
    return Samples(
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=tokens.view(*shape, -1),
        mask=mask.view(*shape, -1),
        finished=torch.tensor(ended).view(shape),
        origin=torch.zeros(shape, dtype=torch.long),
        row=torch.arange(shape[0]),
        reward=_rewards(flat).view(shape) if rewarded else None,
    )


def _rewards(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([float(r["reward"]) for r in rows], dtype=torch.float64)
