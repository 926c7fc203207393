"""Policies of a bandit laboratory: every response has the same few tokens, and all are enumerable.

A context is a state and the tokens so far. With S states, V tokens and responses of `depth` tokens
there are C = S * nodes contexts, nodes = 1 + V + ... + V^(depth - 1). That of state s before token
t, after the prefix a_0 ... a_{t-1}, has the index

    s * nodes + (1 + V + ... + V^(t-1)) + (a_0 ... a_{t-1} read as a number in base V)
"""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from preftune.policies.nets import Net, rows_of
from preftune.samples import Samples
from preftune.sampling.decoding import Uniform


def all_responses(vocab: int, depth: int) -> Int[Tensor, "A depth"]:
    """Every response, in the order of its number in base V: the first token counts most."""
    place = vocab ** torch.arange(depth - 1, -1, -1)
    return torch.arange(vocab**depth)[:, None] // place % vocab


def response_features(vocab: int, depth: int) -> Float[Tensor, "A F"]:
    """One-hots of each position's token and of each two neighbours, of every response."""
    one = F.one_hot(all_responses(vocab, depth), vocab).double()
    two = one[:, :-1, :, None] * one[:, 1:, None, :]
    return torch.cat([one.flatten(1), two.flatten(1)], -1)


def context_features(num_states: int, vocab: int, depth: int) -> Float[Tensor, "C F"]:
    """What a network sees of each context: one-hots of the state, of each earlier token or of its
    absence, and of the position: F = S + (depth - 1) (V + 1) + depth."""
    rows: list[Tensor] = []
    for t in range(depth):
        prefix = all_responses(vocab, t)
        absent = prefix.new_full((len(prefix), depth - 1 - t), vocab)
        seen = F.one_hot(torch.cat([prefix, absent], -1), vocab + 1).flatten(1)
        position = F.one_hot(torch.tensor(t), depth).expand(len(prefix), depth)
        rows.append(torch.cat([seen, position], -1))
    node = torch.cat(rows).repeat(num_states, 1)
    state = torch.eye(num_states).repeat_interleave(len(node) // num_states, 0)
    return torch.cat([state, node.to(state)], -1)


class Tree:
    """Responses of exactly `depth` tokens to states, from the logits of a net.

    A prompt is one token, the state. Tokens and states are trusted to be in range.
    """

    exact_sampler = True

    def __init__(self, net: Net, num_states: int, depth: int = 1) -> None:
        self.net, self.num_states, self.depth = net, num_states, depth
        self.vocab = net.vocab
        self.levels = [sum(self.vocab**i for i in range(t)) for t in range(depth)]
        """Where the contexts before each token start, within those of a state."""
        self.nodes = sum(self.vocab**t for t in range(depth))
        assert net.num_contexts == num_states * self.nodes, (
            f"{num_states} states have {num_states * self.nodes} contexts, not {net.num_contexts}"
        )
        self.batch_shape = net.batch_shape
        self._fixed: Tensor | None = None
        """Log-probs of all contexts, of a policy that takes no gradient."""

    def context_index(
        self, prompt: Int[Tensor, "*R n 1"], tokens: Int[Tensor, "*R n K T"]
    ) -> Int[Tensor, "*R n K T"]:
        """The context before each token: see the head of this module."""
        base = (prompt * self.nodes).expand(tokens.shape[:-1])
        prefix, index = torch.zeros_like(base), []
        for t in range(tokens.shape[-1]):
            index.append(base + self.levels[t] + prefix)
            prefix = prefix * self.vocab + tokens[..., t]
        return torch.stack(index, -1)

    def _takes_all(self, n: int, k: int) -> bool:
        """All contexts together are no more than those of n prompts with k responses each.

        By shapes alone: what a run computes may not depend on what it drew, nor on other runs.
        """
        needed = n * (1 + k * (self.depth - 1))
        return needed * self.net.spare >= self.net.num_contexts

    def _needed(
        self, prompt: Int[Tensor, "*R n 1"], tokens: Int[Tensor, "*R n K T"]
    ) -> tuple[Int[Tensor, "*R m"] | None, Int[Tensor, "*R n K T"]]:
        """The m contexts that stand before the tokens (None: all), and where among them each is.

        The responses to a prompt share the context of their first token; it stands there once.
        """
        *runs, n, k, depth = tokens.shape
        assert depth == self.depth, f"responses have {self.depth} tokens, not {depth}"
        context = self.context_index(prompt, tokens)
        if self._takes_all(n, k):
            return None, context
        later = n * k * (depth - 1)
        first = prompt.squeeze(-1) * self.nodes
        needed = torch.cat([first, context[..., 1:].flatten(-3)], -1)
        number = torch.arange(n + later, device=tokens.device)
        shared = number[:n, None, None].expand(n, k, 1)
        place = torch.cat([shared, number[n:].view(n, k, depth - 1)], -1)
        return needed, place.expand(*runs, n, k, depth)

    def _all(self) -> Float[Tensor, "*R C V"]:
        """Log-probs in all contexts; of a frozen policy computed once."""
        if self._fixed is not None:
            return self._fixed
        logp = self.net.logits(None).log_softmax(-1)
        if not any(t.requires_grad for _, t in self.tensors()):
            self._fixed = logp
        return logp

    def _distributions(
        self, prompt: Int[Tensor, "*R n 1"], tokens: Int[Tensor, "*R n K T"]
    ) -> tuple[Float[Tensor, "*R m V"], Int[Tensor, "*R n K T"]]:
        """Log-probs in the needed contexts, and where among them stands the one of each token."""
        contexts, place = self._needed(prompt, tokens)
        if contexts is None:
            return self._all(), place
        return self.net.logits(contexts).log_softmax(-1), place

    def _chosen(
        self,
        logp: Float[Tensor, "*R m V"],
        place: Int[Tensor, "..."],
        tokens: Int[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """The log-prob of each token [*R, ...] in the context at its place, which may broadcast."""
        flat = (place * self.vocab + tokens).flatten(len(self.batch_shape))
        return logp.flatten(-2).gather(-1, flat).view(tokens.shape)

    def _logp(
        self, prompt: Int[Tensor, "*R n 1"], tokens: Int[Tensor, "*R n K T"]
    ) -> Float[Tensor, "*R n K T"]:
        """The log-prob of each token."""
        if not torch.is_grad_enabled() or not self.parameters():
            return self._chosen(*self._distributions(prompt, tokens), tokens)
        contexts, place = self._needed(prompt, tokens)
        flat = (place * self.vocab + tokens).flatten(len(self.batch_shape))
        return cast(Tensor, _Chosen.apply(self.net.logits(contexts), flat)).view(tokens.shape)

    def score(
        self,
        prompt: Int[Tensor, "*R n 1"],
        prompt_mask: Bool[Tensor, "*R n 1"],
        tokens: Int[Tensor, "*R n K T"],
        mask: Bool[Tensor, "*R n K T"],
    ) -> Float[Tensor, "*R n K T"]:
        """See `Policy.score`."""
        return torch.where(mask, self._logp(prompt, tokens), 0.0)

    def outputs(self, samples: Samples, names: frozenset[str]) -> dict[str, Tensor]:
        """See `Trainable.outputs`; `logp` and `collision` alone."""
        s, found = samples, {}
        if "logp" in names:
            found["logp"] = self.score(s.prompt, s.prompt_mask, s.tokens, s.mask)
        if "collision" in names:
            with torch.no_grad():
                logp, place = self._distributions(s.prompt, s.tokens)
                collision = torch.logsumexp(2 * logp, -1)
            found["collision"] = torch.where(s.mask, _at(collision, place), 0.0)
        return found

    def _cumulative(self, contexts: Int[Tensor, "*R m"] | None) -> tuple[Tensor, Tensor]:
        """Log-probs in these contexts, and the cumulative sums that `sample_index` inverts."""
        logp = self.net.logits(contexts).log_softmax(-1)
        return logp, logp.exp().to(torch.float64).cumsum(-1)

    @torch.no_grad()
    def sample(
        self,
        prompt: Int[Tensor, "*R n 1"],
        prompt_mask: Bool[Tensor, "*R n 1"],
        num_responses: int,
        uniform: Uniform,
        origin: int,
    ) -> Samples:
        """See `Policy.sample`."""
        n = prompt.shape[-2]
        shape = (*prompt.shape[:-1], num_responses)
        table = self._cumulative(None) if self._takes_all(n, num_responses) else None
        prefix, drawn, scores = torch.zeros_like(prompt), [], []
        for t, level in enumerate(self.levels):
            place = prompt * self.nodes + level + prefix  # [*R, n, 1], after t = 0 [*R, n, K]
            contexts = place.flatten(-2)
            if table is not None:
                logp, cdf = table[0], rows_of(table[1], contexts)
            else:
                logp, cdf = self._cumulative(contexts)
                place = torch.arange(cdf.shape[-2], device=prompt.device).view(place.shape[-2:])
            u = uniform(t, shape).reshape(*contexts.shape, -1)
            drawn.append(invert(cdf, u).view(shape))
            scores.append(self._chosen(logp, place, drawn[-1]))
            prefix = prefix * self.vocab + drawn[-1]
        tokens = torch.stack(drawn, -1)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=tokens, mask=mask,
            finished=mask[..., 0], origin=torch.full_like(tokens[..., 0], origin),
            row=prompt.squeeze(-1), logp=torch.stack(scores, -1),
        )  # fmt: skip

    @torch.no_grad()
    def step_kl(self, reference: "Tree", samples: Samples) -> Float[Tensor, "*R n K T"]:
        """See `Policy.step_kl`."""
        logp, place = self._distributions(samples.prompt, samples.tokens)
        ref_logp, _ = reference._distributions(samples.prompt, samples.tokens)
        return _at((logp.exp() * (logp - ref_logp)).sum(-1), place)

    def log_joint(self) -> Float[Tensor, "*R S A"]:
        """Log-probs of every response in every state, in the order of `all_responses`."""
        logp = self.net.logits(None).log_softmax(-1).unflatten(-2, (self.num_states, self.nodes))
        joint = logp[..., 0, :]
        for t, level in enumerate(self.levels[1:], 1):
            step = logp[..., level : level + self.vocab**t, :]
            joint = (joint.unsqueeze(-1) + step).flatten(-2)
        return joint

    def condition(
        self,
        prompt: Int[Tensor, "*R n 1"],
        prompt_mask: Bool[Tensor, "*R n 1"],
        good: Bool[Tensor, "*R n"],
    ) -> tuple[Int[Tensor, "*R n 1"], Bool[Tensor, "*R n 1"]]:
        """See `Policy.condition`."""
        raise AssertionError("a tree has no controls")

    def parameters(self) -> list[Tensor]:
        """See `Policy.parameters`."""
        return [p for _, p in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """See `Policy.named_parameters`."""
        return [(n, p) for n, p in self.tensors() if p.requires_grad]

    def tensors(self) -> list[tuple[str, Tensor]]:
        """See `Policy.tensors`."""
        return self.net.tensors()

    def frozen_copy(self) -> "Tree":
        """See `Policy.frozen_copy`."""
        return Tree(self.net.copy(), self.num_states, self.depth)

    @torch.no_grad()
    def follow(self, other: Any, decay: float) -> None:
        """See `Policy.follow`."""
        for (_, own), (_, new) in zip(self.tensors(), other.tensors(), strict=True):
            own.lerp_(new, 1 - decay)
        self._fixed = None


class _Chosen(torch.autograd.Function):
    """log softmax(logits)[chosen], with a backward pass that writes the gradient once, where
    autograd would first make a dense gradient of all log-probs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, flat: Tensor) -> Tensor:
        """logits [*R, m, V]; flat [*R, j]: context * V + token."""
        logp = logits.log_softmax(-1)  # as without a gradient: log-ratios start at exactly 0
        ctx.save_for_backward(logp, flat)
        return logp.flatten(-2).gather(-1, flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        logp, flat = ctx.saved_tensors
        rows = torch.div(flat, logp.shape[-1], rounding_mode="floor")
        total = torch.zeros(logp.shape[:-1], dtype=logp.dtype).scatter_add_(-1, rows, grads[0])
        # d logp / d logits = onehot - softmax, in the memory of the log-probs: a graph is used once
        found = logp.exp_().mul_(-total.unsqueeze(-1))
        found.flatten(-2).scatter_add_(-1, flat, grads[0])
        return found, None


def _at(values: Float[Tensor, "*R m"], place: Int[Tensor, "*R n K T"]) -> Float[Tensor, "*R n K T"]:
    """A value of each context at the places of tokens."""
    return values.gather(-1, place.flatten(-3)).view(place.shape)


def invert(cdf: Float[Tensor, "*R m V"], u: Float[Tensor, "*R m q"]) -> Int[Tensor, "*R m q"]:
    """`sample_index` with several draws from each distribution, which is not repeated for them."""
    found = torch.searchsorted(cdf, (u.to(cdf) * cdf[..., -1:]).contiguous(), right=True)
    return found.clamp_(max=cdf.shape[-1] - 1)
