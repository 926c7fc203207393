"""Checkpoints of a run: weights, optimizer, and every place it has reached.

A checkpoint is a folder of one safetensors file, one JSON file and a manifest (`durable`). Random
draws are functions of counters, so the counters are all of their state.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune import durable
from preftune.alarms import Watch
from preftune.collecting import Cursor
from preftune.durable import Damaged
from preftune.errors import GuardStop, UserError
from preftune.loop import State
from preftune.numerics import whole
from preftune.policies.base import Trainable
from preftune.policies.sharding import spread_like
from preftune.rounds import Group, Round
from preftune.samples import Batch, Samples
from preftune.stopping import Plateau
from preftune.team import current

KEEP = 2
"""Checkpoints besides the best one."""
_OTHERS = (
    Damaged, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    RecursionError, OverflowError,
)  # fmt: skip
"""Errors of reading what is not ours."""
_TENSORS, _PLAIN = "state.safetensors", "state.json"
ROWS = ("data", "prompts", "eval_data")
"""Of a run's identity what is no weights, by the settings that name it."""


def save(run: State, folder: Path) -> Path:
    """Write `checkpoints/step-N`, then drop all but the last two and the best.

    Raises:
        UserError: it cannot be written; the ones before are whole.
    """
    target = folder / f"step-{run.step:06d}"
    tensors, plain = _collect(run)
    if not current().main:  # its state is the main process's
        return target
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if any(name.startswith(("policy/", "optimizer/")) for name in bad):
        raise GuardStop(f"step {run.step}: weights are not numbers: {', '.join(bad[:3])}.")

    def fill(work: Path) -> None:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, work / _TENSORS)
        durable.reach("tensors")
        (work / _PLAIN).write_text(json.dumps(plain), encoding="utf-8")

    try:
        durable.write_folder(target, fill)
    except (OSError, SafetensorError) as error:
        before = _found(folder)
        kept = f"{before[-1]} is whole" if before else "there is none before it"
        raise UserError(
            f"checkpoint: '{target}' cannot be written ({error}); {kept}. "
            "Free space, then go on with --resume."
        ) from error
    keep = set(_found(folder)[-KEEP:])
    if run.best is not None:
        keep.add(folder / f"step-{run.best[0]:06d}")
    for old in _found(folder):
        if old not in keep:
            shutil.rmtree(old)
    return target


