"""Keys and values of prompts, each kept once for all of its responses, and of the responses.

Slots are places in a grid: G groups, one a prompt, of K slots, one a response. A model's layers
meet the cache twice in a forward pass, by `update` and by `attend`; in between, transformers hands
keys and values on untouched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Sizes of the buffers."""

    groups: int
    slots: int
    """Of each group."""
    prompt: int
    """Longest prompt, tokens."""
    own: int
    """Most tokens of a response that were read back."""


@dataclass
class _Layer:
    """Of one layer; H heads of keys, dimensions D and E of keys and values.

    The groups' heads stand in one axis, so that products over it need no copy."""

    prompt_keys: Float[Tensor, "GH P D"]
    prompt_values: Float[Tensor, "GH P E"]
    keys: Float[Tensor, "GHK W D"]
    values: Float[Tensor, "GHK W E"]


@dataclass(frozen=True)
class Prefill:
    """A forward pass over prompts, one after another in a row."""

    groups: Sequence[int]
    """Where each prompt goes."""
    ends: Sequence[int]
    """Where each ends in the row."""


@dataclass(frozen=True)
class Step:
    """A forward pass over one more token of each row."""

    slot: Int[Tensor, " R"] | None
    """Of each row, in the flattened grid; None: the rows are the grid."""
    place: Int[Tensor, " S"]
    """Of each slot in the grid: how many tokens of its response stand before this one."""
    bias: Float[Tensor, "G 1 K 1 PW"]
    """Added to scores: 0 where a slot sees a key, hugely negative where not. It is finite, since a
    slot that is out of use sees nothing, and a softmax over nothing is not a number."""


