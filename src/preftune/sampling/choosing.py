"""A token for each row of logits, by inverting the cumulative distribution at a uniform number.

The inversion goes by blocks of the vocabulary: the block first, then the token inside it. With a
vocabulary of 49152 and many rows, the passes over the logits are a good part of a decoding step;
so the softmax takes rows a few at a time, which stay in the processor's cache.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.sampling.decoding import Decoding

_BLOCK = 256
"""Tokens of a block: about the square root of a vocabulary, so that both searches are short."""
_CHUNK = 2**20
"""Logits worked on at once on a CPU: 4 MiB in float32. A GPU takes them all."""
_CANDIDATES = 1024
"""Tokens among which the nucleus is looked for first; sorting the whole vocabulary is slow."""


class Chosen(NamedTuple):
    """A token for each row, and its log-probs in nats, in float32 at least."""

    token: Int[Tensor, " B"]
    logp: Float[Tensor, " B"]
    """Under the model's own distribution."""
    sampled_logp: Float[Tensor, " B"]
    """Under the distribution that it was drawn from."""


def choose(
    logits: Float[Tensor, "B V"],
    u: Float[Tensor, " B"],
    decoding: Decoding,
    ends: Int[Tensor, " E"],
    early: Bool[Tensor, " B"],
) -> Chosen:
    """Draw a token for each row.

    Args:
        u: uniform numbers in [0, 1), float64.
        early: rows in which `ends`, the end tokens, have probability 0.
    """
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
    wide = torch.promote_types(logits.dtype, torch.float32)
    u, ends, early = (x.to(logits.device) for x in (u, ends, early))
    count, vocabulary = logits.shape
    mass = logits.new_empty(count, -(-vocabulary // _BLOCK) * _BLOCK, dtype=wide)
    mass[:, vocabulary:] = 0
    whole = logits.new_empty(count, dtype=wide)
    size = max(1, _CHUNK // vocabulary) if logits.device.type == "cpu" else count
    for start in range(0, count, size):
        rows = slice(start, start + size)
        own = logits[rows].to(wide, copy=not decoding.unmodified)
        if not decoding.unmodified:
            whole[rows] = own.logsumexp(-1)
            own[:, ends] = own[:, ends].masked_fill(early[rows, None], -torch.inf)
            own = restricted(own, decoding)
        torch.softmax(own, -1, out=mass[rows, :vocabulary])
    token, sampled = _invert(mass, u)
    if decoding.unmodified:
        return Chosen(token, sampled, sampled)
    return Chosen(token, logits.gather(-1, token[:, None]).squeeze(-1).to(wide) - whole, sampled)


def restricted(logits: Float[Tensor, "B V"], decoding: Decoding) -> Float[Tensor, "B V"]:
    """Logits of what is sampled: temperature (0 is greedy), then top-k, then top-p."""
    if decoding.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, logits.gather(-1, best))
    logits = logits / decoding.temperature
    if decoding.top_k:
        least = logits.topk(min(decoding.top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits if decoding.top_p >= 1 else _nucleus(logits, decoding.top_p)


def _nucleus(logits: Float[Tensor, "B V"], top_p: float) -> Float[Tensor, "B V"]:
    """The fewest most likely tokens that reach `top_p`: the first to pass it stays."""
    probs = logits.softmax(-1)
    width = vocabulary = logits.shape[-1]
    width = min(width, _CANDIDATES)
    while True:
        ordered, order = probs.topk(width, -1)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        if width == vocabulary or bool(beyond[:, -1].all()):
            break
        width = min(vocabulary, 8 * width)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, ~beyond)
    return logits.masked_fill(~inside, -torch.inf)


def _invert(
    probs: Float[Tensor, "B W"], u: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """The first token whose cumulative probability passes u, and its log-prob."""
    count = len(probs)
    probs = probs.view(count, -1, _BLOCK)
    masses = probs.sum(-1)
    block, inside = _search(masses, u)
    one = probs[torch.arange(count, device=probs.device), block]  # [B, _BLOCK]
    place, _ = _search(one, inside)
    # the whole is 1, or not a number
    logp = one.gather(-1, place[:, None]).squeeze(-1).log() - masses.sum(-1).log()
    return block * _BLOCK + place, logp


def _search(
    mass: Float[Tensor, "B M"], u: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """The first entry at which the running sum passes u times the whole, and how far into this
    entry that is, as a share. An entry of mass 0 is never found."""
    running = mass.double().cumsum(-1)
    target = (u * running[:, -1])[:, None]
    found = torch.searchsorted(running, target, right=True)
    # rounding may bring the target to the whole; no mass is behind the first to reach that
    last = torch.searchsorted(running, running[:, -1:].contiguous())
    found = torch.minimum(found, last).clamp_(max=mass.shape[-1] - 1)  # not a number: no place
    size = mass.gather(-1, found).double()
    share = (target - (running.gather(-1, found) - size)) / size
    return found.squeeze(-1), share.squeeze(-1).clamp(0.0, 1.0)
