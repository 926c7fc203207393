"""Decoding with transformers' own cache: for any model, and the measure of the faster way."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from preftune.huggingface import accepted
from preftune.samples import pad_stack


class PlainDecoder:
    """Rows that begin together, each with keys and values of its own."""

    leave_share = 0.125
    """Finished rows are dropped once they make up this share: it copies the whole cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.rows = 0

    def running(self) -> AbstractContextManager[None]:
        """Nothing is asked of the model."""
        return nullcontext()

    def room(self, wanted: int) -> int:
        """Prompts that can enter now."""
        return 0 if self.rows else wanted

    def enter(self, prompts: list[Tensor], num_responses: int) -> Tensor:
        """Read prompts; logits [n, V] behind each, of which `num_responses` rows go on."""
        ids, seen = pad_stack(prompts, left=True)
        position = (seen.cumsum(-1) - 1).clamp(min=0)
        out = self._forward(None, input_ids=ids, attention_mask=seen, position_ids=position)
        self.cache = out.past_key_values
        self.cache.batch_repeat_interleave(num_responses)
        self.seen = seen.repeat_interleave(num_responses, 0)
        self.position = position[:, -1].repeat_interleave(num_responses, 0) + 1
        self.rows = len(self.seen)
        return out.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [R, V] behind one more token [R] of each row."""
        self.seen = torch.cat([self.seen, torch.ones(self.rows, 1, dtype=torch.bool)], -1)
        out = self._forward(
            self.cache, input_ids=tokens[:, None], attention_mask=self.seen,
            position_ids=self.position[:, None],
        )  # fmt: skip
        self.position = self.position + 1
        return out.logits[:, -1]

    def keep(self, stay: Tensor) -> None:
        """Only these rows go on."""
        self.rows = len(stay)
        if self.rows:
            self.cache.batch_select_indices(stay.to(self.device))
            self.seen, self.position = self.seen[stay], self.position[stay]

    def _forward(self, cache: Any, **inputs: Tensor) -> Any:
        """A forward pass of which the logits at the last position are wanted."""
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(**accepted(self.model, moved | options))
