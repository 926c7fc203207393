"""Where exponents and ratios stop, for all objectives."""

import torch
from torch import Tensor

# exp(80) is finite in float32 and bfloat16. Beyond the limit a response gets no gradient, where the
# overflow would have given NaN.
MAX_EXPONENT = 80.0


def clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    # torch takes numbers and tensors alike; its stubs do not take their union.
    return torch.clamp(x, low, high)  # pyright: ignore[reportArgumentType, reportCallIssue]
