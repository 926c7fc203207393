"""A table of logits: one response token, one distribution a state. The exact end of the scale."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.numerics import sample_index
from preftune.samples import Samples
from preftune.sampling.decoding import Uniform


class Categorical:
    """logits [*R, S, V]: state s (the prompt's only token) answers with arm a (the only token)."""

    exact_sampler = True

    def __init__(self, logits: Float[Tensor, "*R S V"]) -> None:
        self.logits = logits.detach().clone().requires_grad_(True)
        self.batch_shape = tuple(logits.shape[:-2])

    def log_probs(self, prompt: Int[Tensor, "*R n 1"]) -> Float[Tensor, "*R n V"]:
        """The whole distribution at each state."""
        table = self.logits.log_softmax(-1)
        state = prompt.expand(*prompt.shape[:-1], table.shape[-1])
        return table.gather(-2, state)

    def score(
        self,
        prompt: Int[Tensor, "*R n 1"],
        prompt_mask: Bool[Tensor, "*R n 1"],
        tokens: Int[Tensor, "*R n K 1"],
        mask: Bool[Tensor, "*R n K 1"],
    ) -> Float[Tensor, "*R n K 1"]:
        """See `Policy.score`."""
        assert tokens.shape[-1] == 1, (
            f"a categorical answers with one token, not {tokens.shape[-1]}"
        )
        logp = self.log_probs(prompt).gather(-1, tokens.squeeze(-1)).unsqueeze(-1)
        return torch.where(mask, logp, 0.0)

    @torch.no_grad()
    def sample(
        self,
        prompt: Int[Tensor, "*R n 1"],
        prompt_mask: Bool[Tensor, "*R n 1"],
        num_responses: int,
        uniform: Uniform,
        origin: int,
    ) -> Samples:
        """See `Policy.sample`."""
        logp = self.log_probs(prompt)
        shape = (*logp.shape[:-1], num_responses)
        wide = logp.unsqueeze(-2).expand(*shape, logp.shape[-1])
        tokens = sample_index(wide.exp().contiguous(), uniform(0, shape)).unsqueeze(-1)
        return Samples(
            prompt=prompt,
            prompt_mask=prompt_mask,
            tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            finished=torch.ones(shape, dtype=torch.bool),
            origin=torch.full(shape, origin),
            row=prompt.squeeze(-1),
            logp=wide.gather(-1, tokens),
        )

    @torch.no_grad()
    def step_kl(self, reference: "Categorical", samples: Samples) -> Float[Tensor, "*R n K 1"]:
        """See `Policy.step_kl`; here it is the exact KL of each state."""
        logp, ref_logp = self.log_probs(samples.prompt), reference.log_probs(samples.prompt)
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)
        return kl[..., None, None].expand(samples.tokens.shape)

    def parameters(self) -> list[Tensor]:
        """See `Policy.parameters`."""
        return [self.logits]

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """See `Policy.named_parameters`."""
        return [("logits", self.logits)]

    def frozen_copy(self) -> "Categorical":
        """See `Policy.frozen_copy`."""
        twin = Categorical(self.logits)
        twin.logits.requires_grad_(False)
        return twin
