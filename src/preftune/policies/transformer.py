"""Any Hugging Face causal language model as a policy.

Dropout is off throughout (a reference with dropout blurs every log-ratio). Weights are float32, or
float64 for checks; where the processor is faster in bfloat16 the trunk computes in it by autocast,
and the head and everything after it stays in float32.
"""

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.numerics import token_kl, token_log_probs
from preftune.policies.packing import Layout, pack
from preftune.samples import Samples
from preftune.sampling.decoding import Decoding, Uniform
from preftune.sampling.local import generate

log = logging.getLogger("preftune")


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
    ) -> None:
        """
        Args:
            model: a causal language model, as transformers loads it.
            end_ids: token ids that end a response.
            decoding: how responses are drawn.
            autocast: compute dtype of the trunk; None computes in the weights' own.
            share_prefix: a prompt once for all of its responses; None decides by trying.
        """
        self.model = model.eval()
        self.end_ids = tuple(end_ids)
        self.decoding = decoding or Decoding()
        self.autocast = autocast
        self.exact_sampler = autocast is None
        self._whole_model = not self._same_from_parts()
        able = self._can_share()
        if share_prefix and not able:
            log.warning("share_prefix: this model's attention takes no 4-d mask; rows hold one response each")
        self.share_prefix = able if share_prefix is None else share_prefix and able

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def _amp(self) -> torch.autocast:
        enabled = self.autocast is not None
        return torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=enabled)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def _hidden(self, layout: Layout) -> Float[Tensor, "M D"]:
        """Last hidden state at each predicting position."""
        with self._amp():
            out = self.model.base_model(
                input_ids=layout.input_ids.to(self.device),
                attention_mask=layout.attention_mask.to(self.device),
                position_ids=layout.position_ids.to(self.device),
                use_cache=False,
            )
        return out.last_hidden_state.flatten(0, 1)[layout.predict.to(self.device)]

    def _logits(self, layout: Layout) -> Float[Tensor, "M V"]:
        """Logits at each predicting position, for models whose head does more than one product."""
        with self._amp():
            out = self.model(
                input_ids=layout.input_ids.to(self.device),
                attention_mask=layout.attention_mask.to(self.device),
                position_ids=layout.position_ids.to(self.device),
                use_cache=False,
            )
        return out.logits.flatten(0, 1)[layout.predict.to(self.device)]

    @torch.no_grad()
    def _same_from_parts(self) -> bool:
        """Whether trunk and output embedding alone give the model's logits (some scale or cap them)."""
        ids = torch.arange(1, 6, device=self.device)[None] % self.model.config.vocab_size
        whole = self.model(input_ids=ids, use_cache=False).logits.double()
        weight, bias = self._head()
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        parts = torch.nn.functional.linear(hidden, weight, bias).double()
        return parts.shape == whole.shape and torch.allclose(parts, whole, atol=1e-3, rtol=1e-3)

    @torch.no_grad()
    def _can_share(self) -> bool:
        """Whether two responses in one row behind a 4-d mask score as they do in rows of their own."""
        vocab = self.model.config.vocab_size
        prompt = torch.tensor([[3, 5, 7]]) % vocab
        tokens = torch.tensor([[[11, 13, 17, 19], [23, 29, 31, 37]]]) % vocab
        args = (prompt, torch.ones_like(prompt, dtype=torch.bool), tokens, torch.ones_like(tokens, dtype=torch.bool))
        scores = []
        for shared in (False, True):
            self.share_prefix = shared
            try:
                scores.append(self.score(*args))
            except (RuntimeError, ValueError, TypeError):
                return False
        return torch.allclose(scores[0], scores[1], atol=1e-3 if self.autocast is None else 0.1)

    def score(
        self,
        prompt: Int[Tensor, "n P"],
        prompt_mask: Bool[Tensor, "n P"],
        tokens: Int[Tensor, "n K T"],
        mask: Bool[Tensor, "n K T"],
    ) -> Float[Tensor, "n K T"]:
        """See `Policy.score`. Float32 at least; no padded position is ever computed into a sum."""
        layout = pack(prompt, prompt_mask, tokens, mask, shared=self.share_prefix)
        target = tokens[mask].to(self.device)
        if self._whole_model:
            logits = self._logits(layout)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            flat = wide.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        else:
            weight, bias = self._head()
            flat = token_log_probs(self._hidden(layout), weight, target, bias)
        # losses are formed on the CPU: a few numbers a response, wherever the model is
        return torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, flat.cpu())

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
        with self._amp():
            tokens, mask, finished, logp = generate(
                self.model, prompt, prompt_mask, num_responses, uniform, self.decoding, self.end_ids
            )
        return Samples(
            prompt=prompt,
            prompt_mask=prompt_mask,
            tokens=tokens,
            mask=mask,
            finished=finished,
            origin=torch.full(finished.shape, origin),
            row=torch.full((len(prompt),), -1),
            logp=logp.to(torch.promote_types(self.model.dtype, torch.float32)),
        )

    @torch.no_grad()
    def step_kl(self, reference: "Transformer", samples: Samples) -> Float[Tensor, "n K T"]:
        """See `Policy.step_kl`."""
        layout = pack(
            samples.prompt, samples.prompt_mask, samples.tokens, samples.mask, shared=self.share_prefix
        )
        if self._whole_model:
            logp, ref_logp = self._logits(layout).log_softmax(-1), reference._logits(layout).log_softmax(-1)
            flat = (logp.exp() * (logp - ref_logp)).sum(-1)
        else:
            flat = token_kl(self._hidden(layout), reference._hidden(layout), self._head(), reference._head())
        out = torch.zeros(samples.mask.shape, dtype=flat.dtype)
        return out.masked_scatter(samples.mask, flat.cpu())

    def parameters(self) -> Iterable[Tensor]:
        """See `Policy.parameters`."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """See `Policy.named_parameters`."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def frozen_copy(self) -> "Transformer":
        """See `Policy.frozen_copy`."""
        return self.with_model(copy.deepcopy(self.model))

    def with_model(self, model: Any) -> "Transformer":
        """The same settings around another model (a reference of the same kind), without gradients."""
        twin = copy.copy(self)
        twin.model = model.eval().requires_grad_(False)
        return twin
