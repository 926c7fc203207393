"""What passes between the parts, and the one legend of shapes and units.

    *R  run axis: () for a language model, (R,) for a study of R runs of equal shape
    N   prompts          K  responses a prompt       T  response tokens     P  prompt tokens
    Q   items a prompt   A  responses an item        V  vocabulary

Log-probs are natural logarithms (nats). Prompts are padded on the left and responses on the right.
Masks are boolean and made from lengths, never from token ids: in some models the padding id is the
end id. `mask` covers the end token of a response that ended, and nothing after it.
"""

from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DATA, REFERENCE = (
    -2,
    -1,
)  # `origin` of a response; 0 and up is the version of the policy that drew it


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts, K responses to each, and what is known of them."""

    prompt: Int[Tensor, "*R N P"]
    prompt_mask: Bool[Tensor, "*R N P"]
    tokens: Int[Tensor, "*R N K T"]
    mask: Bool[Tensor, "*R N K T"]
    """Response tokens, the end token included; False after it."""
    finished: Bool[Tensor, "*R N K"]
    """The response ends by an end token (it was not cut)."""
    origin: Int[Tensor, "*R N K"]
    """-2 data, -1 reference, otherwise the version (optimizer steps taken) of the policy."""
    row: Int[Tensor, "*R N"]
    """Index of the prompt in its data set."""
    logp: Float[Tensor, "*R N K T"] | None = None
    """Log-probs under the sampler, then under the policy at collection."""
    ref_logp: Float[Tensor, "*R N K T"] | None = None
    value: Float[Tensor, "*R N K T"] | None = None
    reward: Float[Tensor, "*R N K"] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further columns of the data, [*R, N, ...]: soft labels, margins, good/bad labels."""

    def take(self, index: Tensor) -> "Samples":
        """The prompts at `index` [n] (shared by all runs), every field narrowed alike."""
        axis = self.row.ndim - 1

        def pick(x: object) -> object:
            if isinstance(x, dict):
                return {k: pick(v) for k, v in x.items()}
            return x.index_select(axis, index) if isinstance(x, Tensor) else x

        return replace(self, **{f.name: pick(getattr(self, f.name)) for f in fields(self)})

    def lengths(self) -> Int[Tensor, "*R N K"]:
        """Response tokens, the end token included."""
        return self.mask.sum(-1)

    def at(self, responses: Int[Tensor, "*R N J"]) -> "Samples":
        """Those responses of each prompt, in this order."""

        def pick(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            if x.ndim > responses.ndim:
                return x.gather(-2, responses.unsqueeze(-1).expand(*responses.shape, x.shape[-1]))
            return x.gather(-1, responses)

        return replace(self, **{name: pick(getattr(self, name)) for name in (*_RESPONSE, *_TOKEN)})

    def trimmed(self) -> "Samples":
        """Without the columns that are padding in every response, so that what else was in the
        round changes no rounding."""
        width = max(1, int(self.mask.sum(-1).max()))
        cut = {n: x[..., :width] for n in _TOKEN if (x := getattr(self, n)) is not None}
        return replace(self, **cut)


_TOKEN = ("tokens", "mask", "logp", "ref_logp", "value")
_RESPONSE = ("finished", "origin", "reward")


def _wide(x: Tensor, width: int, left: bool = False) -> Tensor:
    gap = width - x.shape[-1]
    return torch.nn.functional.pad(x, (gap, 0) if left else (0, gap))


def _cat(parts: list[Samples], names: tuple[str, ...], axis: int) -> dict[str, Tensor | None]:
    """Fields of all parts one after another; None where a part has none."""
    width = max(p.tokens.shape[-1] for p in parts)
    out: dict[str, Tensor | None] = {}
    for name in names:
        values = [getattr(p, name) for p in parts]
        if any(v is None for v in values):
            out[name] = None
            continue
        if name in _TOKEN:
            values = [_wide(v, width) for v in values]
        if values[0].is_floating_point():
            dtype = max((v.dtype for v in values), key=lambda d: torch.finfo(d).bits)
            values = [v.to(dtype) for v in values]
        out[name] = torch.cat(values, axis)
    return out


def join(parts: list[Samples]) -> Samples:
    """Concatenate along the prompts; prompts are padded on the left, responses on the right."""
    axis = parts[0].row.ndim - 1
    width = max(p.prompt.shape[-1] for p in parts)
    parts = [
        replace(
            p,
            prompt=_wide(p.prompt, width, left=True),
            prompt_mask=_wide(p.prompt_mask, width, left=True),
        )
        for p in parts
    ]
    return replace(
        parts[0],
        **_cat(parts, ("prompt", "prompt_mask", "row", *_RESPONSE, *_TOKEN), axis),
        extra={},
    )


def beside(parts: list[Samples]) -> Samples:
    """Responses of several origins to the same prompts, side by side: K adds up."""
    return replace(parts[0], **_cat(parts, (*_RESPONSE, *_TOKEN), parts[0].row.ndim), extra={})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A labeller's answer. Items point at responses, so one in many pairs is computed once."""

    index: Int[Tensor, "*R N Q A"]
    """Into the K responses of the prompt."""
    roles: tuple[str, ...] = ()
    """Name of each of the A responses, as ("chosen", "rejected"); () if all are alike: then the
    loss of an item is the mean over A."""
    keep: Bool[Tensor, "*R N Q"] | None = None
    """False masks an item (a tied pair); None keeps all."""
    data: dict[str, Tensor] = field(default_factory=dict)
    """[*R, N, Q, (A), (T)]: what objectives take by name: advantage, weight, baseline, label."""

    def take(self, index: Tensor) -> "Batch":
        """The items of the prompts at `index` [n]."""
        axis = self.index.ndim - 3
        return replace(
            self,
            index=self.index.index_select(axis, index),
            keep=None if self.keep is None else self.keep.index_select(axis, index),
            data={k: v.index_select(axis, index) for k, v in self.data.items()},
        )


def pad_stack(rows: list[Tensor], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Stack 1-d rows of unequal length: values padded by 0 [n, L], and the mask [n, L]."""
    width = max((len(r) for r in rows), default=0)
    out = torch.zeros(len(rows), width, dtype=rows[0].dtype if rows else torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        out[i, where] = row
        mask[i, where] = True
    return out, mask
