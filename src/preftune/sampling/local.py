"""Sampling with the model that is being trained.

A prompt is read once for all of its responses; finished rows leave, and waiting prompts enter. A
token is drawn by inverting the cumulative distribution at a uniform number that belongs to its
(prompt, response, position): the same sample comes out in any batch, up to rounding of the logits.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.errors import GuardStop
from preftune.numerics import keep_freed_memory
from preftune.phases import phase
from preftune.sampling.choosing import choose
from preftune.sampling.decoding import Decoding, Uniform
from preftune.sampling.plain import PlainDecoder
from preftune.sampling.shared import SharedDecoder
from preftune.sampling.weights import working_copy

log = logging.getLogger("preftune")
MAX_ROWS = 128
"""Sequences decoded together."""
_ENTER_SHARE = 0.25
"""Prompts enter once so many rows are free: few at a time are read slowly."""
Decode = Callable[[list[int]], str]
"""The text of token ids."""


class Drawn(NamedTuple):
    """Responses, padded on the right."""

    tokens: Int[Tensor, "n K T"]
    mask: Bool[Tensor, "n K T"]
    finished: Bool[Tensor, "n K"]
    logp: Float[Tensor, "n K T"]
    """Under the unmodified distribution, in float32 at least; 0 where masked."""
    sampled_logp: Float[Tensor, "n K T"]
    """Under the distribution that was sampled: temperature, top-p, top-k, least length."""


@runtime_checkable
class Decoder(Protocol):
    """What puts tokens through a model; rows keep the order in which they entered."""

    leave_share: float
    """Finished rows are taken out once they make up more than this share."""

    def running(self) -> Any:
        """A context in which the others are called."""
        ...

    def room(self, wanted: int) -> int:
        """Prompts that can enter now, at most as many as wanted."""
        ...

    def enter(self, prompts: list[Tensor], num_responses: int) -> Tensor:
        """Read prompts; logits [n, V] behind each. Each stands for `num_responses` new rows."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [R, V] behind one more token of each row."""
        ...

    def keep(self, stay: Tensor) -> None:
        """Only the rows at these places go on."""
        ...


@torch.no_grad()
def generate(
    model: Any,
    prompt: Int[Tensor, "n P"],
    prompt_mask: Bool[Tensor, "n P"],
    num_responses: int,
    uniform: Uniform,
    decoding: Decoding,
    end_ids: Sequence[int],
    *,
    window: int = 0,
    decode: Decode | None = None,
) -> Drawn:
    """Draw responses to prompts that are padded on the left.

    Args:
        window: tokens of a prompt with a response up to which each sees all before it, so that
            the prompt may be shared; 0 where the model is not one of that kind.
        decode: text of token ids, for stop strings.
    """
    assert decode is not None or not decoding.stop, "stop strings need a way to decode"
    keep_freed_memory()
    prompts = [ids[mask].cpu() for ids, mask in zip(prompt, prompt_mask, strict=True)]
    longest = max(map(len, prompts))
    responses = _Responses(
        len(prompts), num_responses, uniform, decoding, end_ids, decode,
        torch.promote_types(model.dtype, torch.float32),
    )  # fmt: skip
    decoder: Decoder
    if longest + decoding.max_new_tokens <= window and can_share(model):
        decoder = SharedDecoder(
            model, num_responses=num_responses,
            max_rows=min(MAX_ROWS, len(prompts) * num_responses),  # a fixed grid holds no more
            prompt=longest, longest=decoding.max_new_tokens,
        )  # fmt: skip
    else:
        decoder = PlainDecoder(model)
    with working_copy(model), decoder.running():
        _run(decoder, prompts, responses)
    return responses.drawn()


def _run(decoder: Decoder, prompts: list[Tensor], responses: "_Responses") -> None:
    """Decode until every prompt has its responses."""
    k = responses.per_prompt
    entered = 0
    rows = torch.zeros(0, dtype=torch.long)  # responses that are decoded, by their number
    tokens = torch.zeros(0, dtype=torch.long)  # the last of each
    while entered < len(prompts) or len(rows):
        number = _entering(decoder, len(prompts) - entered, len(rows), k)
        if number:
            new = prompts[entered : entered + number]
            with phase("prefill", sum(map(len, new))):
                logits = decoder.enter(new, k)
                fresh = torch.arange(entered * k, (entered + number) * k)
                rows = torch.cat([rows, fresh])
                tokens = torch.cat([tokens, responses.add(logits, fresh, k)])
            entered += number
        else:
            with phase("decode", len(rows)):
                tokens = responses.add(decoder.step(tokens), rows)
        going = ~responses.done[rows]
        if (~going).sum() > decoder.leave_share * len(rows) or not going.any():
            stay = going.nonzero().squeeze(-1)
            decoder.keep(stay)
            rows, tokens = rows[stay], tokens[stay]


