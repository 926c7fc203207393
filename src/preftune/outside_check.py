"""The first update's gradient, which outside checks compare with their own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune import config as configs
from preftune.config import Config
from preftune.errors import UserError
from preftune.gradient import gradient
from preftune.parts import make_world
from preftune.preparing import prepare
from preftune.rounds import group_terms
from preftune.samples import Samples, pad_stack


def first_gradient(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    model: Any = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """The first update's gradient in float64, before clipping: a check of a whole row.

    Args:
        config: as for `train`; no run folder is made.
        model: a model object in place of `model`.
        samples: on-policy responses, `{"prompt_ids", "response_ids", "reward"}` each, the end token
            in `response_ids` if the response ended. Grouped by equal prompt, they are the whole
            first round of every on-policy source. Rewards given win over `reward`.
    Returns:
        the gradient of each of the model's named parameters.
    """
    config = configs.load(config)
    # One row a response: some models normalise in float32 whatever their weights are, and then the
    # gradients of a shared prompt differ by that rounding from those of rows by themselves.
    exact = {"dtype": "float64", "share_prefix": bool(config.share_prefix)}
    config = config.model_copy(update=exact)
    parts = prepare(config, model=model, trains=False)
    given = None if samples is None else _given(samples, parts.policy.end_ids)
    groups, world = group_terms(parts.method), make_world(parts)
    for parameter in parts.model.parameters():
        parameter.grad = None
    gradient(groups, world, 0, given)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in parts.model.model.named_parameters()
    }


def _given(rows: Sequence[Mapping[str, Any]], end_ids: Sequence[int]) -> Samples:
    """Given responses as a round, grouped by prompt in the order in which prompts appear."""
    by_prompt: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(tuple(row["prompt_ids"]), []).append(row)
    counts = {len(group) for group in by_prompt.values()}
    if len(counts) != 1:
        raise UserError(
            f"samples: every prompt needs the same number of responses, not {sorted(counts)}."
        )
    prompt, prompt_mask = pad_stack([torch.tensor(p) for p in by_prompt], left=True)
    flat = [row for group in by_prompt.values() for row in group]
    tokens, mask = pad_stack([torch.tensor(row["response_ids"]) for row in flat])
    shape = (len(by_prompt), counts.pop())
    ended = [bool(row["response_ids"]) and row["response_ids"][-1] in end_ids for row in flat]
    rewarded = all(row.get("reward") is not None for row in flat)
    return Samples(
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=tokens.view(*shape, -1),
        mask=mask.view(*shape, -1),
        finished=torch.tensor(ended).view(shape),
        origin=torch.zeros(shape, dtype=torch.long),
        row=torch.arange(shape[0]),
        reward=_rewards(flat).view(shape) if rewarded else None,
    )


def _rewards(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([float(r["reward"]) for r in rows], dtype=torch.float64)
