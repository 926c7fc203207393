"""What maps contexts to logits, for R runs at once: a table, a small network, a log-linear model.

A context is an integer in [0, C). R, V: the legend of `preftune.samples`; F: features of a context.
On one thread, what a run computes is bitwise independent of the runs beside it: every product of
matrices is a batched one over the runs, and its widths are multiples of `ALIGN`. On other widths
MKL rounds the same run differently alone and in a batch, and so it does a product with one column.
So does torch where a function's vector and scalar code differ (sigmoid, softplus, pow, logaddexp),
or where it takes another way for one row (var): none of these stands here.
"""

import copy
import math
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from preftune.numerics import uniform

ALIGN = 16
"""Widths of matrices are padded to multiples of this: 64 bytes in float32."""


@runtime_checkable
class Net(Protocol):
    """Logits of contexts, and the weights behind them."""

    batch_shape: tuple[int, ...]
    """() or (R,)."""
    num_contexts: int
    vocab: int
    spare: int
    """All contexts together are no dearer than every so manieth of them by itself."""

    def logits(self, contexts: Int[Tensor, "*R m"] | None = None) -> Float[Tensor, "*R m V"]:
        """Of these contexts of each run, of which one may stand twice; None: of all in order."""
        ...

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The weights by name, each [*R, ...]."""
        ...

    def copy(self) -> "Net":
        """The same with weights of its own, which take no gradient."""
        ...


_W = TypeVar("_W", bound="_Weights")


class _Weights:
    """Trainable weights by name."""

    spare = 1

    def __init__(self, **weights: Tensor) -> None:
        self.weights = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}

    def tensors(self) -> list[tuple[str, Tensor]]:
        """See `Net.tensors`."""
        return list(self.weights.items())

    def copy(self: _W) -> _W:
        """See `Net.copy`."""
        twin = copy.copy(self)
        twin.weights = {n: w.detach().clone() for n, w in self.weights.items()}
        return twin


def rows_of(x: Tensor, index: Int[Tensor, "*R m"]) -> Tensor:
    """x [*R, C, ...] at `index` along C, each run by its own indices: [*R, m, ...]."""
    runs, (count, *rest) = index.shape[:-1], x.shape[index.ndim - 1 :]
    if runs:
        index = index + count * torch.arange(len(index), device=index.device)[:, None]
    flat = x.reshape(-1, *rest).index_select(0, index.flatten())
    return flat.view(*index.shape, *rest)


def _aligned(width: int) -> int:
    return -(-width // ALIGN) * ALIGN


def _padded(x: Tensor, *widths: int) -> Tensor:
    """Zeros behind the last axes, one width for each of them."""
    gaps = [w - have for w, have in zip(widths, x.shape[-len(widths) :], strict=True)]
    return F.pad(x, [part for gap in reversed(gaps) for part in (0, gap)])


class Table(_Weights):
    """One logit for each context and token, the start of which is given."""

    spare = 4  # rows of a table that are picked out are copied, and their gradient is put back

    def __init__(self, logits: Float[Tensor, "*R C V"]) -> None:
        super().__init__(logits=logits)
        self.batch_shape = tuple(logits.shape[:-2])
        self.num_contexts, self.vocab = logits.shape[-2:]

    def logits(self, contexts: Int[Tensor, "*R m"] | None = None) -> Float[Tensor, "*R m V"]:
        """See `Net.logits`."""
        table = self.weights["logits"]
        if contexts is None:
            return table
        return table.gather(-2, contexts.unsqueeze(-1).expand(*contexts.shape, self.vocab))


class Mlp(_Weights):
    """A network of a few layers for each run.

    Weights are uniform within gain * sqrt(6 / (fan_in + fan_out)), functions of the run's key
    alone; biases start at 0. Inside, widths are padded to multiples of `ALIGN`: what is added to
    the weights is 0 and keeps a gradient of exactly 0, for either what it multiplies is 0 or what
    comes back to it is. Tensors are `weight_i` [R, in, out] and `bias_i` [R, out] of layer i, and
    `norm_weight` and `norm_bias` [R, out] of the LayerNorm, all padded.

    The network of the bandit of arXiv 2404.14367 has features of width 100, a layer of 50 with
    LayerNorm and ReLU, two of 256 with ReLU, and 100 arms, at gain 0.01: 109,698 weights a run,
    the padding not counted.
    """

    def __init__(
        self,
        features: Float[Tensor, "C F"] | Float[Tensor, "R C F"],
        keys: Int[Tensor, " R"],
        vocab: int,
        hidden: Sequence[int],
        *,
        activation: Literal["relu", "tanh"],
        norm_first: bool,
        gain: float,
        offset: Float[Tensor, " V"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            features: of each context, the same for all runs or a run each.
            keys: of the draws of each run's weights.
            hidden: widths of the hidden layers.
            norm_first: the first hidden layer has a LayerNorm before its activation.
            offset: added to the logits, and never trained.
        """
        assert hidden or not norm_first, "without a hidden layer there is nothing to normalise"
        self.widths = (features.shape[-1], *hidden, vocab)
        self.batch_shape = tuple(keys.shape)
        self.num_contexts, self.vocab = features.shape[-2], vocab
        self.activation, self.norm_first = activation, norm_first
        self.offset = None if offset is None else offset.detach().to(dtype)
        self.features = _padded(features.detach().to(dtype), _aligned(features.shape[-1]))
        start: dict[str, Tensor] = {}
        for i, (into, out) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            bound = gain * math.sqrt(6 / (into + out))
            drawn = (2 * uniform(keys[:, None], i, torch.arange(into * out)) - 1) * bound
            weight = drawn.to(dtype).view(len(keys), into, out)
            start[f"weight_{i}"] = _padded(weight, _aligned(into), _aligned(out))
            start[f"bias_{i}"] = torch.zeros_like(start[f"weight_{i}"][:, 0])
            if norm_first and i == 0:
                start["norm_weight"] = _padded(torch.ones_like(weight[:, 0]), _aligned(out))
                start["norm_bias"] = torch.zeros_like(start["bias_0"])
        super().__init__(**start)

    @property
    def num_weights(self) -> int:
        """Trained numbers a run, without the padding."""
        layers = zip(self.widths[:-1], self.widths[1:], strict=True)
        return sum((i + 1) * o for i, o in layers) + 2 * self.widths[1] * self.norm_first

    def logits(self, contexts: Int[Tensor, "R m"] | None = None) -> Float[Tensor, "R m V"]:
        """See `Net.logits`."""
        w, last = self.weights, len(self.widths) - 2
        x = self._inputs(contexts)
        for i in range(last + 1):
            x = torch.baddbmm(w[f"bias_{i}"].unsqueeze(1), x, w[f"weight_{i}"])
            if i == 0 and self.norm_first:
                x = self._normalised(x)
            if i < last:
                x = x.relu_() if self.activation == "relu" else x.tanh_()
        x = x[..., : self.vocab]
        return x if self.offset is None else x + self.offset

    def _inputs(self, contexts: Tensor | None) -> Tensor:
        """Features [R, m, padded F] of the contexts."""
        if contexts is None:
            return self.features.expand(*self.batch_shape, *self.features.shape[-2:])
        if self.features.ndim == 3:
            return rows_of(self.features, contexts)
        flat = self.features.index_select(0, contexts.flatten())
        return flat.view(*contexts.shape, flat.shape[-1])

    def _normalised(self, x: Tensor) -> Tensor:
        """LayerNorm of the true width of the first hidden layer."""
        width = self.widths[1]
        unit = _padded(F.layer_norm(x[..., :width], (width,)), x.shape[-1])
        w, b = (self.weights[f"norm_{name}"].unsqueeze(1) for name in ("weight", "bias"))
        return torch.addcmul(b, unit, w)


