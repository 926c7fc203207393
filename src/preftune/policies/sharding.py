"""Weights spread over the processes of a run (FSDP2): each holds a part, and gathers a block's
weights for as long as it computes with them.

torch's `fully_shard` is applied here rather than by Accelerate, which does so on accelerators only:
so what runs on GPUs is what is tested on CPUs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from preftune.numerics import whole
from preftune.policies.blocks import blocks_of


class _Entrance(torch.nn.Module):
    """All parts of a model that compute together. What is called through it finds the weights
    outside the blocks gathered: embeddings and heads, which may be one and the same."""

    def __init__(self, parts: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


def shard(trunk: Any, heads: Iterable[torch.nn.Module], size: int) -> None:
    """Spread the weights of a trunk and of what stands on it over so many processes, a block at a
    time. Gradients become sums over the processes, not means: each has its share of one loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(trunk.device.type, (size,))
    entrance = _Entrance([trunk.model, *heads])
    parts: list[Any] = [*blocks_of(trunk.whole.base_model), entrance]
    for part in parts:
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    entrance(lambda: None)  # settles which is the root, before a sampler calls a block
    # a root stays gathered behind a pass, and the optimizer is to see its parts
    parts[-1].reshard()
    trunk.through = entrance


@contextmanager
def gathered(*models: Any) -> Iterator[None]:
    """All weights in every process, for passes that the processes do not make together: sampling
    and scoring without gradients. Nothing happens to weights that are not spread."""
    roots = [x for m in models if isinstance(x := _through(m), _Entrance)]
    if not roots:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [m for root in roots for m in root.modules() if isinstance(m, FSDPModule)]
    blocks = [m for m in parts if m not in roots]
    for part in parts:
        part.unshard()
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()


def _through(model: Any) -> Any:
    return getattr(getattr(model, "trunk", None), "through", None)


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor as the other is: this process's part of it where that is spread."""
    spread: Any = like
    if not hasattr(spread, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), spread.device_mesh, spread.placements)


def whole_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight and buffer in full, by name; those that are one stay one."""
    found: dict[int, Tensor] = {}
    out = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        out[name] = found.setdefault(id(tensor), whole(tensor.detach()))
    return out
