"""Masked sums, chunked token log-probs, and counter-based random draws."""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
"""Logits held at once by the chunked head: 128 MiB in float32, on a GPU 1 GiB."""


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB for the next tensors: once it has freed one
    large block, it expects more. Fresh memory, page by page, cost a tenth to a third of an update
    of a study."""
    torch.empty(31 * 2**20, dtype=torch.uint8)


def masked_sum(x: Float[Tensor, "*E T"], mask: Bool[Tensor, "*E T"]) -> Float[Tensor, "*E"]:
    """Sum over T of the masked-in values. `where`, not a product: NaN * 0 is NaN."""
    return torch.where(mask, x, torch.zeros_like(x)).sum(-1)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(h W^T + b)[target] by chunks of rows; the backward pass recomputes each chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        product: torch.dtype | None,
    ) -> Tensor:
        logp, normaliser = [], []
        # a GPU multiplies wide numbers slowly: it takes narrow factors, and adds up in float32
        narrow = product is not None and hidden.device.type == "cuda"
        factor = weight.to(product) if narrow else weight
        for h, t in _chunks(hidden, weight, target):
            logits = _logits(h.to(factor.dtype), factor, bias)
            picked = logits.gather(-1, t[:, None]).squeeze(-1)
            z = _logsumexp_(logits)
            logp.append(picked - z)
            normaliser.append(z)
        ctx.save_for_backward(hidden, weight, bias, target, torch.cat(normaliser))
        ctx.product = hidden.dtype if product is None else product
        return torch.cat(logp)

    @staticmethod
    @once_differentiable  # `normaliser` carries no graph: a second derivative would be wrong
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, target, normaliser = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight) if wanted[1] else None
        d_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        narrow = weight.to(ctx.product)
        start = 0
        for h, t in _chunks(hidden, weight, target):
            rows = slice(start, start + len(h))
            start += len(h)
            # d logp / d logits = onehot(target) - softmax, scaled by the incoming gradient
            h = h.to(ctx.product)
            d_logits = _logits(h, narrow, bias) - normaliser[rows, None]
            d_logits.exp_().mul_(-grads[0][rows, None])
            d_logits.scatter_add_(-1, t[:, None], grads[0][rows, None])
            d_narrow = d_logits.to(ctx.product)
            if d_hidden is not None:
                d_hidden[rows] = d_narrow @ narrow
            if d_weight is not None:
                _add_product_(d_weight, d_narrow.T, h)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return d_hidden, d_weight, d_bias, None, None


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the sum is kept in the total's own type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype) if a.device.type == "cuda" else a @ b


def _logsumexp_(logits: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
    """log sum exp over V. The logits are lost: no copy of them is made."""
    top = logits.amax(-1, keepdim=True)
    return logits.sub_(top).exp_().sum(-1).log_().add_(top.squeeze(-1))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [M, V]. Of narrow factors a GPU adds up in float32; a CPU rounds once, at the end."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    on_gpu = hidden.device.type == "cuda"
    logits = torch.mm(hidden, weight.T, out_dtype=torch.float32) if on_gpu else hidden @ weight.T
    return logits if bias is None else logits + bias


def _rows_at_once(weight: Tensor) -> int:
    """Rows of a chunk."""
    return max(1, CHUNK_ELEMENTS.get(weight.device.type, 2**25) // len(weight))


def _chunks(hidden: Tensor, weight: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    most = _rows_at_once(weight)
    size = -(-len(hidden) // max(1, -(-len(hidden) // most)))  # even ones: a short one is slow
    return list(zip(hidden.split(size), target.split(size), strict=True))


def token_log_probs(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    target: Int[Tensor, " M"],
    bias: Float[Tensor, " V"] | None = None,
    product: torch.dtype | None = None,
) -> Float[Tensor, " M"]:
    """Log-prob of each target token, in float32 at least, never holding [M, V].

    Args:
        hidden: last hidden states at the positions that predict the targets.
        weight: output embedding; bias: its bias, where the model has one.
        target: token ids.
        product: type of the backward pass's products (as everywhere under autocast); None: of the
            forward's. Log-probs are not rounded by it, and gradients are summed in the wider type.
    Returns:
        nats, in the wider of float32 and the inputs' dtype.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogProbs.apply(
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            target,
            product,
        )  # type: ignore[return-value]


def token_collision(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None = None,
) -> Float[Tensor, " M"]:
    """log sum_v p(v)^2 of the next-token distribution at each position, in nats.

    By chunks, in float32 at least, and without a gradient.
    """
    out = []
    size = _rows_at_once(weight)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for h in hidden.split(size):
            out.append(_wide_logits(h, weight, bias).log_softmax(-1).mul_(2).logsumexp(-1))
    return torch.cat(out)


