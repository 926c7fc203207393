"""What the loop asks of a model, and of a policy. Shapes: the legend of `preftune.samples`."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.samples import Samples
from preftune.sampling.decoding import Uniform


@runtime_checkable
class Trainable(Protocol):
    """What an update needs: outputs with gradients, and the parameters that they reach."""

    batch_shape: tuple[int, ...]
    """() for a language model, (R,) for R runs of equal shape that advance together."""

    def outputs(self, samples: Samples, names: frozenset[str]) -> dict[str, Tensor]:
        """What objectives take by name, from one forward pass.

        logp       [*R, n, K, T]  log-prob of each response token; 0 where masked
        value      [*R, n, K, T]  expected reward from before the token is drawn; 0 where masked
        collision  [*R, n, K, T]  log sum_v p(v)^2 of the token's distribution, no gradient
        score      [*R, n, K]     a reward model's score of the whole response
        """
        ...

    def parameters(self) -> Iterable[Tensor]:
        """What the optimizer moves."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """The same, by name."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Draws responses: a policy, or an engine that has its weights."""

    batch_shape: tuple[int, ...]

    def sample(
        self,
        prompt: Int[Tensor, "*R n P"],
        prompt_mask: Bool[Tensor, "*R n P"],
        num_responses: int,
        uniform: Uniform,
        origin: int,
    ) -> Samples:
        """Draw responses, with their log-probs under the unmodified distribution.

        Args:
            origin: who draws them; of a policy, its version. An engine whose weights are older
                says so in the samples.
        """
        ...


@runtime_checkable
class Policy(Trainable, Sampler, Protocol):
    """Scores and samples responses; every scale of problem implements it."""

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

    def condition(
        self,
        prompt: Int[Tensor, "*R n P"],
        prompt_mask: Bool[Tensor, "*R n P"],
        good: Bool[Tensor, "*R n"],
    ) -> tuple[Int[Tensor, "*R n P2"], Bool[Tensor, "*R n P2"]]:
        """The prompts with a control token that asks for a good or for a bad response."""
        ...

    def step_kl(self, reference: Any, samples: Samples) -> Float[Tensor, "*R n K T"]:
        """Exact KL(policy || reference) of the next-token distribution before each response token.

        Summed over a response that this policy drew, it estimates the sequence KL without bias and
        with less variance than the log-ratio (Rao-Blackwell; arXiv 2504.10637).
        """
        ...

    def frozen_copy(self) -> "Policy":
        """A copy that stays as it is: the reference."""
        ...

    def follow(self, other: Any, decay: float) -> None:
        """Move a frozen copy's weights towards the policy: decay * own + (1 - decay) * other."""
        ...

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Every weight by name, trained or not: what a checkpoint of a moving reference holds."""
        ...


def as_policy(model: Trainable) -> Policy:
    """The model as a policy; a reward model is none."""
    assert isinstance(model, Policy), "this model scores responses and draws none"
    return model
