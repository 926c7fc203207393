"""A working copy of a model's matrices, for as long as it decodes.

A decoding step multiplies few rows by every weight. Under autocast, frozen float32 weights would be
cast anew at each step; and on a CPU, weights that are laid out once as the library's kernels read
them are multiplied up to twice as fast with few rows, a tenth faster with 128.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def working_copy(model: Any) -> Iterator[None]:
    """Let every plain linear layer compute from a copy made now; the weights must not change.

    The copy is in autocast's type where that is on. Nothing happens where it would gain nothing.
    """
    device = next(model.parameters()).device
    dtype = model.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    replaced: list[Any] = []
    try:
        for module in model.modules():
            # adapters and quantisers derive from it or replace its forward: they stay as they are
            if type(module) is not torch.nn.Linear or "forward" in vars(module):
                continue
            product = _product(module, dtype)
            if product is not None:
                module.forward = product
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _product(module: torch.nn.Linear, dtype: torch.dtype) -> Any | None:
    """What stands in for the layer's forward; None where the layer itself is as good."""
    weight, bias = module.weight.detach(), module.bias
    bias = None if bias is None else bias.detach().to(dtype)
    if not weight.is_floating_point():
        return None
    if _can_be_laid_out(weight.device, dtype):
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))

        def multiply(x: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x.to(dtype), laid_out, bias, "none", [], "")

        return multiply
    if weight.dtype == dtype:
        return None
    narrow = weight.to(dtype)
    return lambda x: torch.nn.functional.linear(x.to(dtype), narrow, bias)


def _can_be_laid_out(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's library for CPUs takes weights of this type in its own layout."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
