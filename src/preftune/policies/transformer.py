"""Any Hugging Face causal language model as a policy, with or without a value head."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.errors import UserError
from preftune.numerics import (
    next_token_moments,
    token_collision,
    token_kl,
    token_log_probs,
    token_surprisal,
    whole,
)
from preftune.policies.capabilities import head_is_a_product
from preftune.policies.packing import Layout
from preftune.policies.sharding import shard
from preftune.policies.trunk import Trunk
from preftune.samples import Samples, pad_stack
from preftune.sampling.decoding import Decoding, Uniform
from preftune.sampling.local import generate

OUTPUTS = frozenset({"logp", "value", "collision"})


class Transformer:
    """Scores and samples responses with a causal language model."""

    batch_shape: tuple[int, ...] = ()

    def __init__(
        self,
        model: Any,
        *,
        end_ids: Sequence[int],
        decoding: Decoding | None = None,
        autocast: torch.dtype | None = None,
        share_prefix: bool | None = None,
        packing: bool | None = None,
        value_head: bool = False,
        controls: tuple[Sequence[int], Sequence[int]] | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        """
        Args:
            model: a causal language model, as transformers or peft gives it.
            end_ids: token ids that end a response.
            decoding: how responses are drawn.
            autocast: compute dtype of the trunk; None computes in the weights' own.
            share_prefix: a prompt once for all of its responses; None decides by trying.
            packing: rows one after another without padding; None decides by trying.
            value_head: also estimate the reward before each response token, 0 to begin with.
            controls: token ids that ask for a bad and for a good response.
            decode: the text of token ids, for `decoding`'s stop strings.
        """
        self.trunk = Trunk(model, autocast=autocast, share_prefix=share_prefix, packing=packing)
        self.end_ids = tuple(end_ids)
        self.decoding = decoding or Decoding()
        self.controls = controls
        self.decode = decode
        self.exact_sampler = autocast is None
        self._whole_model = not head_is_a_product(self.trunk.whole)
        self.value_head = self._new_value_head() if value_head else None

    @property
    def model(self) -> Any:
        """The causal language model."""
        return self.trunk.model

    @property
    def autocast(self) -> torch.dtype | None:
        """Compute dtype of the trunk; None is the weights' own."""
        return self.trunk.autocast

    @property
    def share_prefix(self) -> bool:
        """A prompt is computed once for all of its responses, where they fit."""
        return self.trunk.share_prefix

    @property
    def packing(self) -> bool:
        """Rows stand one after another without padding, where they fit."""
        return self.trunk.packing

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.trunk.device

    def _new_value_head(self) -> torch.nn.Linear:
        """Value 0 everywhere; where the hidden state stands in its forward says how wide it is."""
        width = self.trunk.probe().shape[-1]
        head = torch.nn.Linear(width, 1, device=self.device, dtype=self.trunk.wide)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        return head

    def _head(self) -> tuple[Tensor, Tensor | None]:
        head = self.trunk.whole.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def _whole_log_probs(
        self, layout: Layout, *, hidden: bool = False
    ) -> tuple[Float[Tensor, "M V"], Float[Tensor, "M D"] | None]:
        """All log-probs, for heads that do more than one product, and the last hidden state."""
        out = self.trunk.forward(self.trunk.whole, layout, output_hidden_states=hidden)
        logits = self.trunk.predicting(out.logits, layout)
        states = self.trunk.predicting(out.hidden_states[-1], layout) if hidden else None
        return logits.to(self.trunk.wide).log_softmax(-1), states

    def _outputs(
        self, prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor,
        names: frozenset[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        """`outputs`, of tensors. No padded position is ever computed into a sum."""
        assert names <= OUTPUTS, f"a language model gives no {', '.join(sorted(names - OUTPUTS))}"
        layout = self.trunk.layout(prompt, prompt_mask, tokens, mask)
        target = tokens[mask].to(self.device)
        flat = self.trunk.through(lambda: self._flat(layout, target, names))
        # losses are formed on the CPU: a few numbers a response, wherever the model is
        return {
            name: torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, x.cpu())
            for name, x in flat.items()
        }

    def _flat(self, layout: Layout, target: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
        """Each of the named outputs at the layout's predicting positions, [M]."""
        flat: dict[str, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and names != {"collision"}):
            if self._whole_model:
                table, hidden = self._whole_log_probs(layout, hidden="value" in names)
                if "logp" in names:
                    flat["logp"] = table.gather(-1, target[:, None]).squeeze(-1)
                if "collision" in names:
                    flat["collision"] = (2 * table.detach()).logsumexp(-1)
            else:
                hidden = self.trunk.hidden(layout)
                weight, bias = self._head()
                if "logp" in names:
                    flat["logp"] = token_log_probs(hidden, weight, target, bias, self.autocast)
                if "collision" in names:
                    flat["collision"] = token_collision(hidden, weight, bias)
            if "value" in names:
                assert self.value_head is not None, "this policy was built without a value head"
                assert hidden is not None, "asked for above"
                flat["value"] = self.trunk.one_number(self.value_head, hidden)
        return flat

    def outputs(self, samples: Samples, names: frozenset[str]) -> dict[str, Tensor]:
        """See `Trainable.outputs`: of logp, value and collision, each [n, K, T], those named.

        Float32 at least. The gradient of `value` reaches the trunk as that of `logp` does.
        """
        s = samples
        return self._outputs(s.prompt, s.prompt_mask, s.tokens, s.mask, names)

    def score(
        self,
        prompt: Int[Tensor, "n P"],
        prompt_mask: Bool[Tensor, "n P"],
        tokens: Int[Tensor, "n K T"],
        mask: Bool[Tensor, "n K T"],
    ) -> Float[Tensor, "n K T"]:
        """See `Policy.score`. Float32 at least."""
        return self._outputs(prompt, prompt_mask, tokens, mask, frozenset({"logp"}))["logp"]

    @torch.no_grad()
    def sample(
        self,
        prompt: Int[Tensor, "n P"],
        prompt_mask: Bool[Tensor, "n P"],
        num_responses: int,
        uniform: Uniform,
        origin: int,
    ) -> Samples:
        """See `Policy.sample`. Token ids are kept as drawn, never decoded and tokenised again."""
        with self.trunk.running(), self.trunk.uncompiled():
            drawn = generate(
                self.trunk.whole, prompt, prompt_mask, num_responses, uniform, self.decoding,
                self.end_ids, window=self.trunk.window, decode=self.decode,
            )  # fmt: skip
        return Samples(
            prompt=prompt,
            prompt_mask=prompt_mask,
            tokens=drawn.tokens,
            mask=drawn.mask,
            finished=drawn.finished,
            origin=torch.full(drawn.finished.shape, origin),
            row=torch.full((len(prompt),), -1),
            logp=drawn.logp,
        )

    def condition(
        self,
        prompt: Int[Tensor, "n P"],
        prompt_mask: Bool[Tensor, "n P"],
        good: Bool[Tensor, " n"],
    ) -> tuple[Int[Tensor, "n P2"], Bool[Tensor, "n P2"]]:
        """See `Policy.condition`: the control ids stand at the end of each prompt."""
        assert self.controls is not None, "this policy was built without control tokens"
        controls = [torch.tensor(list(ids), dtype=prompt.dtype) for ids in self.controls]
        rows = zip(prompt, prompt_mask, good.tolist(), strict=True)
        return pad_stack([torch.cat([p[m], controls[int(g)]]) for p, m, g in rows], left=True)

    @torch.no_grad()
    def step_kl(self, reference: "Transformer", samples: Samples) -> Float[Tensor, "n K T"]:
        """See `Policy.step_kl`."""
        s = samples
        layout = self.trunk.layout(s.prompt, s.prompt_mask, s.tokens, s.mask, reference.trunk)
        if self._whole_model or reference._whole_model:
            logp, ref_logp = (x._whole_log_probs(layout)[0] for x in (self, reference))
            flat = (logp.exp() * (logp - ref_logp)).sum(-1)
        else:
            hidden, ref_hidden = self.trunk.hidden(layout), reference.trunk.hidden(layout)
            flat = token_kl(hidden, ref_hidden, self._head(), reference._head())
        out = torch.zeros(samples.mask.shape, dtype=flat.dtype)
        return out.masked_scatter(samples.mask, flat.cpu())

    @torch.no_grad()
    def survey(self, samples: Samples) -> dict[str, Tensor]:
        """What diagnosis reads off one forward pass.

        logp, entropy, variance   [n, K, T]  of each token: its log-prob, and mean and variance of
                                             -log p over the distribution that it was drawn from
        hidden                    [n, K, D]  sum of the last hidden states that predict the tokens
        """
        s = samples
        layout = self.trunk.layout(s.prompt, s.prompt_mask, s.tokens, s.mask)
        target = s.tokens[s.mask].to(self.device)
        if self._whole_model:
            table, hidden = self._whole_log_probs(layout, hidden=True)
            assert hidden is not None, "asked for"
            picked = table.gather(-1, target[:, None]).squeeze(-1)
            moments = (picked, *next_token_moments(table))
        else:
            hidden = self.trunk.hidden(layout)
            weight, bias = self._head()
            moments = token_surprisal(hidden, weight, target, bias)
        named = zip(("logp", "entropy", "variance"), moments, strict=True)
        out = {
            name: torch.zeros(s.mask.shape, dtype=x.dtype).masked_scatter(s.mask, x.cpu())
            for name, x in named
        }
        owner = s.mask.nonzero() @ torch.tensor([s.mask.shape[1], 1, 0])  # n * K + k of each token
        wide = hidden.float().cpu()
        sums = torch.zeros(s.mask[..., 0].numel(), wide.shape[-1]).index_add(0, owner, wide)
        return out | {"hidden": sums.view(*s.mask.shape[:2], -1)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Policy.tensors`: the model's weights, tied ones once, then the value head's."""
        yield from self.model.named_parameters()
        if self.value_head is not None:
            yield from self.value_head.named_parameters(prefix="value_head")

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """See `Policy.named_parameters`: the model's, by its own names, then the value head's."""
        if self.trunk.adapter_off:  # they are the policy's
            return ()
        return ((name, p) for name, p in self.tensors() if p.requires_grad)

    def parameters(self) -> Iterable[Tensor]:
        """See `Policy.parameters`."""
        return (p for _, p in self.named_parameters())

    def frozen_copy(self) -> "Transformer":
        """See `Policy.frozen_copy`; it has no value head.

        Of a model with an adapter it shares the weights: the base model's, and an earlier adapter's
        where there is one, with the trained adapter off in every forward pass.
        """
        twin = copy.copy(self)
        twin.value_head = None
        if not self.trunk.has_adapter:
            twin.trunk = self.trunk.frozen_copy()
            return twin
        twin.trunk = self.trunk.without_adapter()
        return twin

    @torch.no_grad()
    def follow(self, other: Any, decay: float) -> None:
        """See `Policy.follow`; `other` has the same architecture."""
        if self.trunk.adapter_off:
            raise UserError(
                "reference_update needs a reference with weights of its own: beside an adapter it "
                "is the model with the adapter off. Set reference_update to fixed."
            )
        own, theirs = dict(self.tensors()), dict(other.tensors())
        differing = [n for n, x in own.items() if n not in theirs or theirs[n].shape != x.shape]
        if differing:
            raise UserError(
                f"reference_update needs a reference of the model's own architecture; "
                f"'{differing[0]}' differs. Set reference_update to fixed."
            )
        for name, tensor in own.items():
            tensor.lerp_(whole(theirs[name]).to(tensor), 1 - decay)

    def shard(self, size: int) -> None:
        """Spread the weights over so many processes."""
        shard(self.trunk, [] if self.value_head is None else [self.value_head], size)

    def with_model(self, model: Any) -> "Transformer":
        """The same settings around another model, without gradients and value head."""
        return Transformer(
            model.requires_grad_(False),
            end_ids=self.end_ids,
            decoding=self.decoding,
            autocast=self.autocast,
            share_prefix=None if self.share_prefix else False,
            packing=None if self.packing else False,
            controls=self.controls,
            decode=self.decode,
        )
