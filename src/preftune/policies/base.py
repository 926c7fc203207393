"""What the loop asks of a policy. Shapes: the legend of `preftune.samples`."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.samples import Samples
from preftune.sampling.decoding import Uniform


@runtime_checkable
class Policy(Protocol):
    """Scores and samples responses; every scale of problem implements it."""

    batch_shape: tuple[int, ...]
    """() for a language model, (R,) for R runs of equal shape that advance together."""
    exact_sampler: bool
    """`sample` reports the log-probs that `score` would give, up to rounding."""

    def score(
        self,
        prompt: Int[Tensor, "*R n P"],
        prompt_mask: Bool[Tensor, "*R n P"],
        tokens: Int[Tensor, "*R n K T"],
        mask: Bool[Tensor, "*R n K T"],
    ) -> Float[Tensor, "*R n K T"]:
        """Log-prob of each response token given what stands before it; 0 where masked."""
        ...

    def sample(
        self,
        prompt: Int[Tensor, "*R n P"],
        prompt_mask: Bool[Tensor, "*R n P"],
        num_responses: int,
        uniform: Uniform,
        origin: int,
    ) -> Samples:
        """Draw responses, with their log-probs under the unmodified distribution."""
        ...

    def step_kl(self, reference: Any, samples: Samples) -> Float[Tensor, "*R n K T"]:
        """Exact KL(policy || reference) of the next-token distribution before each response token.

        Summed over a response that this policy drew, it estimates the sequence KL without bias and
        with less variance than the log-ratio (Rao-Blackwell; arXiv 2504.10637).
        """
        ...

    def parameters(self) -> Iterable[Tensor]:
        """What the optimizer moves."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """The same, by name."""
        ...

    def frozen_copy(self) -> "Policy":
        """A copy that stays as it is: the reference."""
        ...