def _collect(run: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that changes while a run goes on: tensors, and what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    names = [name for name, _ in run.world.policy.named_parameters()]
    tensors |= {f"policy/{n}": whole(p.detach()) for n, p in run.world.policy.named_parameters()}
    tensors |= {f"reference/{n}": t.detach() for n, t in _moving(run)}
    moments = run.optimizer.state_dict()["state"]
    for i, state in moments.items():
        tensors |= {f"optimizer/{names[i]}/{k}": whole(v) for k, v in state.items()}
    plain: dict[str, Any] = {
        "step": run.step,
        "version": run.version,
        "seconds": run.seconds,
        "watch": asdict(run.watch),
        "skipped": run.skipped,
        "best": run.best,
        "plateau": asdict(run.plateau),
        "pending": run.pending,
        "micro_batch_tokens": run.world.micro_batch_tokens,
        "identity": run.identity,
        "groups": [_group_state(g, f"group{i}", tensors) for i, g in enumerate(run.groups)],
    }
    return tensors, plain


def _moving(run: State) -> Iterable[tuple[str, Tensor]]:
    """Weights of a reference that does not stay as it was made."""
    if run.method.reference_update == "fixed" or run.world.reference is None:
        return ()
    return run.world.reference.tensors()


def _found(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, and why later ones were passed over."""
    notes = []
    for path in reversed(_found(folder)):
        try:
            durable.verify(path)
        except Damaged as reason:
            notes.append(f"{path} is damaged and passed over: {reason}")
        else:
            return path, notes
    return None, notes


def load(run: State, path: Path) -> None:
    """Put a run back where the checkpoint was written.

    Raises:
        UserError: it is damaged, or of another run; the run is as it was.
    """
    try:
        durable.verify(path)
        tensors = load_file(path / _TENSORS)
        plain = json.loads((path / _PLAIN).read_text(encoding="utf-8"))
        _check(run, path, tensors, plain)
        _restore(run, tensors, plain)
    except _OTHERS as error:
        raise UserError(
            f"checkpoint '{path}' cannot be used ({type(error).__name__}: {error}). "
            "Delete this folder to go on from the one before."
        ) from error


def last(folder: Path) -> Path | None:
    """The newest checkpoint, unread."""
    return next(iter(reversed(_found(folder))), None)


def step_of(path: Path) -> int:
    """Updates that a checkpoint has behind it."""
    return int(path.name.removeprefix("step-"))


def load_weights(policy: Trainable, path: Path) -> None:
    """A policy's weights from a checkpoint of its run.

    Raises:
        UserError: it is damaged.
    """
    try:
        durable.verify(path)
        tensors = load_file(path / _TENSORS)
    except (Damaged, SafetensorError, OSError) as error:
        raise UserError(f"checkpoint '{path}' cannot be used ({error}).") from error
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(spread_like(tensors[f"policy/{name}"], parameter))


def _check(run: State, path: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Compare with the run before anything of it is changed."""
    for part, now in run.identity.items():
        if plain["identity"].get(part, now) == now:  # earlier versions knew of weights alone
            continue
        if part in ROWS:
            raise UserError(
                f"checkpoint '{path}': the rows of {part} are not those that the run began with: "
                "some of the old and the new would be trained on and evaluated on at once. Restore "
                "them, or start a new run (with --follow one takes rows as they are added)."
            )
        raise UserError(
            f"checkpoint '{path}': the weights of the {part} are not those that the run began "
            "with. Give the model it was started with, or start a new run."
        )
    for name, tensor in _changing(run):
        held = tensors.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            found = "missing" if held is None else f"{held.dtype} {tuple(held.shape)}"
            raise UserError(
                f"checkpoint '{path}': '{name}' is {found}, the model has {tensor.dtype} "
                f"{tuple(tensor.shape)}. Resume with the model that the run was started with."
            )


def _changing(run: State) -> Iterable[tuple[str, Tensor]]:
    yield from ((f"policy/{n}", p) for n, p in run.world.policy.named_parameters())
    yield from ((f"reference/{n}", t) for n, t in _moving(run))


def _restore(run: State, tensors: dict[str, Tensor], plain: Mapping[str, Any]) -> None:
    run.watch = Watch.of(plain["watch"])
    run.step, run.version = plain["step"], plain["version"]
    run.seconds, run.skipped = plain["seconds"], plain["skipped"]
    run.best = tuple(plain["best"]) if plain["best"] else None
    run.plateau = Plateau(**plain["plateau"])
    run.pending = plain["pending"]
    run.world = replace(run.world, micro_batch_tokens=plain["micro_batch_tokens"])
    with torch.no_grad():
        for name, tensor in _changing(run):
            tensor.copy_(spread_like(tensors[name], tensor))
    state: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(run.world.policy.named_parameters()):
        found = _under(f"optimizer/{name}/", tensors)
        if found:  # the count of steps is one number
            state[i] = {k: spread_like(v, parameter) if v.ndim else v for k, v in found.items()}
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
    for i, (group, saved) in enumerate(zip(run.groups, plain["groups"], strict=True)):
        _restore_group(group, saved, f"group{i}", tensors)


def _group_state(group: Group, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for i, state in enumerate(group.states):
        tensors |= {f"{prefix}/labeller{i}/{k}": v for k, v in state.items()}
    for row, kept in group.kept.items():
        _put_samples(kept, f"{prefix}/kept{row}", tensors)
    saved: dict[str, Any] = {
        "cursor": asdict(group.cursor),
        "queries": group.queries,
        "kept": sorted(group.kept),
        "round": None,
    }
    if group.round is not None and not group.round.spent:
        _put_samples(group.round.samples, f"{prefix}/samples", tensors)
        for i, batch in enumerate(group.round.batches):
            tensors[f"{prefix}/batch{i}/index"] = batch.index
            if batch.keep is not None:
                tensors[f"{prefix}/batch{i}/keep"] = batch.keep
            tensors |= {f"{prefix}/batch{i}/data/{k}": v for k, v in batch.data.items()}
        for i, order in enumerate(group.round.minibatches):
            tensors[f"{prefix}/minibatch{i}"] = order
        saved["round"] = {
            "taken": group.round.taken,
            "trained_logp": group.round.trained_logp,
            "minibatches": len(group.round.minibatches),
            "roles": [list(b.roles) for b in group.round.batches],
        }
    return saved


def _restore_group(
    group: Group, saved: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]
) -> None:
    group.cursor, group.queries = Cursor(**saved["cursor"]), saved["queries"]
    group.kept = {row: _get_samples(f"{prefix}/kept{row}", tensors) for row in saved["kept"]}
    group.states = [_under(f"{prefix}/labeller{i}/", tensors) for i in range(len(group.terms))]
    group.round = None
    if saved["round"] is None:
        return
    batches = []
    for i, roles in enumerate(saved["round"]["roles"]):
        found = _under(f"{prefix}/batch{i}/", tensors)
        data = {k.removeprefix("data/"): v for k, v in found.items() if k.startswith("data/")}
        batches.append(
            Batch(index=found["index"], roles=tuple(roles), keep=found.get("keep"), data=data)
        )
    group.round = Round(
        samples=_get_samples(f"{prefix}/samples", tensors),
        batches=batches,
        minibatches=[
            tensors[f"{prefix}/minibatch{i}"] for i in range(saved["round"]["minibatches"])
        ],
        taken=saved["round"]["taken"],
        trained_logp=saved["round"]["trained_logp"],
    )


def _put_samples(samples: Samples, prefix: str, tensors: dict[str, Tensor]) -> None:
    for f in fields(samples):
        value = getattr(samples, f.name)
        if isinstance(value, Tensor):
            tensors[f"{prefix}/{f.name}"] = value
        elif isinstance(value, dict):
            tensors |= {f"{prefix}/extra/{k}": v for k, v in value.items()}


def _get_samples(prefix: str, tensors: dict[str, Tensor]) -> Samples:
    found = _under(f"{prefix}/", tensors)
    extra = {k.removeprefix("extra/"): v for k, v in found.items() if k.startswith("extra/")}
    plain = {k: v for k, v in found.items() if not k.startswith("extra/")}
    return Samples(**plain, extra=extra)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
