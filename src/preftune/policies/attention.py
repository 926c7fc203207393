"""Attention over a row that holds many sequences, without a mask and without padding.

Such a row is described by tiles: runs of queries with the keys that they see. On a CPU torch's own
fused attention takes dense masks only and computes in full what they hide; here a tile is a few
matrix products over just its keys, with the heads that share keys stacked into one product. The
backward pass recomputes the probabilities, so memory grows with the length of the row alone.
"""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.huggingface import register_attention, sdpa_attention, unknown_to_ours

NAME = "preftune"
"""Of the attention in a model's configuration; without tiles it is transformers' own `sdpa`."""
BLOCK = 256
"""Queries of a tile at most: what one tile holds is BLOCK x keys a head."""
TILE = 5
"""Numbers of a tile: queries [q0, q1), which see keys [p0, p1), and of [o0, q1) those up to
themselves."""


def tiles_of(
    prompt_len: int, starts: list[int], lengths: list[int], offset: int
) -> list[list[int]]:
    """Tiles of a prompt and of its responses in a row.

    Args:
        prompt_len: tokens of the prompt, which begins at `offset`.
        starts, lengths: of each response, from `offset`.
    """
    out = []

    def add(first: int, length: int, prompt: int) -> None:
        for begin in range(first, first + length, BLOCK):
            end = min(begin + BLOCK, first + length)
            out.append([begin, end, offset, offset + prompt, first])

    if starts and starts[0] == prompt_len and len(starts) == 1:  # one sequence, plainly causal
        add(offset, prompt_len + lengths[0], 0)
        return out
    add(offset, prompt_len, 0)
    for start, length in zip(starts, lengths, strict=True):
        add(offset + start, length, prompt_len)
    return out


def _keys(x: Tensor, tile: list[int]) -> Tensor:
    """The tile's keys or values, [H, n, D], of x [H, L, D]."""
    _, q1, p0, p1, o0 = tile
    if p0 == p1:
        return x[:, o0:q1]
    return x[:, p0:q1] if p1 == o0 else torch.cat([x[:, p0:p1], x[:, o0:q1]], 1)


def _probabilities(
    query: Float[Tensor, "H GC D"], keys: Float[Tensor, "H n D"], tile: list[int], scale: float
) -> Float[Tensor, "H GC n"]:
    """Of the tile's queries, those of G heads one after another, over its keys."""
    q0, q1 = tile[:2]
    count = q1 - q0
    scores = torch.baddbmm(
        query.new_empty(1, 1, 1), query, keys.transpose(1, 2), beta=0, alpha=scale
    )
    later = torch.ones(count, count, dtype=torch.bool).triu_(1)
    scores.unflatten(1, (-1, count))[..., -count:].masked_fill_(later, -torch.inf)
    return scores.softmax(-1)


def _stacked(x: Float[Tensor, "Hq L D"], tile: list[int], heads: int) -> Float[Tensor, "H GC D"]:
    """The tile's rows of x, the heads of a group one after another."""
    return x[:, tile[0] : tile[1]].reshape(heads, -1, x.shape[-1])


@torch.library.custom_op("preftune::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, scale: float
) -> Tensor:
    """Attention of one row by tiles.

    Args:
        query: [1, Hq, L, D]; key, value: [1, H, L, D], each for Hq / H heads of queries.
        tiles: [n, TILE]; each query stands in one of them.
    Returns:
        [1, L, Hq, D].
    """
    q, k, v = query[0], key[0], value[0]
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    for tile in tiles.tolist():
        probs = _probabilities(_stacked(q, tile, len(k)), _keys(k, tile), tile, scale)
        found = torch.bmm(probs, _keys(v, tile)).view(len(q), -1, q.shape[-1])
        out[tile[0] : tile[1]] = found.transpose(0, 1)
    return out.unsqueeze(0)


@torch.library.custom_op("preftune::packed_attention_backward", mutates_args=(), device_types="cpu")
def packed_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes."""
    q, k, v, g = query[0], key[0], value[0], grad[0].transpose(0, 1)
    wide = torch.promote_types(k.dtype, torch.float32)  # keys of a prompt are met by many tiles
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = (torch.zeros(x.shape, dtype=wide) for x in (k, v))
    for tile in tiles.tolist():
        q0, q1, p0, p1, o0 = tile
        mine, keys, incoming = _stacked(q, tile, len(k)), _keys(k, tile), _stacked(g, tile, len(k))
        probs = _probabilities(mine, keys, tile, scale)
        d_probs = torch.bmm(incoming, _keys(v, tile).transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
        d_q[:, q0:q1] = torch.bmm(d_scores, keys).mul_(scale).view(len(q), -1, q.shape[-1])
        found_k = torch.bmm(d_scores.transpose(1, 2), mine)
        found_v = torch.bmm(probs.transpose(1, 2), incoming)
        for total, found in ((d_k, found_k), (d_v, found_v)):
            total[:, p0:p1] += found[:, : p1 - p0]
            total[:, o0:q1] += found[:, p1 - p0 :]
    d_k.mul_(scale)
    return d_q.unsqueeze(0), d_k.to(k.dtype).unsqueeze(0), d_v.to(v.dtype).unsqueeze(0)


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


@packed_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.scale = inputs[4]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *packed_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


packed_attention.register_autograd(_backward, setup_context=_keep)


@functools.cache
def _flex() -> Any:
    """FlexAttention, compiled: otherwise it would hold every score. Each new length, type and
    setting of gradients is compiled; beyond the limit torch would go on uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention)


def attention(
    module: Any,
    query: Float[Tensor, "B Hq L D"],
    key: Float[Tensor, "B H L2 D"],
    value: Float[Tensor, "B H L2 D"],
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention; a mask of whole numbers is tiles, [1, 1, n, TILE],
    one that is no tensor is FlexAttention's."""
    tiles: Tensor | None = None
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int64:
        tiles = attention_mask[0, 0]
    elif isinstance(attention_mask, Tensor | None):
        return sdpa_attention(module, query, key, value, attention_mask, scaling=scaling, **options)
    unknown = unknown_to_ours(options)
    if unknown or options.get("dropout", 0.0):
        raise ValueError(f"packed rows know no {', '.join(unknown) or 'dropout'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # rotated queries come wider than values
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if tiles is not None:
        return packed_attention(query, key, value, tiles, scale), None
    grouped = query.shape[1] != key.shape[1]
    out = _flex()(query, key, value, block_mask=attention_mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def register() -> None:
    """Make it known to transformers, once."""
    register_attention(NAME, attention)