def token_surprisal(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    target: Int[Tensor, " M"],
    bias: Float[Tensor, " V"] | None = None,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Log-prob of each target, and mean and variance of -log p over the next-token distribution.

    By chunks, in float32 at least, and without a gradient.

    Returns:
        log-prob and entropy in nats, variance in nats squared.
    """
    out = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for h, t in _chunks(hidden, weight, target):
            table = _wide_logits(h, weight, bias).log_softmax(-1)
            out.append((table.gather(-1, t[:, None]).squeeze(-1), *next_token_moments(table)))
    logp, entropy, variance = (torch.cat(x) for x in zip(*out, strict=True))
    return logp, entropy, variance


def next_token_moments(
    logp: Float[Tensor, "*E V"],
) -> tuple[Float[Tensor, "*E"], Float[Tensor, "*E"]]:
    """Mean and variance of -log p over a next-token distribution.

    Args:
        logp: [..., V], nats, normalised, in float32 at least; -inf allowed.

    Returns:
        entropy [...], nats, and variance [...], nats squared, >= 0.
    """
    p = logp.exp()
    surprisal = torch.where(p > 0, -logp, torch.zeros_like(logp))
    entropy = (p * surprisal).sum(-1)
    # about the mean: the difference of two large sums would lose all digits at low entropy
    return entropy, (p * (surprisal - entropy.unsqueeze(-1)) ** 2).sum(-1)


def token_kl(
    hidden: Float[Tensor, "M D"],
    ref_hidden: Float[Tensor, "M D2"],
    head: tuple[Tensor, Tensor | None],
    ref_head: tuple[Tensor, Tensor | None],
) -> Float[Tensor, " M"]:
    """KL(policy || reference) of the next-token distribution at each position, in nats.

    By chunks, in float32 at least, and without a gradient.
    """
    out = []
    size = _rows_at_once(head[0])
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for h, r in zip(hidden.split(size), ref_hidden.split(size), strict=True):
            logp = _wide_logits(h, *head).log_softmax(-1)
            ref_logp = _wide_logits(r, *ref_head).log_softmax(-1)
            out.append((logp.exp() * (logp - ref_logp)).sum(-1))
    return torch.cat(out)


def _wide_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return _logits(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


# Random draws are functions of (key, counters), not of a generator's state: a draw does not depend
# on what was drawn before or beside it, and a run resumes from a handful of integers.


def stream_key(*parts: object) -> int:
    """A 63-bit key for a named stream; equal parts give equal keys on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64, whose products wrap."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def stream_keys(seeds: Sequence[int], *parts: object) -> Int[Tensor, " R"]:
    """The key of a stream for each run's seed."""
    return torch.tensor([stream_key(seed, *parts) for seed in seeds], dtype=torch.int64)


def uniform(key: int | Tensor, *counters: Tensor | int) -> Float[Tensor, "..."]:
    """Uniform float64 draws in [0, 1), one for each element of the broadcast keys and counters."""
    state = torch.as_tensor(key, dtype=torch.int64)
    for counter in counters:
        value = torch.as_tensor(counter, dtype=torch.int64)
        state = _mix(state + (value + 1) * -7046029254386353131)  # the golden gamma
    return ((state >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def normal(key: int | Tensor, *counters: Tensor | int) -> Float[Tensor, "..."]:
    """Standard normal float64 draws, by the inverse of the distribution function."""
    draw = uniform(key, *counters).clamp_(min=2.0**-53)  # at 0 the inverse is infinite
    return math.sqrt(2.0) * torch.erfinv(2.0 * draw - 1.0)


def first_wins(gap: Tensor, u: Tensor) -> Bool[Tensor, "..."]:
    """Bradley-Terry: whether the first of two is preferred, true for a uniform u with probability
    s(gap). By logarithms: torch's sigmoid rounds by where a number stands in its tensor."""
    return u.log() - torch.log1p(-u) < gap


@functools.lru_cache(maxsize=16)
def permutation(key: int, epoch: int, n: int) -> Int[Tensor, " n"]:
    """The order of n things in an epoch. Kept for the next call: not to be changed in place."""
    return torch.argsort(uniform(key, epoch, torch.arange(n)), stable=True)


def sample_index(probability: Float[Tensor, "*E V"], u: Float[Tensor, "*E"]) -> Int[Tensor, "*E"]:
    """Invert the cumulative distribution at u: one draw a row."""
    cdf = probability.to(torch.float64).cumsum(-1)
    found = torch.searchsorted(cdf, (u.to(cdf) * cdf[..., -1]).unsqueeze(-1), right=True)
    return found.squeeze(-1).clamp_(max=probability.shape[-1] - 1)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, in full where it is spread over processes: all of them must ask."""
    return getattr(tensor, "full_tensor", lambda: tensor)()
