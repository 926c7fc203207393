"""Rows for a forward pass: a prompt once, its responses side by side, no padding inside a row.

Either layout gives every response token the same context: `shared` holds all responses of a prompt
in one row behind a 4-d attention mask; otherwise each response has a row of its own. Token ids are
taken as they are, and the last token of a response is left out, since nothing is predicted from it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PAD, PROMPT = -1, 0  # segments of a row; response j is segment j + 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a decoder is given, and where its answers are."""

    input_ids: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "B L"]
    attention_mask: Bool[Tensor, "..."]
    """[B, 1, L, L] if shared; else [B, L], all True: padding stands behind what is read, so a
    causal model sees none of it, and attention needs no mask."""
    predict: Int[Tensor, " M"]
    """Flat position (in B x L) of the hidden state that predicts each response token, in the order
    of the response mask."""


def pack(
    prompt: Int[Tensor, "n P"],
    prompt_mask: Bool[Tensor, "n P"],
    tokens: Int[Tensor, "n K T"],
    mask: Bool[Tensor, "n K T"],
    *,
    shared: bool,
) -> Layout:
    """Lay out prompts and responses; `predict` has one entry for each True of `mask`."""
    n, k, width = tokens.shape
    if not shared:
        prompt, prompt_mask = prompt.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0)
        tokens, mask = tokens.reshape(n * k, 1, width), mask.reshape(n * k, 1, width)
    num_rows, num_responses = tokens.shape[:2]
    prompt_len = prompt_mask.sum(-1)  # [B]
    input_len = (mask.sum(-1) - 1).clamp(min=0)  # [B, J]: without the last token
    start = prompt_len[:, None] + input_len.cumsum(-1) - input_len
    length = int((start[:, -1] + input_len[:, -1]).max())

    input_ids = torch.zeros(num_rows, length, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    segment = torch.full_like(input_ids, PAD)
    row, column = prompt_mask.nonzero(as_tuple=True)
    place = prompt_mask.cumsum(-1)[row, column] - 1
    input_ids[row, place] = prompt[row, column]
    position_ids[row, place] = place
    segment[row, place] = PROMPT

    row, response, step = mask.nonzero(as_tuple=True)
    last = step == input_len[row, response]
    predict = torch.where(
        step == 0, prompt_len[row] - 1, start[row, response] + step - 1
    )  # the first token is predicted from the end of the prompt
    fed_row, fed_response, fed_step = row[~last], response[~last], step[~last]
    place = start[fed_row, fed_response] + fed_step
    input_ids[fed_row, place] = tokens[fed_row, fed_response, fed_step]
    position_ids[fed_row, place] = prompt_len[fed_row] + fed_step
    segment[fed_row, place] = fed_response + 1

    return Layout(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=_block_mask(segment)
        if shared and num_responses > 1
        else torch.ones_like(segment, dtype=torch.bool),
        predict=row * length + predict,
    )


def _block_mask(segment: Int[Tensor, "B L"]) -> Bool[Tensor, "B 1 L L"]:
    """Attend backwards to the prompt and to one's own response; padding sees itself alone, since a
    row of the softmax without any entry is NaN."""
    length = segment.shape[-1]
    query, key = segment[:, :, None], segment[:, None, :]
    backwards = torch.ones(length, length, dtype=torch.bool).tril()
    seen = backwards & ((key == PROMPT) | (key == query)) & (key != PAD)
    return (seen | torch.eye(length, dtype=torch.bool)).unsqueeze(1)
