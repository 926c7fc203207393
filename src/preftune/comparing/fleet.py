"""Processes that take jobs from the folder: this machine's workers, beside other machines'."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from preftune import huggingface, startup
from preftune.comparing import locks, running
from preftune.comparing.job import RUNS, Job, read, result_of, result_path, write, write_result
from preftune.errors import Saved, UserError
from preftune.policies.blocks import free_memory
from preftune.runs import RunFolder
from preftune.signals import Signals

BYTES = 9.0
"""That a run holds for each byte of a model's files, which are of 16 bits a number mostly."""
DEATHS = 3
"""Processes that died over a job, after which it counts as failed."""
LOOK = 0.5
"""Seconds between looks into the folder."""
PATIENT = 60.0
"""Seconds that a worker has to save its run when it is asked to end."""
CANNOT, SAVED = 2, 75
"""A worker's exit codes: jobs cannot be run here; it was asked to end."""
REASON = "cannot run here: "
"""Begins the line of a worker's log that says why."""
Tick = Callable[[int, int, str], None]
"""(jobs done, of, what is running)."""


class MayPass(UserError):
    """What stopped a comparison may be over later: the folder stays, to be gone on with."""


def take(folder: Path, keys: Sequence[str] | None = None) -> tuple[Job, locks.Lock] | None:
    """The first job that nobody has, held from now on.

    Args:
        keys: take only these.
    """
    for job in read(folder):
        if keys is not None and job.key not in keys or result_path(folder, job.key).is_file():
            continue
        lock = locks.acquire(folder, job.key)
        if lock is None:
            continue
        if result_path(folder, job.key).is_file():  # it ended between the two looks
            lock.release()
            continue
        if RunFolder.is_busy(folder / RUNS / job.key):  # who lost it has not ended yet
            lock.release()
            continue
        if locks.deaths(folder, job.key, lock.number) >= DEATHS:
            write_result(folder, job.key, _died(job))
            lock.release()
            continue
        return job, lock
    return None


def _died(job: Job) -> dict[str, Any]:
    return {
        "key": job.key, "kind": job.kind, "entry": job.entry, "seed": job.seed,
        "why": running.FAULT,
        "failed": f"{DEATHS} processes died over it: too little memory, perhaps "
        "(fewer --workers, a smaller --batch-size)",
    }  # fmt: skip


def work(
    folder: Path, keys: Sequence[str] | None = None, *,
    threads: int = 1, device: str = "auto",
) -> bool:  # fmt: skip
    """Run one job in this process; False where there is none to take.

    Args:
        threads, device: of this machine, whatever those are of who put the job up.

    Raises:
        Unable: it cannot be begun here; it is left to others.
    """
    taken = take(folder, keys)
    if taken is None:
        return False
    job, lock = taken
    job = replace(job, settings={**job.settings, "threads": threads, "device": device})

    def tell(step: int, total: int) -> None:
        lock.said |= {"step": step, "total": total, "entry": job.entry, "kind": job.kind}
        lock.said["seed"] = job.seed

    lock.begin()
    try:
        result = running.run(job, folder, tell)
        if not lock.lost():
            write_result(folder, job.key, result)
    finally:
        lock.release()
    return True


def standing(folder: Path, keys: Sequence[str]) -> tuple[int, list[str]]:
    """How many of the jobs have ended, and what is said of those that are held."""
    open_ = [key for key in keys if not result_path(folder, key).is_file()]
    said = (locks.held(folder, key) for key in open_)
    return len(keys) - len(open_), [_said(s) for s in said if s and "step" in s]


def _said(said: dict[str, Any]) -> str:
    return f"{said['entry']} seed {said['seed']}: {said['step']}/{said['total']}"


