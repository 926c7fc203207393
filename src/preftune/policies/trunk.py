"""What a policy and a reward model share: a decoder, and how rows are put through it.

Dropout is off throughout (a reference with dropout blurs every log-ratio). Weights are float32, or
float64 for checks; where the processor is faster in bfloat16 the decoder computes in it by
autocast, and heads and everything after them stay in float32.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune import adapters
from preftune.errors import UserError
from preftune.huggingface import accepted
from preftune.policies.attention import NAME, register
from preftune.policies.blocks import compile_blocks, counting_kept
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
        self,
        model: Any,
        *,
        autocast: torch.dtype | None = None,
        share_prefix: bool | None = None,
        packing: bool | None = None,
    ) -> None:
        """
        Args:
            model: with a head for tokens or for scores, as transformers or peft gives it.
            autocast: compute dtype; None computes in the weights' own.
            share_prefix: a prompt once for all of its responses; None decides by trying.
            packing: rows one after another without padding; None decides by trying.
        """
        self.model = model.eval()
        self.autocast = autocast
        self.adapter_off = False
        """Compute with what the model had before training (the reference), not as it is trained."""
        self.kept: tuple[str, ...] = ()
        """Adapters that are on then; none is the base model alone."""
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UserError(
                "adapter: one that puts tokens before the prompt is not supported. Give LoRA or "
                "another that changes the weights."
            )
        self.compiled = self.narrowed = False
        self.through: Callable[[Callable[[], Any]], Any] = lambda compute: compute()
        """What calls passes with gradients; of weights that are spread over processes it gathers
        them (`preftune.policies.sharding`)."""
        self.to_come = 0
        """Bytes that the models of its run will still take of the free memory."""
        self.window = share_window(model)
        self.packing = packing is not False and self._can_pack()
        if packing and not self.packing:
            log.warning("packing: not possible with this model; rows are padded")
        able = share_prefix is not False and (self.packing or self._can_share())
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
        return adapters.is_adapted(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """Tokens that the model can take; None: it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def wide(self) -> torch.dtype:
        """Of heads and what they give: float32, or the weights' own where that is wider."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Under autocast; without gradient and the trained adapter where that is off."""
        enabled = self.autocast is not None
        amp = torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=enabled)
        if not self.adapter_off:
            with amp:
                yield
            return
        # peft takes gradients from the adapter while it is off, and then gives them to all of it
        trained = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with amp, torch.no_grad(), adapters.only(self.model, self.kept):
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

    def layout(
        self,
        prompt: Int[Tensor, "n P"],
        prompt_mask: Bool[Tensor, "n P"],
        tokens: Int[Tensor, "n K T"],
        mask: Bool[Tensor, "n K T"],
        *beside: "Trunk",
    ) -> Layout:
        """The rows of a forward pass, also that of trunks beside it."""
        longest = int((prompt_mask.sum(-1) + mask.sum(-1).amax(-1)).max())
        trunks = (self, *beside)
        fits = all(longest <= x.window for x in trunks)
        return pack(
            prompt, prompt_mask, tokens, mask,
            shared=fits and all(x.share_prefix for x in trunks),
            packed=fits and all(x.packing for x in trunks),
            device=self.device,
        )  # fmt: skip

    def without_adapter(self) -> "Trunk":
        """The same weights with the trained adapter off: what the model computes now.

        Adapters that are not trained stay on. Of a trained one that already changes the model, a
        frozen copy is kept, and is on.
        """
        if self.adapter_off:
            return copy.copy(self)
        bias = getattr(self.model.active_peft_config, "bias", "none")
        if bias != "none":
            raise UserError(
                f"adapter: bias '{bias}' trains weights of the base model, which is the reference. "
                "Set the adapter's bias to none."
            )
        twin = copy.copy(self)
        twin.adapter_off, twin.kept = True, adapters.untrained(self.model)
        if not torch.equal(twin.probe(), self.probe()):
            twin.kept = adapters.keep_copy(self.model)
        return twin

    def _in_use(self) -> tuple[str, ...]:
        """Names of the adapters that are on in a forward pass."""
        if not self.has_adapter:
            return ()
        return self.kept if self.adapter_off else tuple(self.model.active_adapters)

    def names_in_use(self) -> dict[str, str] | None:
        """The weights that a forward pass depends on, each by its name in a model without
        adapters; None: all, by their own names. Those of an adapter that is off are left out."""
        if not self.has_adapter:
            return None
        return adapters.names_beneath(self.model, self._in_use())

    def adapters_in_use(self) -> list[dict[str, Any]]:
        """Settings of the adapters that are on: as plain data that fixes what they compute."""
        return [adapters.described(self.model, name) for name in self._in_use()]

    def frozen_copy(self) -> "Trunk":
        """A copy with weights of its own, which are not trained."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).eval().requires_grad_(False)
        if self.compiled:  # which a copy is not
            twin.compile()
        return twin

    def narrow(self) -> None:
        """Keep the weights of products in the type in which autocast computes them: the same
        results bit for bit, half the memory, no cast at each pass. For weights that stay; those
        of adapters are left as they are, and DoRA needs the base's whole weights for their norm."""
        if self.autocast is None or self.has_adapter and adapters.takes_norms(self.model):
            return
        self.narrowed = True
        head = self.whole.get_output_embeddings()
        for name, module in self.model.named_modules():
            plain = type(module) is torch.nn.Linear and module is not head and "lora_" not in name
            if plain and not (self.has_adapter and module.weight.requires_grad):
                module.to(self.autocast)

    def compile(self) -> None:
        """Compile the model's blocks. Reference and policy are compiled alike: rounding differs."""
        self.compiled = True
        compile_blocks(self.whole.base_model)

    def uncompiled(self) -> Any:
        """A context in which blocks run as they are written: a sampler's caches would have every
        layer compiled by itself."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def activation_bytes(self) -> float:
        """Bytes that a training pass keeps for each token, weights left out: two short rows differ
        by so much."""
        kept, sizes = [], []
        vocab = self.model.config.get_text_config().vocab_size
        for size in (16, 48) if self.device.type == "cpu" else (128, 256):  # a bucket each
            ids = torch.arange(2, 2 + size)[None] % vocab
            ones = torch.ones_like(ids).bool()
            layout = self.layout(ids[:, :1], ones[:, :1], ids[:, None, 1:], ones[:, None, 1:])
            with counting_kept() as total, torch.enable_grad():
                self.hidden(layout)
            kept.append(total[0])
            sizes.append(layout.input_ids.numel())
        return (kept[1] - kept[0]) / (sizes[1] - sizes[0])

    @torch.no_grad()
    def probe(self, *, shared: bool = False, packed: bool = False) -> Float[Tensor, "M D"]:
        """Hidden states of two prompts with two short responses, in the weights' own precision."""
        vocab = self.model.config.get_text_config().vocab_size
        prompt, tokens = (torch.tensor(ids) % vocab for ids in _PROBE)
        layout = pack(
            prompt, torch.ones_like(prompt).bool(), tokens, torch.ones_like(tokens).bool(),
            shared=shared, packed=packed, device=self.device,
        )  # fmt: skip
        exact = copy.copy(self)
        if not self.narrowed:
            exact.autocast = None  # its rounding would hide a wrong mask
        return exact.hidden(layout).to(self.wide)

    def _can_share(self) -> bool:
        """Whether two responses in one row are read as they are in rows of their own."""
        return self._reads_alike(shared=True)

    def _can_pack(self) -> bool:
        """Whether rows one after another are read as they are by themselves. The model's attention
        becomes ours, which is `sdpa` for all but packed rows."""
        config = self.model.config
        before = getattr(config, "_attn_implementation", None)
        if self.window == 0 or self.model.dtype == torch.float16:
            return False
        register()
        config._attn_implementation = NAME
        if self._reads_alike(shared=True, packed=True) and self._reads_alike(packed=True):
            return True
        config._attn_implementation = before
        if self.device.type == "cuda":  # slower by far, and often for want of a compiler
            log.warning("packing: not possible here; rows are padded")
        return False

    def _reads_alike(self, **layout: bool) -> bool:
        """Whether a layout gives the hidden states that rows of one response each give."""
        if self.window < sum(len(ids[0]) for ids in (_PROBE[0], _PROBE[1][0])):
            return False
        try:
            apart, together = self.probe(), self.probe(**layout)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
            return False
        # the mean over positions may be large (some dimensions are nearly constant) and tells
        # nothing of the mask
        size = (apart - apart.mean(0)).norm(dim=-1).mean()
        off = (apart - together).norm(dim=-1).max()
        return bool(off <= _NEAR.get(self.model.dtype, _NEAR_HALF) * size)


_PROBE = (
    [[3, 5, 7], [41, 43, 47]],
    [[[11, 13, 17, 19], [23, 29, 31, 37]], [[53, 59, 61, 67], [71, 73, 79, 83]]],
)
"""Token ids of prompts [n, P] and of their responses [n, K, T]."""
