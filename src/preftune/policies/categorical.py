"""A table of logits: one response token, one distribution a state. The exact end of the scale."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.numerics import sample_index
from preftune.samples import Samples
from preftune.sampling.decoding import Uniform


class Categorical:
    """logits [*R, S, V]: state s (the prompt's only token) answers with arm a (the only token)."""

    exact_sampler = True

    def __init__(
        self,
        logits: Float[Tensor, "*R S V"],
        *,
        value_head: bool = False,
        controls: bool = False,
    ) -> None:
        """
        Args:
            logits: as the policy starts.
            value_head: a value for each state, 0 at the start.
            controls: each state also with a control for bad (S + s) and good (2 S + s); these rows
                start as the state's own.
        """
        self.num_states = logits.shape[-2]
        if controls:
            logits = torch.cat([logits] * 3, -2)
        self.logits = logits.detach().clone().requires_grad_(True)
        self.batch_shape = tuple(logits.shape[:-2])
        self.controls = controls
        self.values = torch.zeros_like(self.logits[..., 0]).requires_grad_() if value_head else None

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

    def outputs(self, samples: Samples, names: frozenset[str]) -> dict[str, Tensor]:
        """See `Trainable.outputs`."""
        s = samples
        found: dict[str, Tensor] = {}
        if "logp" in names:
            found["logp"] = self.score(s.prompt, s.prompt_mask, s.tokens, s.mask)
        if "value" in names:
            assert self.values is not None, "the policy has no value head"
            value = self.values.gather(-1, s.prompt.squeeze(-1))[..., None, None]
            found["value"] = torch.where(s.mask, value.expand(s.mask.shape), 0.0)
        if "collision" in names:
            with torch.no_grad():
                collision = torch.logsumexp(2 * self.log_probs(s.prompt), -1)[..., None, None]
            found["collision"] = torch.where(s.mask, collision.expand(s.mask.shape), 0.0)
        return found

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

    def condition(
        self,
        prompt: Int[Tensor, "*R n 1"],
        prompt_mask: Bool[Tensor, "*R n 1"],
        good: Bool[Tensor, "*R n"],
    ) -> tuple[Int[Tensor, "*R n 1"], Bool[Tensor, "*R n 1"]]:
        """See `Policy.condition`."""
        assert self.controls, "the policy was built without controls"
        return prompt + self.num_states * (1 + good.long()).unsqueeze(-1), prompt_mask

    def parameters(self) -> list[Tensor]:
        """See `Policy.parameters`."""
        return [p for _, p in self.tensors() if p.requires_grad]

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """See `Policy.named_parameters`."""
        return [(n, p) for n, p in self.tensors() if p.requires_grad]

    def tensors(self) -> list[tuple[str, Tensor]]:
        """See `Policy.tensors`."""
        found = [("logits", self.logits)]
        return found if self.values is None else [*found, ("values", self.values)]

    def frozen_copy(self) -> "Categorical":
        """See `Policy.frozen_copy`."""
        twin = Categorical(self.logits)
        twin.num_states, twin.controls = self.num_states, self.controls
        twin.logits.requires_grad_(False)
        return twin

    @torch.no_grad()
    def follow(self, other: Any, decay: float) -> None:
        """See `Policy.follow`."""
        self.logits.lerp_(other.logits, 1 - decay)


class TabularReward:
    """A table of scores [*R, S, V]: a reward model of one-token responses."""

    def __init__(self, scores: Float[Tensor, "*R S V"]) -> None:
        self.scores = scores.detach().clone().requires_grad_(True)
        self.batch_shape = tuple(scores.shape[:-2])

    def outputs(self, samples: Samples, names: frozenset[str]) -> dict[str, Tensor]:
        """See `Trainable.outputs`; `score` alone."""
        state = samples.prompt.expand(*samples.prompt.shape[:-1], self.scores.shape[-1])
        at_state = self.scores.gather(-2, state)  # [*R, n, V]
        return {"score": at_state.gather(-1, samples.tokens.squeeze(-1))}

    def parameters(self) -> list[Tensor]:
        """See `Trainable.parameters`."""
        return [self.scores]

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """See `Trainable.named_parameters`."""
        return [("scores", self.scores)]
