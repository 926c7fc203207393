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

from preftune.huggingface import accepted
from preftune.numerics import token_kl, token_log_probs
from preftune.policies.capabilities import head_is_a_product, share_window
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
        self._whole_model = not head_is_a_product(model)
        self._window = share_window(model)
        able = share_prefix is not False and self._can_share()
        if share_prefix and not able:
            log.warning("share_prefix: not possible with this model; rows hold one response each")
        self.share_prefix = able

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

    def _forward(self, module: Any, layout: Layout) -> Any:
        inputs = {
            "input_ids": layout.input_ids.to(self.device),
            "attention_mask": layout.attention_mask.to(self.device),
            "position_ids": layout.position_ids.to(self.device),
            "use_cache": False,
        }
        with self._amp():
            return module(**accepted(module, inputs))

    def _hidden(self, layout: Layout) -> Float[Tensor, "M D"]:
        """Last hidden state at each predicting position."""
        out = self._forward(self.model.base_model, layout).last_hidden_state
        return out.flatten(0, 1)[layout.predict.to(self.device)]

    def _whole_log_probs(self, layout: Layout) -> Float[Tensor, "M V"]:
        """All log-probs at each predicting position, for heads that do more than one product."""
        out = self._forward(self.model, layout).logits
        logits = out.flatten(0, 1)[layout.predict.to(self.device)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _shares(self, prompt_mask: Tensor, mask: Tensor) -> bool:
        """Whether the responses of a prompt share a row."""
        longest = prompt_mask.sum(-1) + mask.sum(-1).amax(-1)
        return self.share_prefix and int(longest.max()) <= self._window

    @torch.no_grad()
    def _can_share(self) -> bool:
        """Whether two responses in one row score as they do in rows of their own."""
        vocab = self.model.config.get_text_config().vocab_size
        prompt = torch.tensor([[3, 5, 7]]) % vocab
        tokens = torch.tensor([[[11, 13, 17, 19], [23, 29, 31, 37]]]) % vocab
        if self._window < prompt.shape[-1] + tokens.shape[-1]:
            return False
        inputs = (prompt, torch.ones_like(prompt).bool(), tokens, torch.ones_like(tokens).bool())
        probe = copy.copy(self)
        probe.autocast = None  # its rounding would hide a wrong mask
        probe.share_prefix = False
        apart = probe.score(*inputs)
        probe.share_prefix = True
        try:
            together = probe.score(*inputs)
        except (RuntimeError, ValueError, TypeError):
            return False
        near = {torch.float64: 1e-8, torch.float32: 1e-3}.get(self.model.dtype, 0.1)
        return torch.allclose(apart, together, rtol=0.0, atol=near)

    def score(
        self,
        prompt: Int[Tensor, "n P"],
        prompt_mask: Bool[Tensor, "n P"],
        tokens: Int[Tensor, "n K T"],
        mask: Bool[Tensor, "n K T"],
    ) -> Float[Tensor, "n K T"]:
        """See `Policy.score`. Float32 at least; no padded position is ever computed into a sum."""
        shared = self._shares(prompt_mask, mask)
        layout = pack(prompt, prompt_mask, tokens, mask, shared=shared)
        target = tokens[mask].to(self.device)
        if self._whole_model:
            flat = self._whole_log_probs(layout).gather(-1, target[:, None]).squeeze(-1)
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
            drawn = generate(
                self.model, prompt, prompt_mask, num_responses, uniform, self.decoding, self.end_ids
            )
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

    @torch.no_grad()
    def step_kl(self, reference: "Transformer", samples: Samples) -> Float[Tensor, "n K T"]:
        """See `Policy.step_kl`."""
        s = samples
        shared = all(x._shares(s.prompt_mask, s.mask) for x in (self, reference))
        layout = pack(s.prompt, s.prompt_mask, s.tokens, s.mask, shared=shared)
        if self._whole_model or reference._whole_model:
            logp, ref_logp = self._whole_log_probs(layout), reference._whole_log_probs(layout)
            flat = (logp.exp() * (logp - ref_logp)).sum(-1)
        else:
            hidden, ref_hidden = self._hidden(layout), reference._hidden(layout)
            flat = token_kl(hidden, ref_hidden, self._head(), reference._head())
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
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).eval().requires_grad_(False)
        return twin

    def with_model(self, model: Any) -> "Transformer":
        """The same settings around another model, without gradients."""
        return Transformer(
            model.requires_grad_(False),
            end_ids=self.end_ids,
            decoding=self.decoding,
            autocast=self.autocast,
            share_prefix=None if self.share_prefix else False,
        )
