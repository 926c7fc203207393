"""Real runs that are ended at any moment, and what becomes of them when they go on.

A run is a process of its own, forked from this one. It is killed, or finds its files damaged, and
is then resumed until it is through; a trial is survived if the folder then holds what a run that
nobody disturbed leaves: the same metrics, samples and weights, bit for bit.
"""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from preftune import checkpoint, durable, train
from preftune.durable import Damaged
from preftune.errors import Saved, UserError
from preftune.resuming import resumed

METHODS = ("dpo", "hypo", "ppo", "on_policy_dpo")
"""Data alone; two sources; two passes, a value head; fresh pairs."""
POINTS = ("begun", "tensors", "filled", "listed", "flushed", "renamed", "model")
STEPS, EVERY = 6, 2
PATIENCE = 120
"""Seconds after which a run counts as hanging."""
OUTCOMES = {0: "done", 2: "user's error", 75: "saved"}


@dataclass(frozen=True)
class Trial:
    """One disturbed run."""

    kind: str
    where: str
    fault: str = ""
    """What was wrong afterwards; empty: nothing."""


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """More distinct characters are better."""
    return [float(len(set(c))) + len(c) / 100 for c in completions]


def config(model: str, data: str, output: Path, method: str, **more: Any) -> dict[str, Any]:
    """A short run with a checkpoint at every second step."""
    return {
        "model": model, "data": data, "output": str(output), "method": method, "threads": 1,
        "batch_size": 4, "max_steps": STEPS, "save_every": EVERY, "learning_rate": 1e-2,
        "max_new_tokens": 6, "eval_fraction": 0, **more,
    }  # fmt: skip


def nothing() -> None:
    """No preparation."""


