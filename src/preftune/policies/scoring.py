"""Forward passes of bounded size over a round of samples."""

import torch
from torch import Tensor

from preftune.numerics import batches
from preftune.policies.base import Policy
from preftune.samples import Samples


def sizes(samples: Samples) -> list[int]:
    """Tokens that each prompt with all of its responses takes in a packed row."""
    return (samples.prompt_mask.sum(-1) + samples.lengths().sum(-1)).tolist()


def micro_batches(samples: Samples, budget: int | None) -> list[Tensor]:
    """Prompts by length in groups of at most `budget` tokens. A study's runs stay in one group."""
    if samples.row.ndim > 1 or budget is None:
        return [torch.arange(samples.row.shape[-1])]
    size = sizes(samples)
    order = sorted(range(len(size)), key=lambda i: -size[i])
    return [
        torch.tensor([order[i] for i in part]) for part in batches([size[i] for i in order], budget)
    ]


@torch.no_grad()
def score_all(policy: Policy, samples: Samples, budget: int | None) -> Tensor:
    """Log-probs of every response token, [*R, N, K, T], without gradients, in pieces."""
    parts = micro_batches(samples, budget)
    scored = []
    for index in parts:
        s = samples.take(index)
        scored.append(policy.score(s.prompt, s.prompt_mask, s.tokens, s.mask).cpu())
    axis = samples.row.ndim - 1
    order = torch.argsort(torch.cat(parts))
    return torch.cat(scored, axis).index_select(axis, order)
