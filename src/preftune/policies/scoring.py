"""Forward passes of bounded size over a round of samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from preftune.phases import phase
from preftune.policies.base import Trainable
from preftune.samples import Samples
from preftune.team import current

LOGP = frozenset({"logp"})


def sizes(samples: Samples) -> list[int]:
    """Tokens that each prompt with all of its responses takes in a packed row."""
    return (samples.prompt_mask.sum(-1) + samples.lengths().sum(-1)).tolist()


def micro_batches(samples: Samples, budget: int | None) -> list[Tensor]:
    """Prompts by length in groups of at most `budget` tokens, about as many for each process. A
    study's runs stay in one group."""
    size = sizes(samples) if samples.row.ndim == 1 else []
    piece = current().piece(sum(size), budget)
    if samples.row.ndim > 1 or piece is None:
        return [torch.arange(samples.row.shape[-1])]
    return by_length(size, piece)


def by_length(size: Sequence[int], budget: int) -> list[Tensor]:
    """Places of prompts of these sizes, longest first, in as few groups of at most `budget` tokens
    as they need, about equally large: each pass over the weights costs the same again. One prompt
    alone may exceed the budget."""
    order = sorted(range(len(size)), key=lambda i: -size[i])
    enough = sum(size) / max(1, -(-sum(size) // budget))
    groups: list[list[int]] = []
    held = 0
    for i in order:
        full = held >= enough or held + size[i] > budget
        if not groups or full or (len(groups[-1]) + 1) * size[groups[-1][0]] > 2 * budget:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += size[i]
    return [torch.tensor(group) for group in groups]


@torch.no_grad()
def outputs_all(
    model: Trainable, samples: Samples, budget: int | None, names: frozenset[str]
) -> dict[str, Tensor]:
    """The model's outputs for a whole round, without gradients, in pieces, which the processes
    share out."""
    team = current()
    parts = micro_batches(samples, budget)
    with phase("score", int(samples.mask.sum())):
        own = [model.outputs(samples.take(i), names) for i in parts[team.rank :: team.size]]
        scored = [x for each in team.gather(own) for x in each]
    parts = [index for rank in range(team.size) for index in parts[rank :: team.size]]
    axis = samples.row.ndim - 1
    order = torch.argsort(torch.cat(parts))
    return {
        name: torch.cat([s[name].cpu() for s in scored], axis).index_select(axis, order)
        for name in names
    }


def score_all(policy: Trainable, samples: Samples, budget: int | None) -> Tensor:
    """Log-probs of every response token, [*R, N, K, T], without gradients, in pieces."""
    return outputs_all(policy, samples, budget, LOGP)["logp"]
