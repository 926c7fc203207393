"""Which pairs still teach a policy something, and how many answers it still has to a prompt.

Everything is told from tensors that an update has at hand; no model is run. Shapes: the legend of
`preftune.samples`, of a single run.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.samples import Batch, Samples
from preftune.terms import Objective, Term, gather

SETTLED = 0.1
"""Of the push that an undecided pair gets: with less the pair is decided, and moves nothing."""
UNLIKELY = -4.6
"""Nats a token, 1 in 100: to push down what has no probability frees none for anything else."""
ALIKE = 0.9
"""Of the longer response: what a pair's responses have in common at their beginning has the same
log-prob in both, so its gradient cancels in the margin."""


def of_pairs(
    term: Term, samples: Samples, batch: Batch, arguments: Mapping[str, Any]
) -> dict[str, Bool[Tensor, "N Q"]]:
    """Of each pair, why it teaches nothing, and whether it teaches.

    Args:
        arguments: the objective's, as bound for this batch (log-probs [N, Q], sums or means).

    Returns:
        nothing where the objective takes no log-probs of the two responses, or those of each token.
    """
    if not {"logp_chosen", "logp_rejected"} <= arguments.keys() or term.level == "token":
        return {}
    place = {role: batch.roles.index(role) for role in ("chosen", "rejected")}
    lengths = gather(samples.lengths(), batch.index, per_token=False)
    rejected = arguments["logp_rejected"].detach()
    if term.level == "sequence":
        rejected = rejected / lengths[..., place["rejected"]].clamp(min=1)
    shared = shared_prefix(samples, batch.index)
    found = {
        "settled_pairs": settled(term.objective, arguments),
        "unlikely_pairs": rejected < UNLIKELY,
        "alike_pairs": shared >= ALIKE * lengths.amax(-1),
    }
    return found | {"informative_pairs": ~torch.stack(list(found.values())).any(0)}


def settled(objective: Objective, arguments: Mapping[str, Any]) -> Bool[Tensor, "N Q"]:
    """The objective hardly pushes the rejected response down any more.

    The push is d loss / d logp_rejected (for DPO β σ(-β margin)), so that every objective says
    itself when a pair is decided. It is compared with that on the same pair undecided: the rejected
    response with the chosen one's log-ratio, or, where there is no reference, with its log-prob (a
    token where the objective counts tokens). An objective that pushes nothing down settles nothing.
    """
    level = arguments["logp_chosen"]
    if "ref_logp_chosen" in arguments:
        level = level - arguments["ref_logp_chosen"] + arguments["ref_logp_rejected"]
    elif "len_chosen" in arguments:
        level = level * arguments["len_rejected"] / arguments["len_chosen"].clamp(min=1)
    now = _push(objective, arguments, arguments["logp_rejected"])
    undecided = _push(objective, arguments, level)
    return (undecided > 0) & (now < SETTLED * undecided)


def _push(objective: Objective, arguments: Mapping[str, Any], rejected: Tensor) -> Tensor:
    """d loss / d logp_rejected where that is `rejected`, [N, Q]; 0 where it pulls up."""
    fixed = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with torch.enable_grad():
        x = rejected.detach().requires_grad_()
        loss = objective(**(fixed | {"logp_rejected": x}))
        (slope,) = torch.autograd.grad(loss.sum(), x)
    return slope.clamp(min=0.0)


def shared_prefix(samples: Samples, index: Int[Tensor, "N Q A"]) -> Int[Tensor, "N Q"]:
    """Tokens that both responses of each pair begin with."""
    tokens = gather(samples.tokens, index, per_token=True)
    mask = gather(samples.mask, index, per_token=True).all(-2)
    same = (tokens[..., 0, :] == tokens[..., 1, :]) & mask
    return same.long().cumprod(-1).sum(-1)


def distinct(
    tokens: Int[Tensor, "N K T"], mask: Bool[Tensor, "N K T"], of: Bool[Tensor, "N K"]
) -> Float[Tensor, " N"]:
    """How many different responses a prompt has: 0 if all are the same, 1 if no two are.

    Equal responses are found by a hash of 64 bits, so that nothing of [N, K, K, T] is made.

    Args:
        of: which responses count; a prompt needs two.
    """
    place = torch.arange(1, tokens.shape[-1] + 1)
    mixed = (tokens + 1) * (0x9E3779B97F4A7C1 + 2 * place * 0x5851F42D4C957F)  # wraps around
    hashed = torch.where(mask, mixed ^ (mixed >> 29), 0).sum(-1)
    same = (hashed.unsqueeze(-1) == hashed.unsqueeze(-2)) & of.unsqueeze(-1) & of.unsqueeze(-2)
    repeated = torch.tril(same, diagonal=-1).any(-1)
    different = (of & ~repeated).sum(-1)
    return (different - 1) / (of.sum(-1) - 1).clamp(min=1)
