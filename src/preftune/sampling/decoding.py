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
    min_new_tokens: int = 0
    """Before so many tokens, end tokens have probability 0 and stop strings are not looked for."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    stop: tuple[str, ...] = ()
    """A response ends with the token that completes one of these in its text; it is then finished,
    and this token is its end token."""

    @property
    def unmodified(self) -> bool:
        """Each token comes from the policy's own distribution, as KL terms require. Where a
        response stops is another matter: its log-prob is that of the tokens it has."""
        return (
            self.temperature == 1.0
            and self.top_p == 1.0
            and self.top_k == 0
            and self.min_new_tokens == 0
        )
