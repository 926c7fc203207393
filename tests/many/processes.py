"""Runs of several real processes, which meet by gloo: forked from this one, where all is imported.

What `accelerate launch` sets is set here: rank, number of processes, where they meet, the strategy.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from preftune import cli
from preftune.runs import RunFolder

PATIENCE = 300
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
"""What `accelerate launch --use_deepspeed` sets."""


@dataclass
class Launched:
    """Processes that were started."""

    pids: list[int]
    logs: list[Path]

    def wait(self) -> list[int]:
        """Exit codes by rank, negative for signals."""
        codes: dict[int, int] = {}
        end = time.monotonic() + PATIENCE
        while len(codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in codes and os.waitpid(pid, os.WNOHANG)[0] == 0:
                    if time.monotonic() > end:
                        os.kill(pid, 9)
                    continue
                codes.setdefault(rank, self._code(rank))
            time.sleep(0.02)
        return [codes[rank] for rank in range(len(self.pids))]

    def _code(self, rank: int) -> int:
        text = self.logs[rank].with_suffix(".code")
        return int(text.read_text()) if text.exists() else -9

    def said(self, rank: int) -> str:
        """What a process printed."""
        return self.logs[rank].read_text()


def nothing(rank: int) -> None:
    """No preparation."""


def launch(
    args: Sequence[str],
    logs: Path,
    size: int,
    environment: Mapping[str, str] | None = None,
    before: Callable[[int], None] = nothing,
) -> Launched:
    """Start the command line in so many processes.

    Args:
        logs: the folder for what they print.
        before: called in each first, with its rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    started = Launched([], [logs / f"{rank}.log" for rank in range(size)])
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        own |= {"LOCAL_WORLD_SIZE": str(size)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        started.logs[rank].with_suffix(".code").unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            _child(
                args, started.logs[rank], {**own, **(environment or {})}, lambda r=rank: before(r)
            )
        started.pids.append(pid)
    return started


def _child(
    args: Sequence[str], log: Path, environment: Mapping[str, str], before: Callable[[], None]
) -> None:
    code = 1
    try:
        with open(log, "w", encoding="utf-8") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= environment
        torch.set_num_threads(1)
        before()
        code = cli.run(args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        log.with_suffix(".code").write_text(str(code))
        os._exit(code)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, without times."""
    rows = RunFolder(folder).read("metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
