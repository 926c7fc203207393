"""Rows for a forward pass: which tokens stand in a row, and what each of them sees.

Every layout gives every response token the same context:

    shared   all responses of a prompt in one row, the prompt once; else each response has its own
    packed   the rows one after another in a single row without padding; else a row each, padded

Token ids are taken as they are, and the last token of a response is left out, since nothing is
predicted from it.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from preftune.policies.attention import tiles_of

PAD, PROMPT = -1, 0  # segments of a row; response j is segment j + 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a decoder is given, and where its answers are."""

    input_ids: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "B L"]
    attention_mask: Any
    """[B, 1, L, L] if rows are shared; tiles [1, 1, n, TILE] or a mask of blocks if they are
    packed; else [B, L], all True: padding stands behind what is read, so a causal model sees none
    of it, and attention needs no mask."""
    predict: Int[Tensor, " M"]
    """Flat position (in B x L) of the hidden state that predicts each response token, in the order
    of the response mask."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a prompt and its responses, padded on the right."""

    input_ids: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "B L"]
    segment: Int[Tensor, "B L"]
    prompt_len: Int[Tensor, " B"]
    start: Int[Tensor, "B J"]
    input_len: Int[Tensor, "B J"]
    predict: Int[Tensor, " M"]


def pack(
    prompt: Int[Tensor, "n P"],
    prompt_mask: Bool[Tensor, "n P"],
    tokens: Int[Tensor, "n K T"],
    mask: Bool[Tensor, "n K T"],
    *,
    shared: bool,
    packed: bool = False,
    device: torch.device | None = None,
) -> Layout:
    """Lay out prompts and responses; `predict` has one entry for each True of `mask`.

    Args:
        device: where a mask of blocks is made, for packed rows on an accelerator.
    """
    rows = _rows(prompt, prompt_mask, tokens, mask, shared)
    if packed:
        return _one_row(rows, device)
    seen = torch.ones_like(rows.segment, dtype=torch.bool)
    if shared and rows.start.shape[-1] > 1:
        seen = _dense_mask(rows.segment)
    return Layout(
        input_ids=rows.input_ids, position_ids=rows.position_ids, attention_mask=seen,
        predict=rows.predict,
    )  # fmt: skip


def _rows(prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor, shared: bool) -> _Rows:
    """A row for each prompt, or for each response."""
    n, k, width = tokens.shape
    if not shared:
        prompt, prompt_mask = prompt.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0)
        tokens, mask = tokens.reshape(n * k, 1, width), mask.reshape(n * k, 1, width)
    num_rows = len(tokens)
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
    return _Rows(
        input_ids, position_ids, segment, prompt_len, start, input_len, row * length + predict
    )


def _one_row(rows: _Rows, device: torch.device | None) -> Layout:
    """The rows one after another, padding left out."""
    kept = rows.segment != PAD
    place = kept.flatten().cumsum(0) - 1
    input_ids, position_ids = rows.input_ids[kept], rows.position_ids[kept]
    if device is None or device.type == "cpu":
        mask = _tiles(rows, kept.sum(-1))
    else:  # few different lengths: each is compiled anew
        row = torch.arange(len(kept))[:, None].expand_as(kept)[kept]
        end = bucket(len(input_ids)) - len(input_ids)
        input_ids, position_ids = (
            torch.nn.functional.pad(x, (0, end)) for x in (input_ids, position_ids)
        )
        segment = torch.nn.functional.pad(rows.segment[kept], (0, end), value=PAD)
        row = torch.cat([row, torch.arange(-end, 0)])  # what fills up sees itself alone
        mask = _blocks(segment.to(device), row.to(device))
    return Layout(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=mask,
        predict=place[rows.predict],
    )


def bucket(length: int) -> int:
    """The next of the lengths that are used: multiples of 128, of long ones a 32nd longer."""
    step = max(128, 1 << max(0, length.bit_length() - 6))
    return -(-length // step) * step


def _tiles(rows: _Rows, length: Tensor) -> Int[Tensor, "1 1 n 5"]:
    """What each run of queries sees, for `attention.packed_attention`."""
    offset = (length.cumsum(0) - length).tolist()
    each = zip(
        rows.prompt_len.tolist(), rows.start.tolist(), rows.input_len.tolist(), offset, strict=True
    )
    return torch.tensor([tile for row in each for tile in tiles_of(*row)])[None, None]


def _seen(query: Tensor, key: Tensor) -> Tensor:
    """The prompt and one's own response, wherever both segments are of one row."""
    return (key == PROMPT) | (key == query)


def _dense_mask(segment: Int[Tensor, "B L"]) -> Bool[Tensor, "B 1 L L"]:
    """Attend backwards; padding sees itself alone, since a row of the softmax without any entry is
    NaN."""
    length = segment.shape[-1]
    query, key = segment[:, :, None], segment[:, None, :]
    backwards = torch.ones(length, length, dtype=torch.bool).tril()
    seen = backwards & _seen(query, key) & (key != PAD)
    return (seen | torch.eye(length, dtype=torch.bool)).unsqueeze(1)


def _blocks(segment: Int[Tensor, " L"], row: Int[Tensor, " L"]) -> Any:
    """The same of rows one after another, as FlexAttention takes it."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (row[query] == row[key]) & (query >= key)
        return inside & _seen(segment[query], segment[key])

    length = len(segment)
    return _block_mask_maker(segment.device.type)(
        seen, None, None, length, length, device=str(segment.device)
    )


@functools.cache
def _block_mask_maker(device: str) -> Any:
    """FlexAttention's own; compiled on a GPU, since plainly it holds the whole dense mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask
