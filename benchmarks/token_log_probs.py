"""`token_log_probs` against the plain way: every logit of the vocabulary, then log-softmax.

Forward and backward, at the sizes of SmolLM2-135M's head. Both run in this process in turn; medians
are compared. Memory is the growth of a fresh process's peak over its size before the call. Left
out: what the rest of the model costs.

    python benchmarks/token_log_probs.py [--growth full|chunked]
"""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from results import Plan, Row
from torch import Tensor
from workers import peak

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


def growth(name: str) -> int:
    """Growth of the peak by one call of the path, measured in a process of its own."""
    command = [sys.executable, __file__, "--growth", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows(plan: Plan) -> list[Row]:
    """Both targets."""
    held = {name: growth(name) for name in PATHS}
    taken = seconds()
    print(f"token_log_probs: seconds {taken}, growth of the peak {held}", file=sys.stderr)
    return [
        # Memory is what chunks buy. They compute the logits twice: four products instead of three.
        Row("token_log_probs_time", taken["full"] / taken["chunked"], 0.75),
        Row("token_log_probs_memory", held["full"] / held["chunked"], 2.0),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--growth"]:
        tensors, path = inputs(), PATHS[sys.argv[2]]
        before = peak()
        one(path, *tensors)
        print(peak() - before)
    else:
        for row in rows(Plan()):
            print(row)
