"""The tokenised data set: ids of prompts and responses, and what is known of each row."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from preftune.data.canonical import LABELS, Example, Prompt
from preftune.data.chat import Renderer, RowError
from preftune.data.formats import Rejected, summary
from preftune.errors import NoRows, UserError, nearest
from preftune.samples import DATA, Samples, pad_stack

TRUNCATIONS = ("drop", "left", "right", "error")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokenised rows of one kind; the lists are aligned."""

    prompts: list[list[int]]
    responses: list[tuple[list[int], ...]]
    """The end token is the last of a finished response."""
    finished: list[tuple[bool, ...]]
    columns: dict[str, list[Any]]
    """All further columns, for reward functions; None where a row has no such column."""
    texts: list[Prompt]
    """The prompts as they were given, for reward functions."""
    where: list[str]
    """File and row of each."""
    kind: str
    """"pairs", "completions" or "prompts"."""

    def __len__(self) -> int:
        return len(self.prompts)

    def samples(
        self, index: Sequence[int] | Tensor, *, responses: Sequence[int] | None = None
    ) -> Samples:
        """The rows at `index` as `Samples` of the data.

        Args:
            index: [N] rows, in this order.
            responses: [K] which responses of each row; None takes all.

        Returns:
            Samples with `extra` of the columns label, margin, probability, score_chosen and
            score_rejected that hold numbers: [N], float64 (so that nothing of them is lost), NaN
            where a row has none.
        """
        rows = _indices(index)
        if not rows or not self.responses[rows[0]]:
            raise ValueError("samples need rows with responses; take prompts_only for prompts")
        take = range(len(self.responses[rows[0]])) if responses is None else list(responses)
        prompt, prompt_mask = self.prompts_only(rows)
        flat = [torch.tensor(self.responses[i][k]) for i in rows for k in take]
        tokens, mask = pad_stack(flat)
        shape = (len(rows), len(take))
        return Samples(
            prompt=prompt,
            prompt_mask=prompt_mask,
            tokens=tokens.view(*shape, -1),
            mask=mask.view(*shape, -1),
            finished=torch.tensor([[self.finished[i][k] for k in take] for i in rows]),
            origin=torch.full(shape, DATA),
            row=torch.tensor(rows),
            extra=self._extra(rows),
        )

    def prompts_only(self, index: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [N, P], padded on the left, and their mask."""
        return pad_stack([torch.tensor(self.prompts[i]) for i in _indices(index)], left=True)

    def select(self, index: Sequence[int] | Tensor) -> "Rows":
        """The rows at `index`, in this order."""
        rows = _indices(index)
        return replace(
            self,
            prompts=[self.prompts[i] for i in rows],
            responses=[self.responses[i] for i in rows],
            finished=[self.finished[i] for i in rows],
            columns={k: [v[i] for i in rows] for k, v in self.columns.items()},
            texts=[self.texts[i] for i in rows],
            where=[self.where[i] for i in rows],
        )

    def extend(self, more: "Rows") -> None:
        """Add rows of the same kind behind these, in place, for whoever holds these."""
        assert more.kind == self.kind, f"{more.kind} behind {self.kind}"
        for name in {*self.columns, *more.columns}:
            own = self.columns.setdefault(name, [None] * len(self))
            own.extend(more.columns.get(name, [None] * len(more)))
        for name in ("prompts", "responses", "finished", "texts", "where"):
            getattr(self, name).extend(getattr(more, name))
        self.__dict__.pop("_labels", None)

    @cached_property
    def _labels(self) -> list[str]:
        """Columns of labels that hold numbers, and nothing else. All rows decide, not those asked
        for: a minibatch has the fields of every other."""

        def numeric(values: list[Any]) -> bool:
            given = [v for v in values if v is not None]
            return bool(given) and all(isinstance(v, (bool, int, float)) for v in given)

        return [name for name in LABELS if numeric(self.columns.get(name, []))]

    def _extra(self, rows: list[int]) -> dict[str, Tensor]:
        extra = {}
        for name in self._labels:
            values = [self.columns[name][i] for i in rows]
            numbers = [float("nan") if v is None else float(v) for v in values]
            extra[name] = torch.tensor(numbers, dtype=torch.float64)
        return extra


def _indices(index: Sequence[int] | Tensor) -> list[int]:
    return index.tolist() if isinstance(index, Tensor) else list(index)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the examples."""

    kept: int
    dropped: int
    """Left out because they are longer than max_length (truncation: drop), or cannot be cut."""
    cut: int
    """Kept, and shortened (truncation: left or right)."""
    boundary_merged: int
    """Kept, with a token that straddles prompt and response."""
    longest: int
    """Tokens of the longest prompt with its longest response, before truncation."""
    limit: int | None
    """Tokens of prompt and response that are allowed; None: no limit."""
    rejected: list[Rejected] = field(default_factory=list)
    """Rows that cannot be used whatever max_length is."""


@dataclass(frozen=True, kw_only=True)
class _Coded:
    """A row on its way through truncation."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    finished: tuple[bool, ...]

    def length(self) -> int:
        return len(self.prompt) + max(map(len, self.responses), default=0)


def build_rows(
    examples: Sequence[Example],
    renderer: Renderer,
    *,
    max_length: int | None,
    truncation: str = "drop",
    context: int | None = None,
    reserve: int = 0,
) -> tuple[Rows, Report]:
    """Tokenise examples and bring them to a length.

    Args:
        max_length: tokens of a prompt with its longest response; None allows the context.
        truncation: of longer rows: "drop" them; cut the prompt's "left" (BOS stays); cut the
            response's "right" (it is unfinished then); "error".
        context: tokens the model can take.
        reserve: tokens to be sampled behind each prompt, which must fit into the context.

    Raises:
        UserError: contradictory lengths, a row too long under "error", or no row is left.
    """
    limit = _limit(max_length, truncation, context)
    room = None if context is None else context - max(1, reserve)
    if room is not None and room < 1:
        raise UserError(
            f"max_new_tokens: {reserve} leaves no room for a prompt in the context of {context}."
        )
    kept: list[tuple[Example, _Coded]] = []
    rejected: list[Rejected] = []
    dropped = cut = merged = longest = 0
    for example in examples:
        try:
            encoded = renderer.encode(example)
            row = _Coded(
                prompt=encoded.prompt, responses=encoded.responses, finished=example.finished
            )
            _check_responses(row, renderer)
            longest = max(longest, row.length())
            fitted = _fit(row, example.where, limit, room, truncation, renderer.bos_id)
        except RowError as error:
            rejected.append(_rejected(example, str(error)))
            continue
        if fitted is None:
            dropped += 1
            continue
        cut += fitted is not row
        merged += encoded.boundary_merged
        kept.append((example, fitted))
    report = Report(
        kept=len(kept),
        dropped=dropped,
        cut=cut,
        boundary_merged=merged,
        longest=longest,
        limit=limit,
        rejected=rejected,
    )
    if not kept:
        raise NoRows(_why_empty(report))
    return _collect(kept), report


def _limit(max_length: int | None, truncation: str, context: int | None) -> int | None:
    if truncation not in TRUNCATIONS:
        raise UserError(
            f"truncation: '{truncation}' is none of {', '.join(TRUNCATIONS)}."
            f"{nearest(truncation, TRUNCATIONS)}"
        )
    if max_length is None:
        return context
    if max_length < 2:
        raise UserError(f"max_length: {max_length} holds no prompt and response. Give 2 or more.")
    if context is not None and max_length > context:
        raise UserError(
            f"max_length: {max_length} is above the model's context of {context} tokens. "
            f"Give {context} or less."
        )
    return max_length


def _check_responses(row: _Coded, renderer: Renderer) -> None:
    for ids, done in zip(row.responses, row.finished, strict=True):
        if len(ids) - (done and ids[-1:] != [] and ids[-1] in renderer.end_ids) < 1:
            raise RowError("a response has no token")


def _fit(
    row: _Coded,
    where: str,
    limit: int | None,
    room: int | None,
    truncation: str,
    bos: int | None,
) -> _Coded | None:
    """The row within the limit; None if it is to be dropped."""
    if room is not None and len(row.prompt) > room:
        if truncation != "left":
            raise RowError("prompt longer than the context")
        row = replace(row, prompt=_cut_left(row.prompt, room, bos))
    if limit is None or row.length() <= limit:
        return row
    if truncation == "error":
        raise UserError(
            f"data {where}: {row.length()} tokens, above max_length: {limit}. Raise max_length, "
            "or set truncation to drop, left or right."
        )
    if truncation == "left":
        size = limit - max(map(len, row.responses), default=0)
        # What is left must hold some of the prompt besides BOS.
        if size < 1 + (row.prompt[0] == bos):
            return None
        return replace(row, prompt=_cut_left(row.prompt, size, bos))
    if truncation == "right" and len(row.prompt) < limit:
        size = limit - len(row.prompt)
        short = tuple(ids[:size] for ids in row.responses)
        if len(short) == 2 and short[0] == short[1]:  # a pair without a difference
            return None
        finished = tuple(
            done and len(ids) <= size for ids, done in zip(row.responses, row.finished, strict=True)
        )
        return replace(row, responses=short, finished=finished)
    return None


def _cut_left(prompt: list[int], size: int, bos: int | None) -> list[int]:
    if len(prompt) <= size:
        return prompt
    if prompt[0] == bos and size > 1:
        return [prompt[0], *prompt[len(prompt) - size + 1 :]]
    return prompt[len(prompt) - size :]


def _rejected(example: Example, reason: str) -> Rejected:
    row = {"prompt": example.prompt, "responses": list(example.responses), **example.columns}
    return Rejected(where=example.where, reason=reason, row=row)


def _why_empty(report: Report) -> str:
    if not report.dropped and not report.rejected:
        return "data: no example was given. Give at least one row."
    parts = []
    if report.dropped:
        parts.append(
            f"{report.dropped} too long (limit {report.limit} tokens, longest {report.longest})"
        )
    if report.rejected:
        parts.append(summary(report.rejected))
    return (
        f"data: no row is left: {'; '.join(parts)}. Raise max_length, or set truncation: left "
        "(cuts prompts) or right (cuts responses)."
    )


def _collect(kept: list[tuple[Example, _Coded]]) -> Rows:
    names = dict.fromkeys(name for example, _ in kept for name in example.columns)
    counts = {len(row.responses) for _, row in kept}
    assert len(counts) == 1, f"examples of several kinds: {counts} responses a row"
    return Rows(
        prompts=[row.prompt for _, row in kept],
        responses=[row.responses for _, row in kept],
        finished=[row.finished for _, row in kept],
        columns={name: [example.columns.get(name) for example, _ in kept] for name in names},
        texts=[example.prompt for example, _ in kept],
        where=[example.where for example, _ in kept],
        kind=("prompts", "completions", "pairs")[min(2, counts.pop())],
    )
