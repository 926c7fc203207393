"""Data that were drawn for the runs of a study: each run has its own rows."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.numerics import stream_keys, uniform
from preftune.policies.base import Policy
from preftune.samples import DATA, REFERENCE, Samples
from preftune.sampling.decoding import Uniform


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Rows of R runs: one-token prompts, with responses where something learns from them."""

    prompt: Int[Tensor, "R n 1"]
    tokens: Int[Tensor, "R n K T"] | None = None
    """Of a pair the chosen first."""
    ref_logp: Float[Tensor, "R n K T"] | None = None
    """Of the tokens: scored once, where the reference stays."""
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.prompt.shape[-2]

    def prompts_only(self, index: Any) -> tuple[Tensor, Tensor]:
        """See `Data.prompts_only`: [R, n, 1]."""
        prompt = self.prompt.index_select(-2, torch.as_tensor(index))
        return prompt, torch.ones_like(prompt, dtype=torch.bool)

    def samples(self, index: Any, *, responses: list[int] | None = None) -> Samples:
        """See `Data.samples`."""
        assert self.tokens is not None, "these rows are prompts alone"
        rows = torch.as_tensor(index)
        prompt, prompt_mask = self.prompts_only(rows)
        tokens = self.tokens if responses is None else self.tokens[:, :, responses]
        tokens = tokens.index_select(1, rows)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=tokens, mask=mask,
            finished=mask[..., 0], origin=torch.full_like(tokens[..., 0], DATA),
            row=rows.expand(prompt.shape[:-1]),
            ref_logp=self._ref_logp(rows, responses),
            extra={k: v.index_select(1, rows) for k, v in self.extra.items()},
        )  # fmt: skip

    def _ref_logp(self, rows: Tensor, responses: list[int] | None) -> Tensor | None:
        if self.ref_logp is None:
            return None
        chosen = self.ref_logp if responses is None else self.ref_logp[:, :, responses]
        return chosen.index_select(1, rows)


@torch.no_grad()
def scored(rows: Drawn, reference: Policy) -> Drawn:
    """With the reference's log-probs of all responses."""
    assert rows.tokens is not None, "these rows are prompts alone"
    prompt_mask = torch.ones_like(rows.prompt, dtype=torch.bool)
    mask = torch.ones_like(rows.tokens, dtype=torch.bool)
    return replace(rows, ref_logp=reference.score(rows.prompt, prompt_mask, rows.tokens, mask))


def recorded(samples: Samples) -> Drawn:
    """Responses that other runs drew, as data."""
    return Drawn(prompt=samples.prompt, tokens=samples.tokens)


def draws(seeds: tuple[int, ...], *name: object) -> Uniform:
    """The random numbers of a study's own draws: (t, shape [R, n, K]) -> uniforms."""
    keys = stream_keys(seeds, *name)[:, None, None]

    def stream(t: int, shape: tuple[int, ...]) -> Tensor:
        number = torch.arange(shape[-2])[:, None] * shape[-1] + torch.arange(shape[-1])
        return uniform(keys, t, number)

    return stream


def mean_reward(reward: Float[Tensor, " V"], samples: Samples) -> Float[Tensor, "R N K"]:
    """The mean over tokens of each token's reward."""
    return reward[samples.tokens].mean(-1)


def gumbel(keys: Int[Tensor, "*R 1 1"], samples: Samples) -> Float[Tensor, "*R N K"]:
    """Noise of each sample, of mean 0.577: with it a ranking of two by reward is a draw of
    Bradley-Terry. A sample that was drawn once and kept keeps its noise too."""
    kept = samples.origin == REFERENCE
    place = torch.where(kept, samples.row.unsqueeze(-1), torch.arange(kept.shape[-2])[:, None])
    u = uniform(keys, samples.origin, place, torch.arange(kept.shape[-1]))
    return -(-u.clamp(min=2.0**-53).log()).log()


def reward_at(
    reward: Float[Tensor, "R S A"], samples: Samples, vocab: int
) -> Float[Tensor, "R N K"]:
    """Of each sample, from a table of all responses in the order of `all_responses`."""
    place = vocab ** torch.arange(samples.tokens.shape[-1] - 1, -1, -1)
    number = samples.prompt * reward.shape[-1] + (samples.tokens * place).sum(-1)
    return reward.flatten(1).gather(1, number.flatten(1)).view(number.shape)
