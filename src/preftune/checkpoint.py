"""Checkpoints of a run: weights, optimizer, and every place it has reached.

A checkpoint is a folder of one safetensors file and one JSON file, written under a name that
begins with `.tmp-` and renamed when it is whole. Random draws are functions of counters, so the
counters are all of their state.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune.collecting import Cursor
from preftune.loop import State
from preftune.rounds import Group, Round
from preftune.samples import Batch, Samples

KEEP = 2


def save(run: State, folder: Path) -> Path:
    """Write `checkpoints/step-N`, then drop all but the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{run.step:06d}"
    work = folder / f".tmp-step-{run.step:06d}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    tensors: dict[str, Tensor] = {}
    names = [name for name, _ in run.world.policy.named_parameters()]
    tensors |= {f"policy/{n}": p.detach() for n, p in run.world.policy.named_parameters()}
    tensors |= {f"reference/{n}": t.detach() for n, t in _moving(run)}
    moments = run.optimizer.state_dict()["state"]
    for i, state in moments.items():
        tensors |= {f"optimizer/{names[i]}/{k}": v for k, v in state.items()}
    plain: dict[str, Any] = {
        "step": run.step,
        "version": run.version,
        "seconds": run.seconds,
        "warned": sorted(run.warned),
        "groups": [_group_state(g, f"group{i}", tensors) for i, g in enumerate(run.groups)],
    }
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, work / "state.safetensors")
    (work / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    for path in (*work.iterdir(), work):
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(work, target)
    _flush(folder)
    for old in _found(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def _moving(run: State) -> Iterable[tuple[str, Tensor]]:
    """Weights of a reference that does not stay as it was made."""
    if run.method.reference_update == "fixed" or run.world.reference is None:
        return ()
    return run.world.reference.tensors()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _found(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").exists())


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint, or None."""
    found = _found(folder) if folder.is_dir() else []
    return found[-1] if found else None


def load(run: State, path: Path) -> None:
    """Put a run back where the checkpoint was written."""
    tensors = load_file(path / "state.safetensors")
    plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
    run.step, run.version = plain["step"], plain["version"]
    run.seconds, run.warned = plain["seconds"], set(plain["warned"])
    names = []
    with torch.no_grad():
        for name, parameter in run.world.policy.named_parameters():
            names.append(name)
            parameter.copy_(tensors[f"policy/{name}"])
        for name, tensor in _moving(run):
            tensor.copy_(tensors[f"reference/{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate(names):
        prefix = f"optimizer/{name}/"
        found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if found:
            state[i] = found
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
            "sampler_gap": group.round.sampler_gap,
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
        sampler_gap=saved["round"]["sampler_gap"],
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
