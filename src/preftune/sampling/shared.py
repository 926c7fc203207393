"""Decoding in which the samples of a prompt share its keys and values.

Prompts are read once, in one row without padding. At a step, a layer multiplies the queries of all
of a prompt's rows by the prompt's keys in one product, and each row's by its own keys in another;
one softmax goes over both. No mask of the model's own is built.

Any model takes part whose attention goes through transformers' interface, sees everything before
it and adds nothing to the scores; `local` finds out by trying.

Rows are what the model is given: on a CPU the responses that still go on, each with its slot in the
cache's grid; on an accelerator every slot, so that all shapes are fixed and a step is one CUDA
graph.
"""

import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from preftune.huggingface import accepted, register_attention, unknown_to_ours
from preftune.sampling.cache import Grid, Prefill, SharedCache, Step

log = logging.getLogger("preftune")
_NAME = "preftune_shared"
_WIDEN = 16
"""Buffers grow by so many tokens, or by a quarter: growing copies them."""
_SHRINK = 0.75
"""The grid is laid out anew once so small a share of it would do."""
_PREFILL_TOKENS = 4096
"""Prompts read in one pass."""
_active: list[SharedCache] = []


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls attention, in a pass of a `SharedDecoder`."""
    unknown = unknown_to_ours(options)
    if unknown:
        raise NotImplementedError(f"shared decoding knows no {', '.join(unknown)}")
    cache = _active[-1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(cache.now, Prefill):
        return cache.attend_prompts(query, key, value, scale), None
    return cache.attend(query, scale), None


class SharedDecoder:
    """Rows that may begin and end at any step."""

    leave_share = 0.0
    """A finished row leaves at once: that copies nothing."""

    def __init__(
        self,
        model: Any,
        *,
        num_responses: int,
        max_rows: int,
        prompt: int,
        longest: int,
        fixed: bool | None = None,
    ) -> None:
        """
        Args:
            num_responses: to each prompt.
            max_rows: rows at a time, where that is a prompt's worth.
            prompt, longest: tokens of the longest prompt and response.
            fixed: all shapes are fixed; None: on an accelerator.
        """
        self.model, self.slots = model, num_responses
        self.device = next(model.parameters()).device
        self.longest = longest
        dtype = model.dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        self.fixed = self.device.type == "cuda" if fixed is None else fixed
        groups = math.ceil(max_rows / num_responses)
        # with shapes that follow the rows, stragglers of many prompts may stay side by side
        self.most_groups = groups if self.fixed else 2 * groups
        grid = Grid(groups, num_responses, prompt, longest) if self.fixed else Grid(0, 1, 0, 0)
        self.cache = SharedCache(grid, dtype, self.device)
        self.prompt_len = torch.zeros(grid.groups, dtype=torch.long)  # [G]
        self.slot = torch.zeros(0, dtype=torch.long)  # [R], in the grid
        self.place = torch.zeros(0, dtype=torch.long)  # [R]: response tokens read
        self.graph: Any = None  # False: none can be captured
        self.inputs: list[Tensor] = []
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise NotImplementedError("the model counts positions by itself")
        register_attention(_NAME, attention)

    def room(self, wanted: int) -> int:
        """Prompts that can enter now."""
        return min(wanted, self.most_groups - len(self._groups_in_use()))

    def _groups_in_use(self) -> Tensor:
        return (self.slot // self.cache.grid.slots).unique()

    def enter(self, prompts: list[Tensor], num_responses: int) -> Tensor:
        """Read prompts; logits [n, V] behind each, of which `num_responses` rows go on."""
        assert num_responses == self.slots
        free = self._make_room(prompts)
        logits = []
        start = 0
        while start < len(prompts):
            end, total = start, 0
            while end < len(prompts) and (end == start or total < _PREFILL_TOKENS):
                total += len(prompts[end])
                end += 1
            logits.append(self._read(prompts[start:end], free[start:end]))
            start = end
        first = torch.tensor(free)[:, None] * self.cache.grid.slots
        self.slot = torch.cat([self.slot, (first + torch.arange(num_responses)).flatten()])
        self.place = torch.cat([self.place, torch.zeros(len(free) * num_responses).long()])
        return torch.cat(logits)

    def _read(self, prompts: list[Tensor], groups: list[int]) -> Tensor:
        """Logits [n, V] behind prompts, whose keys and values go to these groups."""
        length = torch.tensor([len(p) for p in prompts])
        self.prompt_len[groups] = length
        ends = length.cumsum(0)
        self.cache.begin(Prefill(groups, ends.tolist()))
        out = self._forward(
            torch.cat(prompts)[None],
            torch.cat([torch.arange(n) for n in length.tolist()])[None],
            ends - 1,
        )[0]
        return out if len(out) == len(prompts) else out[ends - 1]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [R, V] behind one more token [R] of each row."""
        if not self.fixed:
            self._fit()
        grid = self.cache.grid
        size = grid.groups * grid.slots
        place = torch.full((size,), -1).index_copy_(0, self.slot, self.place)
        bias = self.cache.bias(self.prompt_len, place).to(self.device)
        position = self.prompt_len[self.slot // grid.slots] + self.place
        self.place = self.place + 1
        if not self.fixed:
            whole = torch.equal(self.slot, torch.arange(size))
            self.cache.begin(Step(None if whole else self.slot, place, bias))
            return self._forward(tokens[:, None], position[:, None], 1)[:, -1]
        ids, at = torch.zeros(2, size, 1, dtype=torch.long)
        ids[self.slot, 0], at[self.slot, 0] = tokens, position
        return self._captured(ids, at, place.clamp(min=0), bias)[self.slot.to(self.device)]

    def keep(self, stay: Tensor) -> None:
        """Only these rows go on."""
        self.slot, self.place = self.slot[stay], self.place[stay]

    def _forward(self, ids: Tensor, position: Tensor, keep: Any) -> Tensor:
        inputs: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "position_ids": position.to(self.device),
            # a mask of four axes is taken as it is, and `attention` has no use for it
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": keep.to(self.device) if isinstance(keep, Tensor) else keep,
        }
        return self.model(**accepted(self.model, inputs)).logits

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model attends by the cache of this decoder."""
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        _active.append(self.cache)
        config._attn_implementation = _NAME
        try:
            yield
        finally:
            config._attn_implementation = before
            _active.pop()

    def _captured(self, *inputs: Tensor) -> Tensor:
        """Logits [S, V] of a step over every slot, by a CUDA graph where one can be captured.

        Args:
            inputs: token and position [S, 1] of each slot, `Step.place` and `Step.bias`.
        """
        if not self.inputs:
            self.inputs = [x.to(self.device) for x in inputs]
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        if self.graph is None:
            self.graph = self._capture()
        if self.graph is False:
            return self._whole_step()
        self.graph.replay()
        return self.output

    def _whole_step(self) -> Tensor:
        ids, position, place, bias = self.inputs
        self.cache.begin(Step(None, place, bias))
        return self._forward(ids, position, 1)[:, -1]

    def _capture(self) -> Any:
        """The graph of a step; False where that fails."""
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a first pass outside, as the documentation asks
                self._whole_step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.output = self._whole_step()
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            log.warning("sampling: no CUDA graph of this model (%s); steps are slower", reason)
            return False
        return graph

    def _make_room(self, prompts: list[Tensor]) -> list[int]:
        """Groups for prompts that enter."""
        used = self._groups_in_use().tolist()
        longest = max(map(len, prompts))
        if not self.fixed:
            prompt = _up(max([longest, *self.prompt_len[used].tolist()]))
            own = min(max(self.cache.grid.own, _WIDEN), self.longest)
            self._lay_out(used, len(prompts), self.slots, prompt, own)
            return list(range(len(used), len(used) + len(prompts)))
        return [g for g in range(self.cache.grid.groups) if g not in used][: len(prompts)]

    def _fit(self) -> None:
        """Wider buffers where a response reaches their end, a smaller grid where one would do."""
        grid = self.cache.grid
        own = grid.own
        if int(self.place.max()) >= own:
            own = min(self.longest, own + max(_WIDEN, _up(own // 4)))
        group, count = (self.slot // grid.slots).unique(return_counts=True)
        smaller = len(group) * int(count.max()) <= _SHRINK * grid.groups * grid.slots
        if own != grid.own or smaller:
            prompt = _up(int(self.prompt_len[group].max()))
            self._lay_out(group.tolist(), 0, int(count.max()), prompt, own)

    def _lay_out(self, used: list[int], new: int, slots: int, prompt: int, own: int) -> None:
        """A grid of the groups in use and of new ones behind them."""
        old = self.cache.grid
        grid = Grid(len(used) + new, slots, prompt, own)
        source = torch.full((grid.groups, slots), -1)
        where = torch.zeros_like(self.slot)
        for i, group in enumerate(used):
            rows = (self.slot // old.slots == group).nonzero().squeeze(-1)
            source[i, : len(rows)] = self.slot[rows]
            where[rows] = i * slots + torch.arange(len(rows))
        self.prompt_len = torch.cat([self.prompt_len[used], torch.zeros(new).long()])
        self.slot = where
        self.cache.rearrange(grid, source)


def _up(size: int) -> int:
    """The next multiple of `_WIDEN`: products over such widths are faster."""
    return -(-size // _WIDEN) * _WIDEN
