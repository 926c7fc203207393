"""Small decoder-only transformers, one for each run, that advance together.

The "nano GPT" of the token bandit (arXiv 2404.14367): a prompt of one token, a response of a fixed
number of tokens, and no end token. Written for one CPU thread, where the matrix products, memory
that has left the cache, and the number of operations cost. So

* each run is computed alone, in a loop: at the sizes of a study its products fill a core, and its
  activations stay nearer than those of many runs would. A run is then bitwise the same in any
  batch: the same operations on equally aligned memory (hence widths in multiples of 16);
* the gradient is written by hand;
* the first position, the prompt, is computed once for all responses to it.

Rows of activations: first the n prompts, then for each later position the S = n K responses. With
the position outermost, the heads of all responses are one strided batch of small matrices.
"""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from preftune.numerics import keep_freed_memory, normal, sample_index
from preftune.samples import Samples
from preftune.sampling.decoding import Uniform

EPS = 1e-5
"""Of the LayerNorms."""
LINE = 16
"""Float32 numbers in a cache line: every matrix of every run begins at one."""
_aten = torch.ops.aten


class _Ends(NamedTuple):
    """What stands before and after the layers."""

    token: Tensor  # [V, D]
    position: Tensor  # [1 + T, D]
    gain: Tensor  # [D], of the last LayerNorm
    shift: Tensor
    head: Tensor  # [D, V]


class _Layer(NamedTuple):
    """The weights of a layer; gains and shifts are of the LayerNorm before each half."""

    attend_gain: Tensor  # [D]
    attend_shift: Tensor
    attend: Tensor  # [D, 3 D]: query, key, value
    attend_bias: Tensor
    merge: Tensor  # [D, D]
    merge_bias: Tensor
    mlp_gain: Tensor
    mlp_shift: Tensor
    up: Tensor  # [D, 4 D]
    up_bias: Tensor
    down: Tensor  # [4 D, D]
    down_bias: Tensor


class _Run(NamedTuple):
    """One run's weights, or the places of their gradients."""

    ends: _Ends
    layers: list[_Layer]


class _Rows(NamedTuple):
    """The counts that rows and heads are split by."""

    prompts: int
    responses: int  # of all prompts together
    length: int
    heads: int


def _runs(weights: Sequence[Tensor]) -> list[_Run]:
    """Views of the weights [R, ...] of the ends and [R, layers, ...] of the layers, run by run."""
    ends, layers = weights[: len(_Ends._fields)], weights[len(_Ends._fields) :]
    depth = layers[0].shape[1]
    flat = [_Layer(*w) for w in zip(*(w.flatten(0, 1).unbind() for w in layers), strict=True)]
    return [
        _Run(_Ends(*w), flat[r * depth : (r + 1) * depth])
        for r, w in enumerate(zip(*(w.unbind() for w in ends), strict=True))
    ]


# --- forward ------------------------------------------------------------------------------------


@functools.cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@functools.cache
def _causal(length: int, dtype: torch.dtype) -> Tensor:
    """[T, 1, T - 1], 0 or -inf: the query of each position but the first sees no later key."""
    return torch.full((length, length - 1), -math.inf, dtype=dtype).tril(-2).unsqueeze(1)


