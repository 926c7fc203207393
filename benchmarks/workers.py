"""Two sides of a benchmark as processes of their own, of which one steps while the other waits.

Each side has the environment, the libraries and the memory of a process that does nothing else. The
parent asks them in turn, so that a busy machine slows both. A worker prepares itself, says that it
is ready, and then obeys lines:

    step    exactly one step; the answer has its `seconds`
    NAME    any other command that the worker knows
    stop    the end; so is the end of the input

Answers are JSON, one line each. This module needs the standard library alone, since a worker may
run in an environment that has nothing else of ours.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from results import Failed, Plan

HERE = Path(__file__).parent
PATIENCE = 900.0
"""Seconds after which a silent worker is ended."""
IDLE_SHARE = 0.1
"""Of a core: a waiting worker that takes more steals time from the other."""

FEWEST, SLOW = 5, 30.0
"""Turns that are enough where one takes longer than so many seconds."""

Answer = dict[str, Any]


class Channel:
    """The worker's end."""

    def __init__(self, answers: Mapping[str, Callable[[], Any]] | None = None) -> None:
        """
        Args:
            answers: what is computed for commands other than `step`, `peak` and `stop`.
        """
        # what libraries print goes to stderr: stdout is for answers
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._answers = {"peak": peak, **(answers or {})}
        self._asleep = 0.0, 0.0

    def say(self, message: Answer) -> None:
        """One answer."""
        self._out.write(json.dumps(message) + "\n")
        self._asleep = time.perf_counter(), time.process_time()

    def until_step(self) -> Answer:
        """Answer commands until a step is asked for; what went on while this process waited.

        Raises:
            SystemExit: the parent has enough.
        """
        while line := sys.stdin.readline().strip():
            began, busy = self._asleep
            waited, used = time.perf_counter() - began, time.process_time() - busy
            if line == "stop":
                break
            if line == "step":
                return {"waited": waited, "used_waiting": used}
            self.say({line: self._answers[line]()})
        raise SystemExit(0)


def serve(channel: Channel, step: Callable[[], Answer], ready: Answer) -> None:
    """Time one call of `step` whenever a step is asked for."""
    channel.say(ready)
    while True:
        rest = channel.until_step()
        began = time.perf_counter()
        found = step()
        channel.say({"seconds": time.perf_counter() - began, **rest, **found})


def peak() -> int:
    """The most memory that this process has held, in bytes.

    Linux keeps `ru_maxrss` over exec, so that it begins with what the parent held; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def digest(rows: Sequence[Sequence[Sequence[int]]]) -> str:
    """A fingerprint of the distinct rows of token ids, in whatever order they stand."""
    distinct = sorted({json.dumps([list(ids) for ids in row]) for row in rows})
    return hashlib.blake2b("\n".join(distinct).encode(), digest_size=8).hexdigest()


class Worker:
    """The parent's end; a context manager that ends the process."""

    def __init__(
        self,
        script: str,
        job: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        """
        Args:
            script: in this folder; it is given the job as JSON.
            environment: added to this process's own.
        """
        self.name = f"{script} {job.get('label', '')}".strip()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the worker
        self._process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(dict(job))],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.ready = self._answer()

    def ask(self, command: str) -> Answer:
        """One command, and its answer.

        Raises:
            Failed: the worker has ended or is silent for too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer tells why
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        alarm = threading.Timer(PATIENCE, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            killed = " (killed: it may have taken all the memory)" if code == -9 else ""
            raise Failed(f"{self.name} ended with {code}{killed}:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            try:
                self._process.communicate("stop\n", timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def take_turns(
    sides: Mapping[str, Worker],
    turns: int,
    after: Callable[[int], None] = lambda turn: None,
    *,
    fewest: int = FEWEST,
) -> dict[str, list[Answer]]:
    """The answers of each side to `turns` steps, one side after the other; to `fewest` where they
    are slow. `after` is given how many turns are over."""
    found: dict[str, list[Answer]] = {name: [] for name in sides}
    began = time.perf_counter()
    for turn in range(1, turns + 1):
        for name, worker in sides.items():
            found[name].append(worker.ask("step"))
        after(turn)
        if turn >= fewest and time.perf_counter() - began > SLOW * turn:
            break
    for name, answers in found.items():
        _check_rest(name, answers)
    return found


def _check_rest(name: str, answers: Sequence[Answer]) -> None:
    """A side that waits must leave the processor to the other."""
    later = answers[1:]  # before the first step it was being started
    waited, used = (sum(a[key] for a in later) for key in ("waited", "used_waiting"))
    if waited > 1 and used > IDLE_SHARE * waited:
        print(
            f"warning: {name} used {used:.1f} s of processor time in {waited:.1f} s of waiting",
            file=sys.stderr,
        )


def typical(answers: Sequence[Answer], plan: Plan, key: str = "seconds") -> float:
    """The median after the dropped ones."""
    return median(a[key] for a in answers[min(plan.dropped, len(answers) - 1) :])