class Shifted:
    """Another net's logits, added to given ones that are never trained."""

    def __init__(self, net: Net, offset: Float[Tensor, "*R C V"]) -> None:
        assert offset.shape[-2:] == (net.num_contexts, net.vocab), "logits of the same contexts"
        self.net, self.offset = net, offset.detach()
        self.batch_shape, self.num_contexts = net.batch_shape, net.num_contexts
        self.vocab, self.spare = net.vocab, net.spare

    def logits(self, contexts: Int[Tensor, "*R m"] | None = None) -> Float[Tensor, "*R m V"]:
        """See `Net.logits`."""
        offset = self.offset if contexts is None else rows_of(self.offset, contexts)
        return self.net.logits(contexts) + offset

    def tensors(self) -> list[tuple[str, Tensor]]:
        """See `Net.tensors`."""
        return self.net.tensors()

    def copy(self) -> "Shifted":
        """See `Net.copy`."""
        return Shifted(self.net.copy(), self.offset)


class LogLinear(_Weights):
    """logits = offset + features @ theta, with theta [*R, d] a run."""

    def __init__(
        self,
        features: Float[Tensor, "*RC V d"],
        *,
        runs: int | None = None,
        start: Float[Tensor, "*R d"] | None = None,
        offset: Float[Tensor, " V"] | None = None,
        per_run: bool = False,
    ) -> None:
        """
        Args:
            features: of each token [V, d], or of each token in each context [C, V, d].
            runs: R; None: no run axis. Not needed where `start` or `per_run` tell it.
            start: theta at the start; None: 0.
            offset: added to the logits, and never trained.
            per_run: the features have a leading axis of runs: [R, V, d] or [R, C, V, d].
        """
        if start is None:
            runs = len(features) if per_run else runs
            start = features.new_zeros(*(() if runs is None else (runs,)), features.shape[-1])
        super().__init__(theta=start)
        self.batch_shape = tuple(start.shape[:-1])
        assert not per_run or self.batch_shape == (len(features),), "features of other runs"
        if features.ndim == 2 + per_run:
            features = features.unsqueeze(-3)
        self.num_contexts, self.vocab = features.shape[-3:-1]
        self.per_run = per_run
        self.offset = None if offset is None else offset.detach().to(start)
        wide = _aligned(self.vocab), _aligned(features.shape[-1])
        self.features = _padded(features.detach().to(start), *wide)  # [(R), C, V, d], V, d padded

    def logits(self, contexts: Int[Tensor, "*R m"] | None = None) -> Float[Tensor, "*R m V"]:
        """See `Net.logits`."""
        x = self.features
        if contexts is not None:
            x = rows_of(x, contexts) if self.per_run else x[contexts]
        x = x.expand(*self.batch_shape, *x.shape[-3:])
        # theta is a matrix of one row: as one of one column it would not keep its rounding
        theta = _padded(self.weights["theta"], x.shape[-1]).unsqueeze(-2)
        flat = torch.matmul(theta, x.flatten(-3, -2).transpose(-1, -2)).squeeze(-2)
        logits = flat.unflatten(-1, x.shape[-3:-1])[..., : self.vocab]
        return logits if self.offset is None else logits + self.offset
