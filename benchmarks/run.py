"""Speed and memory against targets: one JSON line a target, last, bigger is better.

`token_log_probs` is measured against the plain way (logits of the whole vocabulary, then
log-softmax), forward and backward, at the sizes of SmolLM2-135M's head. Both run in this process
in turn, so that a busy machine slows both; medians are compared. Memory is the growth of a fresh
process's peak over its size before the call. Left out: what the rest of the model costs.
The laboratory's targets are those of `bandit.py`.

    python benchmarks/run.py
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from preftune.numerics import token_log_probs

NUM_ROWS, NUM_FEATURES, NUM_TOKENS = 2048, 576, 49152  # 16 responses of 128 tokens
NUM_REPEATS = 5

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The reference: every logit at once."""
    logp = torch.log_softmax(hidden @ weight.T, -1)
    return logp.gather(-1, target[:, None]).squeeze(-1)


PATHS: dict[str, LogProbs] = {"full": full, "chunked": token_log_probs}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets; the same at each call."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, NUM_FEATURES, generator=draw)
    weight = torch.randn(NUM_TOKENS, NUM_FEATURES, generator=draw) * NUM_FEATURES**-0.5
    target = torch.randint(NUM_TOKENS, (NUM_ROWS,), generator=draw)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def one(path: LogProbs, hidden: Tensor, weight: Tensor, target: Tensor) -> float:
    """Seconds of one forward and backward."""
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    path(hidden, weight, target).sum().backward()
    return time.perf_counter() - start


def seconds() -> dict[str, float]:
    """Median seconds of each path, run in turn after one warm-up of each."""
    tensors = inputs()
    for path in PATHS.values():
        one(path, *tensors)
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    for _ in range(NUM_REPEATS):
        for name, path in PATHS.items():
            times[name].append(one(path, *tensors))
    return {name: median(values) for name, values in times.items()}


def peak() -> int:
    """The most memory that this process has held, in the unit of the system."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(name: str) -> int:
    """Growth of the peak by one call of the path, measured in a process of its own."""
    command = [sys.executable, __file__, "--growth", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def hardware() -> str:
    """The processor, the threads used and the torch that ran."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    return f"{name}, {threads}, torch {torch.__version__}"


def main() -> None:
    """Measure, then print one line a target."""
    if sys.argv[1:2] == ["--growth"]:
        tensors, path = inputs(), PATHS[sys.argv[2]]
        before = peak()
        one(path, *tensors)
        print(peak() - before)
        return
    # Memory first: a child's peak starts from what this process holds when it is started.
    held = {name: growth(name) for name in PATHS}
    taken = seconds()
    print(f"seconds {taken}", f"growth of the peak {held}", sep="\n", file=sys.stderr)
    ratios = {
        # Memory is what chunks buy. They compute the logits twice: four products instead of three.
        "token_log_probs_time": (taken["full"] / taken["chunked"], 0.75),
        "token_log_probs_memory": (held["full"] / held["chunked"], 2.0),
    }
    from bandit import targets  # its own targets, on one thread, after these

    used = hardware()
    rows = [(name, *found, used) for name, found in ratios.items()]
    rows += [(name, *found, hardware()) for name, found in targets().items()]
    for name, ratio, target, on in rows:
        row = {"name": name, "ratio": round(ratio, 3), "target": target, "hardware": on}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