def _entering(decoder: Decoder, waiting: int, rows: int, k: int) -> int:
    """How many prompts enter now."""
    if not waiting:
        return 0
    if rows == 0:
        return decoder.room(min(waiting, max(1, MAX_ROWS // k)))
    number = decoder.room(min(waiting, max(0, MAX_ROWS - rows) // k))
    few = number < waiting and number * k < _ENTER_SHARE * MAX_ROWS
    return 0 if few else number


class _Responses:
    """What has been drawn so far; responses are numbered prompt by prompt."""

    def __init__(
        self, prompts: int, per_prompt: int, uniform: Uniform, decoding: Decoding,
        end_ids: Sequence[int], decode: Decode | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        total, longest = prompts * per_prompt, decoding.max_new_tokens
        self.per_prompt, self.decoding, self.decode = per_prompt, decoding, decode
        self.uniform, self.shape = uniform, (prompts, per_prompt)
        self.ends = torch.tensor(list(end_ids), dtype=torch.long)
        self.tokens = torch.zeros(total, longest, dtype=torch.long)
        self.logp = torch.zeros(2, total, longest, dtype=dtype)
        self.length = torch.zeros(total, dtype=torch.long)
        self.finished = torch.zeros(total, dtype=torch.bool)
        self.done = torch.zeros(total, dtype=torch.bool)
        self._draws: dict[int, Tensor] = {}
        # a string spans at most as many tokens as it has bytes; some before it, for what a
        # tokenizer does at the beginning of a text
        self._tail = max((len(s.encode()) for s in decoding.stop), default=0) + 8

    def add(self, logits: Tensor, rows: Tensor, repeats: int = 1) -> Tensor:
        """Draw a token of each of these responses [R]; those that are done get none.

        Args:
            logits: [R / repeats, V].
        """
        age = self.length[rows]
        early = age < self.decoding.min_new_tokens
        if repeats > 1:
            logits = logits.repeat_interleave(repeats, 0)
        chosen = choose(logits, self._uniforms(rows, age), self.decoding, self.ends, early)
        token, *logp = (x.cpu() for x in chosen)
        going = ~self.done[rows]
        if logp[0][going].isnan().any():
            raise GuardStop(
                "sampling: the model's logits are not numbers; the policy has diverged."
            )
        now, at = rows[going], age[going]
        self.tokens[now, at] = token[going]
        for held, new in zip(self.logp, logp, strict=True):
            held[now, at] = new[going].to(held)
        self.length[now] = at + 1
        self.finished[now] = torch.isin(token[going], self.ends) | self._stopped(now)
        self.done[now] = self.finished[now] | (at + 1 == self.decoding.max_new_tokens)
        return token

    def _uniforms(self, rows: Tensor, age: Tensor) -> Tensor:
        """Each response's own number [R] for its token of this age."""
        out = torch.empty(len(rows), dtype=torch.float64)
        for t in age.unique().tolist():
            if t not in self._draws:
                t_ = min(t, self.decoding.max_new_tokens - 1)  # of rows that are done
                self._draws[t] = self.uniform(t_, self.shape).reshape(-1).double().cpu()
            out[age == t] = self._draws[t][rows[age == t]]
        return out

    def _stopped(self, rows: Tensor) -> Bool[Tensor, " R"]:
        """Whether a response's last token completes a stop string."""
        out = torch.zeros(len(rows), dtype=torch.bool)
        if self.decode is None or not self.decoding.stop:
            return out
        for i, row in enumerate(rows.tolist()):
            length = int(self.length[row])
            if length < self.decoding.min_new_tokens:
                continue
            ids = self.tokens[row, max(0, length - self._tail) : length].tolist()
            text = self.decode(ids)
            if any(stop in text for stop in self.decoding.stop):  # it may have stood there before
                before = self.decode(ids[:-1])
                out[i] = any(text.count(stop) > before.count(stop) for stop in self.decoding.stop)
        return out

    def drawn(self) -> Drawn:
        """All of it, without columns that nobody filled."""
        width = max(1, int(self.length.max()))
        mask = torch.arange(width) < self.length[:, None]
        logp, sampled = (x[:, :width].view(*self.shape, width) for x in self.logp)
        return Drawn(
            self.tokens[:, :width].view(*self.shape, width), mask.view(*self.shape, width),
            self.finished.view(self.shape), logp, sampled,
        )  # fmt: skip


# --- which way a model can go --------------------------------------------------------------------

_NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far logits may differ between the ways, relative to how they differ between tokens."""
_NEAR_HALF = 0.1
_PROBE = ([[3, 5, 7], [11, 13, 17, 19, 23]], [[29, 31, 37, 41], [43, 47, 53, 59]])
"""Token ids of prompts, and of steps of two responses to each."""
_verdicts: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def can_share(model: Any) -> bool:
    """Whether a model's samples may share their prompts: found by trying, once a model."""
    if model not in _verdicts:
        reason = _differs(model)
        if reason:
            log.warning("sampling: slower, since prompts cannot be shared (%s)", reason)
        _verdicts[model] = not reason
    return _verdicts[model]


@torch.no_grad()
def _differs(model: Any) -> str:
    """How the logits differ from those with transformers' own cache; empty where they do not."""
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [torch.tensor(p) % vocabulary for p in _PROBE[0]]
    steps = [torch.tensor(s) % vocabulary for s in _PROBE[1]]
    found = []
    device = next(model.parameters()).device
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    mixed = len(types) > 1  # a frozen model whose matrices are kept narrow: only autocast runs it
    narrow = torch.bfloat16 if mixed else model.dtype
    # autocast's rounding would hide a fault, so it is off where it can be
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
        try:
            shared = SharedDecoder(model, num_responses=2, max_rows=4, prompt=5, longest=2)
            for decoder in (PlainDecoder(model), shared):
                with decoder.running():
                    first = decoder.enter(prompts, 2).repeat_interleave(2, 0)
                    found.append(torch.stack([first, *(decoder.step(s) for s in steps)]))
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError,
                KeyError, IndexError, AssertionError) as error:  # fmt: skip
            return str(error).splitlines()[0] if str(error) else type(error).__name__
    plain, tried = (x.to(torch.promote_types(model.dtype, torch.float32)) for x in found)
    size = (plain - plain.mean(-1, keepdim=True)).norm(dim=-1).mean()
    off = (plain - tried).norm(dim=-1).max()
    near = bool(off <= _NEAR.get(narrow, _NEAR_HALF) * size)
    return "" if near else f"logits differ by {float(off / size):.2g} of their size"