def start(settings: Mapping[str, Any], before: Callable[[], None] = nothing) -> int:
    """A process that runs or resumes it; its id.

    Args:
        before: called in that process first.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(PATIENCE)
        folder = Path(settings["output"])
        with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = _run(settings, before)
    finally:
        os._exit(code)


def _run(settings: Mapping[str, Any], before: Callable[[], None]) -> int:
    try:
        torch.set_num_threads(1)
        before()
        own = None if "reward" in settings else reward
        train(resumed({**settings, "resume": True}), reward=own)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    except Saved:
        return 75
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(pid: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid: int, seconds: float, number: int = signal.SIGKILL) -> int:
    """Send a signal then; the exit code."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return wait(pid)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Of a JSONL file, without times."""
    path = folder / name
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a torn last line
            found.append(json.loads(line))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def differs(whole: Path, other: Path) -> str:
    """How a folder differs from that of an undisturbed run; empty if it does not."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        if rows(whole, name) != rows(other, name):
            return f"{name} differs"
    weights = [
        {p.name: load_file(p) for p in sorted((f / "model").glob("*.safetensors"))}
        for f in (whole, other)
    ]
    same = weights[0].keys() == weights[1].keys() and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(weights[0].values(), weights[1].values(), strict=True)
    )
    if not same:
        return "weights differ"
    leftovers = [p.name for p in other.rglob(".tmp-*")]
    return f"left behind: {leftovers}" if leftovers else ""


def lost(folder: Path) -> str:
    """Whether more than the work since the last checkpoint is gone; empty if not."""
    logged = [row["step"] for row in rows(folder, "metrics.jsonl")]
    found, _ = checkpoint.newest(folder / "checkpoints")
    reached = int(found.name.split("-")[1]) if found else 0
    # a checkpoint follows the row of its step
    due = (max(logged, default=1) - 1) // EVERY * EVERY
    return f"step {due} was saved, {reached} is left" if reached < due else ""


class Trials:
    """Trials of one method against one undisturbed run."""

    def __init__(
        self, model: str, data: str, work: Path, method: str, seed: int = 0,
        before: Callable[[], None] = nothing, **more: Any,
    ) -> None:  # fmt: skip
        self.model, self.data, self.work, self.method = model, data, work, method
        self.before, self.more = before, more
        self.name = f"{type(self).__name__}-{method}"
        self.random = random.Random(f"{self.name} {seed}")
        self.whole = work / f"{self.name}-whole"
        self.count = 0
        began = time.perf_counter()
        code = wait(start(config(model, data, self.whole, method, **more), before))
        assert code == 0, f"the undisturbed run of {method} ended with {code}: see {self.whole}.log"
        self.seconds = time.perf_counter() - began

    def fresh(self) -> dict[str, Any]:
        """Settings of a run in a folder of its own."""
        self.count += 1
        output = self.work / f"{self.name}-{self.count}"
        return config(self.model, self.data, output, self.method, **self.more)

    def finish(self, kind: str, where: str, settings: Mapping[str, Any]) -> Trial:
        """Resume until it is through, and compare."""
        folder = Path(settings["output"])
        code = wait(start(settings, self.before))
        if code:
            return Trial(kind, where, f"resuming ended with {code}: see {folder.name}.log")
        fault = differs(self.whole, folder)
        if not fault:
            shutil.rmtree(folder)
            folder.with_suffix(".log").unlink()
        return Trial(kind, where, fault)

    def at_random(self, times: int = 2) -> Trial:
        """kill -9 at random moments, several times in one run."""
        settings = self.fresh()
        moments = []
        for _ in range(times):
            moment = self.random.uniform(0, 1.1 * self.seconds)
            moments.append(f"{moment:.2f} s")
            kill_after(start(settings), moment)
            fault = lost(Path(settings["output"]))
            if fault:
                return Trial("kill -9 at random", ", ".join(moments), fault)
        return self.finish("kill -9 at random", ", ".join(moments), settings)

    def at_point(self, point: str, nth: int) -> Trial:
        """kill -9 at the nth time that a place in the writer is reached."""
        settings = self.fresh()
        code = wait(start(settings, lambda: _at(point, nth, _kill)))
        where = f"{point}, time {nth}"
        if code not in (0, -signal.SIGKILL):
            return Trial("kill -9 in a write", where, f"ended with {code}")
        fault = lost(Path(settings["output"]))
        if fault:
            return Trial("kill -9 in a write", where, fault)
        return self.finish("kill -9 in a write", where, settings)

    def disk_full(self, point: str, nth: int) -> Trial:
        """A write that finds no room is a user's error, and what stood before is whole."""
        settings = self.fresh()
        code = wait(start(settings, lambda: _at(point, nth, _no_room)))
        where = f"{point}, time {nth}"
        fault = lost(Path(settings["output"])) or ("" if code == 2 else f"ended with {code}")
        return (
            Trial("full disk", where, fault) if fault else self.finish("full disk", where, settings)
        )

    def file_too_large(self) -> Trial:
        """The system refuses to let files grow."""
        settings = self.fresh()
        code = wait(start(settings, _small_files))
        fault = "" if code == 2 else f"ended with {code}"
        return (
            Trial("files cannot grow", "4 KiB", fault)
            if fault
            else self.finish("files cannot grow", "4 KiB", settings)
        )

    def damaged(self) -> Trial:
        """The newest checkpoint is damaged: the one before is taken."""
        settings = self.fresh()
        folder = Path(settings["output"])
        wait(start(settings, lambda: _at("renamed", 3, _kill)))
        newest, _ = checkpoint.newest(folder / "checkpoints")
        assert newest is not None, "the run has saved"
        where = damage(newest, self.random)
        try:
            durable.verify(newest)
        except Damaged:
            return self.finish("damaged checkpoint", where, settings)
        return Trial("damaged checkpoint", where, "nobody noticed")

    def asked(self, number: int) -> Trial:
        """A signal that asks for an end: saved at the next step, exit code 75."""
        settings = self.fresh()
        name = signal.Signals(number).name
        moment = self.random.uniform(0, self.seconds)
        code = kill_after(start(settings), moment, number)
        where = f"{name} at {moment:.2f} s"
        # before the first update there is nothing to save, and the system ends the process
        if code not in (0, 75, -number):
            return Trial(name, where, f"ended with {code}")
        return self.finish(name, where, settings)


def _at(point: str, nth: int, act: Callable[[], None]) -> None:
    """Have `act` called when a place in the writer is reached for the nth time."""
    seen = 0

    def reach(name: str) -> None:
        nonlocal seen
        seen += name == point
        if name == point and seen == nth:
            act()

    durable.reach = reach


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _no_room() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def damage(folder: Path, chance: random.Random) -> str:
    """Change something in a checkpoint; what."""
    path = chance.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = chance.choice(("a bit", "cut", "empty", "gone", "longer"))
    place = chance.randrange(len(data))
    if kind == "a bit":
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "empty":
        data.clear()
    elif kind == "longer":
        data += b"\0"
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(data))
    return f"{path.name}: {kind}"
