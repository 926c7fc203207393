"""What a policy and a reward model share: a decoder, and how rows are put through it.

Dropout is off throughout (a reference with dropout blurs every log-ratio). Weights are float32, or
float64 for checks; where the processor is faster in bfloat16 the decoder computes in it by
autocast, and heads and everything after them stay in float32.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.errors import UserError
from preftune.huggingface import accepted
from preftune.policies.capabilities import share_window
from preftune.policies.packing import Layout, pack

log = logging.getLogger("preftune")
_NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far hidden states may differ between layouts, relative to how they differ between positions.
Some layers compute in float32 whatever the weights; a wrong mask shows by a tenth and more."""
_NEAR_HALF = 0.1


class Trunk:
    """A transformers model with a head, without its head."""

    def __init__(
        self, model: Any, *, autocast: torch.dtype | None = None, share_prefix: bool | None = None
    ) -> None:
        """
        Args:
            model: with a head for tokens or for scores, as transformers or peft gives it.
            autocast: compute dtype; None computes in the weights' own.
            share_prefix: a prompt once for all of its responses; None decides by trying.
        """
        self.model = model.eval()
        self.autocast = autocast
        self.adapter_off = False
        """Compute with the base weights alone, though the model has an adapter (the reference)."""
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UserError(
                "adapter: one that puts tokens before the prompt is not supported. Give LoRA or "
                "another that changes the weights."
            )
        self.window = share_window(model)
        able = share_prefix is not False and self._can_share()
        if share_prefix and not able:
            log.warning("share_prefix: not possible with this model; rows hold one response each")
        self.share_prefix = able

    @property
    def whole(self) -> Any:
        """The model with its head; an adapter's layers stand inside it."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """The model was wrapped by peft."""
        return hasattr(self.model, "disable_adapter")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def wide(self) -> torch.dtype:
        """Of heads and what they give: float32, or the weights' own where that is wider."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Under autocast, and without adapter and gradient where the adapter is off."""
        enabled = self.autocast is not None
        amp = torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=enabled)
        if not self.adapter_off:
            with amp:
                yield
            return
        # peft takes gradients from the adapter while it is off, and then gives them to all of it
        trained = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with amp, torch.no_grad(), self.model.disable_adapter():
                yield
        finally:
            for parameter, flag in trained:
                parameter.requires_grad_(flag)

    def forward(self, module: Any, layout: Layout, **options: Any) -> Any:
        """What `module`, the model or a part of it, gives for a layout."""
        inputs = {
            "input_ids": layout.input_ids.to(self.device),
            "attention_mask": layout.attention_mask.to(self.device),
            "position_ids": layout.position_ids.to(self.device),
            "use_cache": False,
        }
        with self.running():
            return module(**accepted(module, inputs), **options)

    def predicting(self, states: Float[Tensor, "B L E"], layout: Layout) -> Float[Tensor, "M E"]:
        """Those at the positions from which the layout predicts."""
        return states.flatten(0, 1)[layout.predict.to(self.device)]

    def hidden(self, layout: Layout) -> Float[Tensor, "M D"]:
        """Last hidden state at each predicting position."""
        return self.predicting(
            self.forward(self.whole.base_model, layout).last_hidden_state, layout
        )

    def one_number(self, head: Any, hidden: Float[Tensor, "M D"]) -> Float[Tensor, " M"]:
        """What a head with one output makes of each state, in float32 at least."""
        with torch.autocast(self.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.to(self.wide)
            states = hidden.to(self.wide)
            return torch.nn.functional.linear(states, head.weight.to(self.wide), bias).squeeze(-1)

    def shares(self, prompt_mask: Tensor, mask: Tensor) -> bool:
        """Whether the responses of a prompt share a row."""
        longest = prompt_mask.sum(-1) + mask.sum(-1).amax(-1)
        return self.share_prefix and int(longest.max()) <= self.window

    def without_adapter(self) -> "Trunk":
        """The same weights with the adapter off."""
        bias = getattr(self.model.active_peft_config, "bias", "none")
        if bias != "none":
            raise UserError(
                f"adapter: bias '{bias}' trains weights of the base model, which is the reference. "
                "Set the adapter's bias to none."
            )
        twin = copy.copy(self)
        twin.adapter_off = True
        return twin

    def frozen_copy(self) -> "Trunk":
        """A copy with weights of its own, which are not trained."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).eval().requires_grad_(False)
        return twin

    @torch.no_grad()
    def probe(self, *, shared: bool) -> Float[Tensor, "M D"]:
        """Hidden states of two short responses to one prompt, in the weights' own precision."""
        vocab = self.model.config.get_text_config().vocab_size
        prompt, tokens = (torch.tensor(ids) % vocab for ids in _PROBE)
        layout = pack(
            prompt, torch.ones_like(prompt).bool(), tokens, torch.ones_like(tokens).bool(),
            shared=shared,
        )  # fmt: skip
        exact = copy.copy(self)
        exact.autocast = None  # its rounding would hide a wrong mask
        return exact.hidden(layout).to(self.wide)

    def _can_share(self) -> bool:
        """Whether two responses in one row are read as they are in rows of their own."""
        if self.window < sum(len(ids[0]) for ids in (_PROBE[0], _PROBE[1][0])):
            return False
        try:
            apart, together = self.probe(shared=False), self.probe(shared=True)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            return False
        # the mean over positions may be large (some dimensions are nearly constant) and tells
        # nothing of the mask
        size = (apart - apart.mean(0)).norm(dim=-1).mean()
        off = (apart - together).norm(dim=-1).max()
        return bool(off <= _NEAR.get(self.model.dtype, _NEAR_HALF) * size)


_PROBE = ([[3, 5, 7]], [[[11, 13, 17, 19], [23, 29, 31, 37]]])
"""Token ids of a prompt [1, P] and of its responses [1, K, T]."""
