"""What is done to a decoder's blocks for speed or for memory: compile them, or recompute them."""

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """The decoder's blocks, one after another: its longest list of modules."""
    lists = [x for x in model.modules() if isinstance(x, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: on a CPU a C++ compiler, on a GPU Triton."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    if device.type != "cuda":
        return False
    from torch.utils._triton import has_triton

    return has_triton()


def compile_blocks(model: Any) -> None:
    """Compile each block where it stands; they share what is compiled. Names of weights stay."""
    for block in blocks_of(model):
        block.compile(dynamic=True)


def recompute_blocks(model: Any) -> None:
    """Keep the input of each block alone, and compute the rest again in the backward pass.

    transformers' own switch needs a model in training mode, in which dropout would be on. A copy
    of the model would call the original's blocks: copy first.
    """
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def counting_kept() -> Iterator[list[int]]:
    """Bytes that forward passes inside keep for their backward pass, each storage once. There is
    no backward pass through them."""
    held: dict[int, Any] = {}  # alive until the end, so that no two have one address
    total = [0]

    def count(x: Tensor) -> None:  # kept by its own node, a tensor would never be freed
        storage = x.untyped_storage()
        if storage._cdata not in held:  # an address would be 0 where nothing is allocated
            held[storage._cdata] = storage
            total[0] += storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        yield total
    held.clear()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 62  # not told: assume enough