def _norm(x: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows, and the means and inverse deviations of x."""
    return torch.native_layer_norm(x, gain.shape, gain, shift, EPS)


def _gelu(u: Tensor, slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """GELU by tanh, and its slope, which overwrites u.

    As u * sigmoid(y), y = 2 c (u + a u^3), which is the same function: with torch's own kernels
    value and slope take more than twice as long.
    """
    c, a = math.sqrt(2 / math.pi), 0.044715
    y = torch.addcmul(_constant(2 * c, u.dtype), u, u, value=2 * c * a).mul_(u)
    s = y.sigmoid() if slope else y.sigmoid_()
    value = u * s
    if not slope:
        return value, None
    third = y.sub_(u, alpha=4 * c / 3)  # u dy/du = 3 y - 4 c u
    _aten.sigmoid_backward.grad_input(third, s, grad_input=third)
    return value, torch.add(s, third, alpha=3, out=u)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T - 1, B, d] at keys and values [T, B, d] of B = responses * heads.

    Returns the values found [B, T - 1, d] and the probabilities, as [T, B, T - 1] and as
    [B, T, T - 1]. The softmax runs over the first axis, where it is vectorised: ten times faster
    than over short rows.
    """
    scores = torch.bmm(k.transpose(0, 1), q.permute(1, 2, 0))
    mask = _causal(len(k), q.dtype)
    p = torch.add(mask, scores.transpose(0, 1), alpha=q.shape[-1] ** -0.5).softmax(0)
    by_head = scores.copy_(p.transpose(0, 1))
    return torch.bmm(by_head.transpose(1, 2), v.transpose(0, 1)), p, by_head


def _layer(w: _Layer, x: Tensor, at: _Rows, tape: list[Any] | None) -> Tensor:
    """One layer on rows x [rows, D]; leaves on the tape what `_layer_back` needs."""
    n, size, width = at.prompts, at.responses, x.shape[1]
    heads = (-1, size * at.heads, width // at.heads)
    a, *a_stats = _norm(x, w.attend_gain, w.attend_shift)
    wq, wk, wv = w.attend.split(width, 1)
    bq, bk, bv = w.attend_bias.split(width)
    q = torch.addmm(bq, a[n:], wq).view(heads)
    kv = x.new_empty((2, at.length * size, width))
    torch.addmm(bk, a, wk, out=kv[0, size - n :])  # a prompt's row lands among its K copies
    torch.addmm(bv, a, wv, out=kv[1, size - n :])
    first = kv[:, size - n : size].clone()
    kv[:, :size].view(2, n, -1, width).copy_(first.unsqueeze(2))
    o, p, by_head = _attention(q, kv[0].view(heads), kv[1].view(heads))
    found = torch.empty_like(x)
    found[:n] = first[1]  # a prompt sees itself alone
    found[n:].view(heads).copy_(o.transpose(0, 1))
    y = torch.addmm(w.merge_bias, found, w.merge).add_(x)
    b, *b_stats = _norm(y, w.mlp_gain, w.mlp_shift)
    h, slope = _gelu(torch.addmm(w.up_bias, b, w.up), tape is not None)
    if tape is not None:
        tape.append((x, a, a_stats, q, kv, p, by_head, found, y, b, b_stats, h, slope))
    return torch.addmm(w.down_bias, h, w.down).add_(y)


def _table(
    run: _Run, prompt: Tensor, tokens: Tensor, heads: int, tape: list[Any] | None = None
) -> Tensor:
    """Log-probs [n + (T - 1) S, V] of every next token; prompt [n], tokens [n, K, T]."""
    w, (n, k, length) = run.ends, tokens.shape
    at = _Rows(n, n * k, length, heads)
    ids = torch.cat([prompt, tokens[..., :-1].permute(2, 0, 1).flatten()])
    x = w.token.index_select(0, ids)
    x[:n] += w.position[0]
    x[n:].view(length - 1, n * k, -1).add_(w.position[1:length].unsqueeze(1))
    for layer in run.layers:
        x = _layer(layer, x, at, tape)
    f, *stats = _norm(x, w.gain, w.shift)
    table = torch.mm(f, w.head).log_softmax(-1)
    if tape is not None:
        tape.append((at, ids, x, stats, f, table))
    return table


# --- backward -----------------------------------------------------------------------------------


def _linear_back(x: Tensor, w: Tensor, dy: Tensor, dw: Tensor, db: Tensor) -> Tensor:
    """Of y = x w + b: fills the gradients of w and b, returns that of x."""
    torch.mm(x.t(), dy, out=dw)
    torch.sum(dy, 0, out=db)
    return torch.mm(dy, w.t())


def _norm_back(
    x: Tensor, stats: list[Tensor], gain: Tensor, dy: Tensor, d_gain: Tensor, d_shift: Tensor
) -> Tensor:
    """Fills the gradients of gain and shift, returns that of x."""
    dx, dg, ds = _aten.native_layer_norm_backward(
        dy, x, gain.shape, *stats, gain, gain, [True, True, True]
    )
    d_gain.copy_(dg)
    d_shift.copy_(ds)
    return dx


def _attention_back(
    d_found: Tensor, q: Tensor, kv: Tensor, p: Tensor, by_head: Tensor, at: _Rows
) -> Tensor:
    """Gradient of queries, keys and values [rows, 3 D] from that of what attention found."""
    n, size, h, (rows, width) = at.prompts, at.responses, at.heads, d_found.shape
    d = width // h
    k, v = kv.view(2, -1, size * h, d).unbind()
    d_o = d_found[n:].view(-1, size * h, d)
    dp = torch.bmm(v.transpose(0, 1), d_o.permute(1, 2, 0))  # [B, T, T - 1]
    ds = _aten._softmax_backward_data(dp.transpose(0, 1).contiguous(), p, 0, p.dtype)
    ds = torch.mul(ds.transpose(0, 1), d**-0.5, out=dp)
    d_kv = dp.new_empty((2, size * h, at.length, d))
    torch.bmm(ds, q.transpose(0, 1), out=d_kv[0])
    torch.bmm(by_head, d_o.transpose(0, 1), out=d_kv[1])
    dq = torch.bmm(ds.transpose(1, 2), k.transpose(0, 1))  # [B, T - 1, d]
    found = dp.new_empty((rows, 3 * width))
    later, first = found[n:].view(-1, size, 3, h, d), found[:n].view(n, 3, h, d)
    later[:, :, 0] = dq.view(size, h, -1, d).permute(2, 0, 1, 3)
    later[:, :, 1:] = d_kv.view(2, size, h, -1, d)[:, :, :, 1:].permute(3, 1, 0, 2, 4)
    first[:, 0] = 0  # a prompt's query chose nothing; its key and value served all its responses
    first[:, 1:] = d_kv.view(2, n, -1, h, at.length, d)[..., 0, :].sum(2).transpose(0, 1)
    first[:, 2] += d_found[:n].view(n, h, d)
    return found


def _layer_back(w: _Layer, g: _Layer, dz: Tensor, at: _Rows, tape: tuple[Any, ...]) -> Tensor:
    """Fills the weights' gradients g and returns that of the layer's input."""
    x, a, a_stats, q, kv, p, by_head, found, y, b, b_stats, h, slope = tape
    du = _linear_back(h, w.down, dz, g.down, g.down_bias).mul_(slope)
    db = _linear_back(b, w.up, du, g.up, g.up_bias)
    dy = _norm_back(y, b_stats, w.mlp_gain, db, g.mlp_gain, g.mlp_shift).add_(dz)
    d_found = _linear_back(found, w.merge, dy, g.merge, g.merge_bias)
    d_qkv = _attention_back(d_found, q, kv, p, by_head, at)
    da = _linear_back(a, w.attend, d_qkv, g.attend, g.attend_bias)
    return _norm_back(x, a_stats, w.attend_gain, da, g.attend_gain, g.attend_shift).add_(dy)


def _back(run: _Run, grads: _Run, d_logp: Tensor, tokens: Tensor, tape: list[Any]) -> None:
    """Fills the gradients from that of the tokens' log-probs [n, K, T]; uses the tape up."""
    w, g, (n, k, length) = run.ends, grads.ends, tokens.shape
    at, ids, x, stats, f, table = tape.pop()
    d = torch.zeros_like(table)
    d[:n].scatter_add_(1, tokens[..., 0], d_logp[..., 0])
    later = d_logp[..., 1:].permute(2, 0, 1).reshape(-1, 1)
    d[n:].scatter_(1, tokens[..., 1:].permute(2, 0, 1).reshape(-1, 1), later)
    d = _aten._log_softmax_backward_data(d, table, 1, table.dtype)
    torch.mm(f.t(), d, out=g.head)
    dx = _norm_back(x, stats, w.gain, torch.mm(d, w.head.t()), g.gain, g.shift)
    for layer, grad in zip(reversed(run.layers), reversed(grads.layers), strict=True):
        dx = _layer_back(layer, grad, dx, at, tape.pop())
    g.token.zero_().index_add_(0, ids, dx)
    g.position.zero_()
    torch.sum(dx[:n], 0, out=g.position[0])
    torch.sum(dx[n:].view(length - 1, n * k, -1), 1, out=g.position[1:length])


# --- tokens -------------------------------------------------------------------------------------


def _spread(rows: Tensor, n: int, k: int) -> Tensor:
    """What belongs to each next-token distribution, [n + (T - 1) n K, ...], as [n, K, T, ...]."""
    first = rows[:n].view(n, 1, 1, *rows.shape[1:]).expand(n, k, 1, *rows.shape[1:])
    return torch.cat([first, rows[n:].view(-1, n, k, *rows.shape[1:]).movedim(0, 2)], 2)


def _of_tokens(table: Tensor, tokens: Tensor) -> Tensor:
    """The log-probs of the tokens [n, K, T]."""
    n, k, length = tokens.shape
    first = table[:n].gather(1, tokens[..., 0])
    later = table[n:].gather(1, tokens[..., 1:].permute(2, 0, 1).reshape(-1, 1))
    return torch.cat([first.unsqueeze(-1), later.view(length - 1, n, k).permute(1, 2, 0)], -1)


def _step(w: _Layer, x: Tensor, cache: Tensor) -> Tensor:
    """A layer at one position: x [S, D]; cache [t + 1, 3, h, d, S], the last for this position.

    Attends by plain products and sums: for one query a response they are quicker than a product
    of matrices.
    """
    a = _norm(x, w.attend_gain, w.attend_shift)[0]
    out = cache[-1].view(-1, len(x))
    torch.addmm(w.attend_bias.unsqueeze(1), w.attend.t(), a.t(), out=out)
    scores = (cache[-1, 0] * cache[:, 1]).sum(2, keepdim=True)
    p = scores.mul_(cache.shape[3] ** -0.5).softmax(0)
    found = (p * cache[:, 2]).sum(0).view(-1, len(x))
    y = torch.addmm(w.merge_bias, found.t(), w.merge).add_(x)
    b = _norm(y, w.mlp_gain, w.mlp_shift)[0]
    h, _ = _gelu(torch.addmm(w.up_bias, b, w.up))
    return torch.addmm(w.down_bias, h, w.down).add_(y)


def _draw(run: _Run, prompt: Tensor, uniforms: list[Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """Tokens [n, K, T] and their log-probs, from uniforms [n, K] for each token."""
    w, (n, k), width = run.ends, uniforms[0].shape, run.ends.token.shape[1]
    each = (3, heads, width // heads)
    shape = (len(run.layers), len(uniforms), *each, n * k)
    caches, ids = w.token.new_empty(shape).unbind(), prompt
    tokens, logp = [], []
    for t, u in enumerate(uniforms):
        x = w.token.index_select(0, ids).add_(w.position[t])
        for layer, cache in zip(run.layers, caches, strict=True):
            if t:
                x = _step(layer, x, cache[: t + 1])
            else:  # a prompt is one row, whose keys and values serve its K responses
                first = w.token.new_empty((1, *each, n))
                x = _step(layer, x, first)
                cache[0].view(*each, n, k).copy_(first[0].unsqueeze(-1))
        table = torch.mm(_norm(x, w.gain, w.shift)[0], w.head).log_softmax(-1)
        table = table.view(n, -1, table.shape[-1]).expand(n, k, -1)
        tokens.append(sample_index(table.exp(), u))
        logp.append(table.gather(-1, tokens[-1].unsqueeze(-1)).squeeze(-1))
        ids = tokens[-1].flatten()
    return torch.stack(tokens, -1), torch.stack(logp, -1)


class _Score(torch.autograd.Function):
    """Log-probs [R, n, K, T] of tokens and, where asked, the log collision of each distribution.

    The passes run in inference mode, which takes less time an operation; what they hand out is
    memory from outside it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        heads: int,
        collide: bool,
        learn: bool,
        prompt: Tensor,
        tokens: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logp = torch.empty(tokens.shape, dtype=weights[0].dtype)
        collision = torch.empty_like(logp if collide else logp[:0])
        ctx.tapes = [[] if learn else None for _ in tokens]
        with torch.inference_mode():
            for r, run in enumerate(_runs(weights)):
                table = _table(run, prompt[r], tokens[r], heads, ctx.tapes[r])
                logp[r] = _of_tokens(table, tokens[r])
                if collide:
                    collision[r] = _spread((2 * table).logsumexp(-1), *tokens.shape[1:3])
        ctx.save_for_backward(tokens, *weights)
        ctx.mark_non_differentiable(collision)
        return logp, collision

    @staticmethod
    @once_differentiable  # the tape carries no graph: a second derivative would be wrong
    def backward(ctx: Any, *d: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, *weights = ctx.saved_tensors
        grads = [torch.empty_like(w) for w in weights]
        with torch.inference_mode():
            for r, (run, places) in enumerate(zip(_runs(weights), _runs(grads), strict=True)):
                assert ctx.tapes[r], "this backward pass has run before"
                _back(run, places, d[0][r], tokens[r], ctx.tapes[r])
        return None, None, None, None, None, *grads


@functools.cache
def _shapes(vocab: int, length: int, layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of each weight of a run, in the order of `_Ends` and `_Layer`."""
    return {
        "token": (vocab, width),
        "position": (1 + length, width),
        "gain": (width,),
        "shift": (width,),
        "head": (width, vocab),
        "attend_gain": (layers, width),
        "attend_shift": (layers, width),
        "attend": (layers, width, 3 * width),
        "attend_bias": (layers, 3 * width),
        "merge": (layers, width, width),
        "merge_bias": (layers, width),
        "mlp_gain": (layers, width),
        "mlp_shift": (layers, width),
        "up": (layers, width, 4 * width),
        "up_bias": (layers, 4 * width),
        "down": (layers, 4 * width, width),
        "down_bias": (layers, width),
    }


class StackedTransformer:
    """R transformers of equal shape; see the module. A `Policy` with batch_shape (R,)."""

    exact_sampler = True

    def __init__(
        self,
        keys: Int[Tensor, " R"],
        *,
        vocab: int = 100,
        length: int = 9,
        layers: int = 3,
        heads: int = 3,
        width: int = 48,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            keys: of each run's first weights, which depend on nothing else.
            vocab: tokens; prompts and responses share them.
            length: tokens of a response.
        """
        assert width % (heads * LINE) == 0, f"a width of {width} is no multiple of {heads * LINE}"
        assert length >= 2, "responses of one token are for `Categorical`"
        keep_freed_memory()
        self.vocab, self.length, self.heads = vocab, length, heads
        self.batch_shape = (len(keys),)
        self._weights: dict[str, Tensor] = {}
        for number, (name, shape) in enumerate(_shapes(vocab, length, layers, width).items()):
            std = 0.02 / math.sqrt(2 * layers) if name in ("merge", "down") else 0.02
            if name.endswith(("gain", "shift", "bias")):
                first = torch.full((len(keys), *shape), float(name.endswith("gain")))
            else:
                index = torch.arange(math.prod(shape))
                drawn = [std * normal(key, number, index) for key in keys.unbind()]
                first = torch.stack(drawn).view(-1, *shape)
            self._weights[name] = first.to(dtype).requires_grad_(True)

    def _score(
        self, prompt: Tensor, tokens: Tensor, mask: Tensor, collide: bool
    ) -> dict[str, Tensor]:
        """Log-probs and, where asked, collisions; 0 where masked."""
        assert prompt.shape[-1] == 1, "a prompt is one token"
        assert tokens.shape[-1] == self.length, f"a response has {self.length} tokens"
        learn = torch.is_grad_enabled() and len(self.parameters()) > 0
        logp, collision = _Score.apply(  # type: ignore[misc]
            self.heads, collide, learn, prompt.squeeze(-1), tokens, *self._weights.values()
        )
        found = {"logp": logp, "collision": collision} if collide else {"logp": logp}
        return {name: torch.where(mask, x, 0.0) for name, x in found.items()}

    @torch.no_grad()
    def _tables(self, prompt: Tensor, tokens: Tensor) -> list[Tensor]:
        """Of each run: log-probs [n + (T - 1) n K, V] of every next token."""
        runs, first = _runs(list(self._weights.values())), prompt.squeeze(-1)
        return [_table(run, first[r], tokens[r], self.heads) for r, run in enumerate(runs)]

    def score(
        self,
        prompt: Int[Tensor, "R n 1"],
        prompt_mask: Bool[Tensor, "R n 1"],
        tokens: Int[Tensor, "R n K T"],
        mask: Bool[Tensor, "R n K T"],
    ) -> Float[Tensor, "R n K T"]:
        """See `Policy.score`."""
        return self._score(prompt, tokens, mask, False)["logp"]

    def outputs(self, samples: Samples, names: frozenset[str]) -> dict[str, Tensor]:
        """See `Trainable.outputs`."""
        assert names <= {"logp", "collision"}, f"this policy gives no {sorted(names)}"
        s = samples
        found = self._score(s.prompt, s.tokens, s.mask, "collision" in names)
        return {name: x for name, x in found.items() if name in names}

    def next_log_probs(
        self, prompt: Int[Tensor, "R n 1"], tokens: Int[Tensor, "R n K T"]
    ) -> Float[Tensor, "R n K T V"]:
        """The whole distribution before each token, without a gradient."""
        n, k = tokens.shape[1:3]
        return torch.stack([_spread(table, n, k) for table in self._tables(prompt, tokens)])

    @torch.no_grad()
    def sample(
        self,
        prompt: Int[Tensor, "R n 1"],
        prompt_mask: Bool[Tensor, "R n 1"],
        num_responses: int,
        uniform: Uniform,
        origin: int,
    ) -> Samples:
        """See `Policy.sample`. Keys and values of earlier positions are kept."""
        shape = (*prompt.shape[:2], num_responses)
        draws = [uniform(t, shape) for t in range(self.length)]
        tokens = torch.empty((*shape, self.length), dtype=torch.int64)
        logp = torch.empty(tokens.shape, dtype=self._weights["token"].dtype)
        row = prompt.squeeze(-1)
        with torch.inference_mode():
            for r, run in enumerate(_runs(list(self._weights.values()))):
                tokens[r], logp[r] = _draw(run, row[r], [u[r] for u in draws], self.heads)
        return Samples(
            prompt=prompt,
            prompt_mask=prompt_mask,
            tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            finished=torch.ones(shape, dtype=torch.bool),
            origin=torch.full(shape, origin),
            row=row,
            logp=logp,
        )

    @torch.no_grad()
    def step_kl(
        self, reference: "StackedTransformer", samples: Samples
    ) -> Float[Tensor, "R n K T"]:
        """See `Policy.step_kl`."""
        s = samples
        own, other = (policy._tables(s.prompt, s.tokens) for policy in (self, reference))
        kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(own, other, strict=True)]
        spread = torch.stack([_spread(x, *s.tokens.shape[1:3]) for x in kl])
        return torch.where(s.mask, spread, 0.0)

    def condition(
        self,
        prompt: Int[Tensor, "R n 1"],
        prompt_mask: Bool[Tensor, "R n 1"],
        good: Bool[Tensor, "R n"],
    ) -> tuple[Int[Tensor, "R n 1"], Bool[Tensor, "R n 1"]]:
        """See `Policy.condition`; a prompt of one token has no room for a control."""
        raise AssertionError("no controls")

    def parameters(self) -> list[Tensor]:
        """See `Policy.parameters`."""
        return [p for _, p in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """See `Policy.named_parameters`."""
        return [(n, p) for n, p in self.tensors() if p.requires_grad]

    def tensors(self) -> list[tuple[str, Tensor]]:
        """See `Policy.tensors`."""
        return list(self._weights.items())

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take these weights: of each run, or of one for all ([1, ...])."""
        for name, own in self.tensors():
            own.copy_(weights[name])

    def frozen_copy(self) -> "StackedTransformer":
        """See `Policy.frozen_copy`."""
        twin = copy.copy(self)
        twin._weights = {name: w.detach().clone() for name, w in self.tensors()}
        return twin

    @torch.no_grad()
    def follow(self, other: Any, decay: float) -> None:
        """See `Policy.follow`."""
        for (_, own), (_, theirs) in zip(self.tensors(), other.tensors(), strict=True):
            own.lerp_(theirs, 1 - decay)
