"""Sampling with the model that is being trained: one prefill a prompt, finished rows leave.

A token is drawn by inverting the cumulative distribution at a uniform number that belongs to its
(prompt, response, position): the same sample comes out in any batch, up to rounding of the logits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.errors import GuardStop
from preftune.huggingface import accepted
from preftune.numerics import sample_index
from preftune.sampling.decoding import Decoding, Uniform

MAX_ROWS = 96
"""Sequences decoded together."""
_LEAVE_SHARE = 0.125
"""Finished rows are dropped from the cache once they make up this share (dropping copies it)."""


def probabilities(logits: Float[Tensor, "B V"], decoding: Decoding) -> Float[Tensor, "B V"]:
    """The distribution that is sampled: temperature (0 is greedy), then top-k, then top-p."""
    if decoding.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    logits = logits / decoding.temperature
    if decoding.top_k:
        least = logits.topk(min(decoding.top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if decoding.top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= decoding.top_p  # the first to pass top_p stays
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    return probs


class Drawn(NamedTuple):
    """Responses, padded on the right."""

    tokens: Int[Tensor, "n K T"]
    mask: Bool[Tensor, "n K T"]
    finished: Bool[Tensor, "n K"]
    logp: Float[Tensor, "n K T"]
    """Under the unmodified distribution, in float32 at least; 0 where masked."""


@torch.no_grad()
def generate(
    model: Any,
    prompt: Int[Tensor, "n P"],
    prompt_mask: Bool[Tensor, "n P"],
    num_responses: int,
    uniform: Uniform,
    decoding: Decoding,
    end_ids: Sequence[int],
) -> Drawn:
    """Draw responses to prompts that are padded on the left."""
    n = len(prompt)
    per_chunk = max(1, MAX_ROWS // num_responses)
    longest = decoding.max_new_tokens
    tokens = torch.zeros(n, num_responses, longest, dtype=torch.long)
    logp = torch.zeros(n, num_responses, longest, dtype=_wide(model.dtype))
    length = torch.zeros(n, num_responses, dtype=torch.long)
    finished = torch.zeros(n, num_responses, dtype=torch.bool)
    for start in range(0, n, per_chunk):
        rows = slice(start, min(start + per_chunk, n))
        keep = prompt_mask[rows].any(0)  # columns that are padding for the whole chunk go
        draw = _chunk(
            model, prompt[rows][:, keep], prompt_mask[rows][:, keep], num_responses,
            lambda t, rows=rows: uniform(t, (n, num_responses))[rows].reshape(-1),
            decoding, torch.tensor(end_ids),
        )  # fmt: skip
        shape = (-1, num_responses)
        tokens[rows], logp[rows] = draw[0].view(*shape, longest), draw[1].view(*shape, longest)
        length[rows], finished[rows] = draw[2].view(shape), draw[3].view(shape)
    width = max(1, int(length.max()))
    mask = torch.arange(width) < length.unsqueeze(-1)
    return Drawn(tokens[..., :width], mask, finished, torch.where(mask, logp[..., :width], 0.0))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _step(model: Any, device: torch.device, cache: Any = None, **inputs: Tensor) -> Any:
    """A forward pass of which the logits at the last position are wanted."""
    moved = {name: value.to(device) for name, value in inputs.items()}
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return model(**accepted(model, moved | options))


def _chunk(
    model: Any, prompt: Tensor, prompt_mask: Tensor, num_responses: int, uniform: Any,
    decoding: Decoding, end_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """tokens [B, T], log-probs [B, T], lengths [B], finished [B] for B = prompts x responses."""
    device = next(model.parameters()).device
    total, longest = len(prompt) * num_responses, decoding.max_new_tokens
    tokens = torch.zeros(total, longest, dtype=torch.long)
    logp = torch.zeros(total, longest, dtype=_wide(model.dtype))
    length = torch.full((total,), longest)
    finished = torch.zeros(total, dtype=torch.bool)

    position = (prompt_mask.cumsum(-1) - 1).clamp(min=0)
    out = _step(model, device, input_ids=prompt, attention_mask=prompt_mask, position_ids=position)
    cache = out.past_key_values
    cache.batch_repeat_interleave(num_responses)
    logits = out.logits[:, -1].repeat_interleave(num_responses, 0)
    seen = prompt_mask.repeat_interleave(num_responses, 0)
    position = position[:, -1].repeat_interleave(num_responses, 0) + 1
    active = torch.arange(total)  # rows still in the cache
    running = torch.ones(total, dtype=torch.bool)  # of those, the ones that have not ended

    for t in range(longest):
        wide = logits.to(_wide(logits.dtype)).cpu()
        choice = sample_index(probabilities(wide, decoding), uniform(t)[active])
        chosen_logp = wide.log_softmax(-1).gather(-1, choice[:, None]).squeeze(-1)
        if chosen_logp[running].isnan().any():
            raise GuardStop(
                "sampling: the model's logits are not numbers; the policy has diverged."
            )
        rows = active[running]
        tokens[rows, t], logp[rows, t] = choice[running], chosen_logp[running].to(logp)
        ended = running & torch.isin(choice, end_ids)
        length[active[ended]] = t + 1
        finished[active[ended]] = True
        running = running & ~ended
        if t + 1 == longest or not running.any():
            break
        if (~running).sum() >= _LEAVE_SHARE * len(active):
            stay = running.nonzero().squeeze(-1)
            cache.batch_select_indices(stay.to(device))
            active, choice, seen, position = active[stay], choice[stay], seen[stay], position[stay]
            running = running[stay]
        seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.bool)], -1)
        out = _step(
            model, device, cache, input_ids=choice[:, None], attention_mask=seen,
            position_ids=position[:, None],
        )  # fmt: skip
        logits, position = out.logits[:, -1], position + 1
    return tokens, logp, length, finished
