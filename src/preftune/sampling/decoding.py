"""How responses are drawn, and with which random numbers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Uniform = Callable[[int, tuple[int, ...]], Tensor]
"""(t, shape) -> uniform draws for response token t: the stream of whoever samples."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How responses are drawn."""

    max_new_tokens: int = 64
    """A response that has not ended by then is cut: it gets no end token."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""

    @property
    def unmodified(self) -> bool:
        """Samples come from the policy's own distribution, as KL terms require."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0
