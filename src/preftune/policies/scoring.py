"""Forward passes of bounded size over a round of samples."""

import torch
from torch import Tensor

from preftune.numerics import batches
from preftune.policies.base import Trainable
from preftune.samples import Samples

LOGP = frozenset({"logp"})


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
def outputs_all(
    model: Trainable, samples: Samples, budget: int | None, names: frozenset[str]
) -> dict[str, Tensor]:
    """The model's outputs for a whole round, without gradients, in pieces."""
    parts = micro_batches(samples, budget)
    scored = [model.outputs(samples.take(index), names) for index in parts]
    axis = samples.row.ndim - 1
    order = torch.argsort(torch.cat(parts))
    return {
        name: torch.cat([s[name].cpu() for s in scored], axis).index_select(axis, order)
        for name in names
    }


def score_all(policy: Trainable, samples: Samples, budget: int | None) -> Tensor:
    """Log-probs of every response token, [*R, N, K, T], without gradients, in pieces."""
    return outputs_all(policy, samples, budget, LOGP)["logp"]