@dataclass
class Fleet:
    """This machine's workers. `with Fleet(...) as fleet: fleet.finish(jobs)`."""

    folder: Path
    workers: int
    """Processes; 0: jobs are run in this one."""
    threads: int = 1
    """Of each process."""
    device: str = "auto"
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _held: ExitStack = field(default_factory=ExitStack)
    _died: int = 0
    """Workers that ended by themselves, one after another, since this machine last ended a job."""
    _ended: int = 0
    """Jobs that this machine had ended then."""

    def __enter__(self) -> "Fleet":
        self._signals = self._held.enter_context(Signals())
        for number in range(self.workers):
            self._processes.append(self._start(number))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()  # one that trains saves its run first
        ends = time.monotonic() + PATIENT
        for process in self._processes:
            try:
                process.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._held.close()

    def finish(self, jobs: Sequence[Job], tick: Tick) -> dict[str, dict[str, Any]]:
        """What the jobs gave, by key, once all of them have ended, here or elsewhere.

        Raises:
            UserError: this machine cannot run them.
            KeyboardInterrupt, Saved: this process was asked to end.
        """
        for job in jobs:
            write(self.folder, job)
        keys = [job.key for job in jobs]
        while True:
            done, said = standing(self.folder, keys)
            tick(done, len(keys), "; ".join(said))
            if done == len(keys):
                break
            self._check(keys)
            if self.workers or not self._work(keys):
                time.sleep(LOOK)
        found = {key: result_of(self.folder, key) for key in keys}
        return {key: result for key, result in found.items() if result is not None}

    def _work(self, keys: Sequence[str]) -> bool:
        return work(self.folder, keys, threads=self.threads, device=self.device)

    def _check(self, keys: Sequence[str]) -> None:
        """End where this process is asked to; start anew what has died."""
        if self._signals.asked is not None:
            import signal

            if self._signals.asked == signal.SIGINT:
                raise KeyboardInterrupt
            raise Saved(f"go on with --output {self.folder} --resume")
        for number, process in enumerate(self._processes):
            code = process.poll()
            if code is not None:
                self._look_into(number, code, keys)
                self._processes[number] = self._start(number)

    def _look_into(self, number: int, code: int, keys: Sequence[str]) -> None:
        """Why a worker ended.

        Raises:
            UserError: the next one would, too.
        """
        said = self._log(number).read_text("utf-8", errors="replace").strip().split("\n")
        if code == CANNOT:
            reasons = (line for line in reversed(said) if line.startswith(REASON))
            raise UserError(next(reasons, said[-1]).removeprefix(REASON))
        ended = sum(result_path(self.folder, k).is_file() and locks.is_ours(self.folder, k)
                    for k in keys)  # fmt: skip
        if ended != self._ended:
            self._died, self._ended = 0, ended
        self._died += code != SAVED
        if self._died > DEATHS * self.workers:  # else a job is given up first, as one that failed
            raise MayPass(
                f"workers: {self._died} processes ended one after another without ending a job "
                f"(exit code {code}). The last words of {self._log(number)}: {said[-1]}. Mend that "
                f"(is the disk full?), then --output {self.folder} --resume."
            )

    def _log(self, number: int) -> Path:
        return self.folder / "logs" / f"worker-{os.getpid()}-{number}.log"

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        log = self._log(number)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "preftune.comparing.worker", str(self.folder)]
        command += [str(self.threads), self.device]
        with open(log, "ab") as out:
            return subprocess.Popen(
                command, env=dict(self._environment(number)),
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,  # Ctrl-C is ours: we tell it to save
            )  # fmt: skip

    def _environment(self, number: int) -> Iterator[tuple[str, str]]:
        yield from os.environ.items()
        yield from startup.settings().items()
        yield "OMP_NUM_THREADS", str(self.threads)
        if torch.cuda.is_available():  # one device a worker
            given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            devices = (
                given.split(",") if given else list(map(str, range(torch.cuda.device_count())))
            )
            yield "CUDA_VISIBLE_DEVICES", devices[number % len(devices)]


def default_workers(model: str, runs: int) -> tuple[int, int]:
    """Processes and threads of each: one a GPU, else one a core as far as runs and memory go.

    Two runs beside one another on a thread each lose nothing to waiting for one another, as one run
    on two threads does, above all where other programs want the cores as well.
    """
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        return devices, max(1, (os.cpu_count() or 1) // devices)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    room = int(free_memory(torch.device("cpu")) // _needed(model))
    workers = max(1, min(cores or 1, runs, room))
    return workers, max(1, (cores or 1) // workers)


def _needed(model: str) -> float:
    """Bytes that a run of the model takes, roughly: weights, gradients, moments and a reference in
    float32 and half of it, and the libraries."""
    folder = Path(huggingface.resolve_model(model))
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
    return 1.5 * 2**30 + BYTES * sum(path.stat().st_size for path in files)