class SharedCache:
    """What `past_key_values` is in a forward pass of `SharedDecoder`."""

    is_compileable = False

    def __init__(self, grid: Grid, dtype: torch.dtype, device: torch.device) -> None:
        self.grid, self.dtype, self.device = grid, dtype, device
        self.now: Prefill | Step | None = None
        self._layers: dict[int, _Layer] = {}
        self._layer = -1
        self._rows: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given with each pass; nothing is to be counted on from here."""
        return 0

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys [B, H, n, D] and values, and give them back."""
        self._layer = layer_idx
        key, value = key.to(self.dtype), value.to(self.dtype)
        if layer_idx not in self._layers:
            self._layers[layer_idx] = self._new(key.shape[1], key.shape[-1], value.shape[-1])
        layer = self._layers[layer_idx]
        if isinstance(self.now, Prefill):
            for group, (start, end) in zip(self.now.groups, _spans(self.now), strict=True):
                heads = slice(group * key.shape[1], (group + 1) * key.shape[1])
                layer.prompt_keys[heads, : end - start] = key[0, :, start:end]
                layer.prompt_values[heads, : end - start] = value[0, :, start:end]
        else:
            assert self.now is not None, "a forward pass begins with `now`"
            into = self._written(key.shape[1])
            for held, new in ((layer.keys, key), (layer.values, value)):
                held.view(-1, new.shape[-1]).index_copy_(0, into, new.reshape(-1, new.shape[-1]))
        return key, value

    def attend(self, query: Float[Tensor, "B Hq L D"], scaling: float) -> Tensor:
        """Attention [B, L, Hq, E] of the layer that was updated last."""
        layer = self._layers[self._layer]
        query = query.to(self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            assert isinstance(self.now, Step), "prefill attends by `attend_prompts`"
            return self._attend(query.squeeze(2), layer, self.now, scaling).unsqueeze(1)

    def attend_prompts(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention [1, L, Hq, E] of prompts in one row, each by itself."""
        assert isinstance(self.now, Prefill), "only prompts are read whole"
        query = query.to(self.dtype)
        out = []
        for start, end in _spans(self.now):
            q, k, v = (x[:, :, start:end] for x in (query, key, value))
            repeats = q.shape[1] // k.shape[1]
            if repeats > 1:
                k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            out.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scaling
                )
            )
        return torch.cat(out, 2).transpose(1, 2)

    def _attend(self, query: Tensor, layer: _Layer, step: Step, scaling: float) -> Tensor:
        """Of queries [R, Hq, D] over prompts and responses: [R, Hq, E]."""
        g, k = self.grid.groups, self.grid.slots
        heads = len(layer.prompt_keys) // g
        rows = query * scaling
        if step.slot is not None:
            rows = self._scattered(rows, step.slot)
        size, width = rows.shape[1] // heads, rows.shape[-1]
        # [G, K, H, q, D] -> [G H, K q, D]: what shares keys stands together
        rows = rows.view(g, k, heads, size, width).transpose(1, 2)
        rows = rows.reshape(g * heads, k * size, width)
        ahead = torch.bmm(rows, layer.prompt_keys.transpose(1, 2))
        own = torch.bmm(rows.reshape(-1, size, width), layer.keys.transpose(1, 2))
        p, shape = self.grid.prompt, own.shape
        scores = ahead.new_empty(g, heads, k, size, step.bias.shape[-1])
        torch.add(ahead.view(*scores.shape[:4], p), step.bias[..., :p], out=scores[..., :p])
        torch.add(own.view(*scores.shape[:4], -1), step.bias[..., p:], out=scores[..., p:])
        probs = scores.view(g * heads, k * size, -1).softmax(-1)
        out = torch.bmm(probs[..., :p], layer.prompt_values)
        own = torch.bmm(probs[..., p:].reshape(shape), layer.values)
        out = out.add_(own.view(out.shape)).view(g, heads, k, size, -1).transpose(1, 2)
        out = out.reshape(g * k, heads * size, -1)
        return out if step.slot is None else out[step.slot]

    def _scattered(self, rows: Tensor, slot: Tensor) -> Tensor:
        """Rows [R, ...] at their slots [GK, ...]; what stands at the others is of no consequence,
        but finite."""
        shape = self.grid.groups * self.grid.slots, *rows.shape[1:]
        if self._rows is None or self._rows.shape != shape:
            self._rows = rows.new_zeros(shape)
        return self._rows.index_copy_(0, slot, rows)

    def _written(self, heads: int) -> Int[Tensor, " RH"]:
        """Where each row's new keys go in the flattened buffer."""
        step, grid = self.now, self.grid
        assert isinstance(step, Step), "prompts are written whole"
        if heads not in self._places:
            slot = step.slot
            if slot is None:
                slot = torch.arange(grid.groups * grid.slots, device=self.device)
            group, column = slot // grid.slots, slot % grid.slots
            head = torch.arange(heads, device=self.device)
            first = (group[:, None] * heads + head) * grid.slots + column[:, None]
            self._places[heads] = (first * grid.own + step.place[slot][:, None]).flatten()
        return self._places[heads]

    def begin(self, now: Prefill | Step) -> None:
        """The pass that comes."""
        self.now = now
        self._places: dict[int, Tensor] = {}

    def bias(
        self, prompt: Int[Tensor, " G"], place: Int[Tensor, " S"]
    ) -> Float[Tensor, "G 1 K 1 PW"]:
        """`Step.bias` for prompts of these lengths, and responses that are so long already."""
        grid = self.grid
        ahead = torch.arange(grid.prompt) < prompt[:, None, None]  # [G, 1, P]
        own = torch.arange(grid.own) <= place.view(grid.groups, grid.slots, 1)  # [G, K, W]
        seen = torch.cat([ahead.expand(-1, grid.slots, -1), own], -1)
        hidden = torch.zeros(seen.shape, dtype=self.dtype)
        hidden.masked_fill_(~seen, torch.finfo(self.dtype).min / 2)
        return hidden[:, None, :, None]

    def rearrange(self, grid: Grid, source: Int[Tensor, "G2 K2"]) -> None:
        """New buffers, filled from the old.

        Args:
            source: the old slot of each new one; -1 for one that is empty. The slots of a group
                come from one old group, or it is new.
        """
        old = self.grid
        group = torch.div(source.amax(-1), old.slots, rounding_mode="floor")
        self.grid = grid
        for layer in self._layers.values():
            heads = len(layer.prompt_keys) // old.groups
            for name in ("prompt_keys", "prompt_values"):
                held = getattr(layer, name).view(old.groups, heads, old.prompt, -1)
                new = held.new_zeros(grid.groups, heads, grid.prompt, held.shape[-1])
                both = min(old.prompt, grid.prompt)
                stays = group >= 0
                new[stays, :, :both] = held[group[stays], :, :both]
                setattr(layer, name, new.flatten(0, 1))
            for name in ("keys", "values"):
                held = getattr(layer, name).view(old.groups, heads, old.slots, old.own, -1)
                new = held.new_zeros(grid.groups, heads, grid.slots, grid.own, held.shape[-1])
                both = min(old.own, grid.own)
                g2, k2 = (source >= 0).nonzero(as_tuple=True)
                from_ = source[g2, k2]
                g1, k1 = from_ // old.slots, from_ % old.slots
                new[g2, :, k2, :both] = held[g1, :, k1, :both]
                setattr(layer, name, new.flatten(0, 2))

    def _new(self, heads: int, width: int, value_width: int) -> _Layer:
        """Zeros: what is not written yet is multiplied by a probability of 0."""
        grid = self.grid

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=self.dtype, device=self.device)

        groups, slots = grid.groups * heads, grid.groups * heads * grid.slots
        return _Layer(
            zeros(groups, grid.prompt, width),
            zeros(groups, grid.prompt, value_width),
            zeros(slots, grid.own, width),
            zeros(slots, grid.own, value_width),
        )


def _spans(prefill: Prefill) -> list[tuple[int, int]]:
    """Start and end of each prompt in the row."""
    return list(zip([0, *prefill.ends[:-1]], prefill.ends, strict=True))
