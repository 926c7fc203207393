"""What `auto` becomes: settled once, when model, data and number of steps are known."""

from typing import Any

import torch

from preftune.config import Config
from preftune.data import Rows
from preftune.errors import UserError
from preftune.method import Method
from preftune.policies.blocks import can_compile, free_memory, recompute_blocks

SHARE_FROM = 0.02
"""Share of the tokens that sharing prompts must save to be worth it."""
COMPILE_FROM = 900.0
"""Seconds of training from which compiling is worth its minute or so."""
RATES = {"cpu": 3e11, "cuda": 2e14}
"""Floating-point operations a second, roughly, to foresee how long a run is."""
CPU_ROW_BUDGET = 2048
"""Tokens of a pass on a CPU: wider products are no faster, and more activations are kept."""
MOST_ROW_BUDGET = 65536
"""The same elsewhere."""
FREE_SHARE = 0.6
"""Of the free memory, what activations may take."""


def tokens_of(method: Method, rows: Rows, max_new_tokens: int) -> tuple[float, float, int]:
    """Mean tokens of a prompt and of a response, and responses a prompt, of data or of samples to
    come."""
    prompt = sum(map(len, rows.prompts)) / len(rows)
    given = [len(r) for responses in rows.responses for r in responses]
    response = sum(given) / len(given) if given else max_new_tokens / 2
    return prompt, response, max(t.source.num_responses for t in method.terms)


def choose_layout(config: Config, trunk: Any, method: Method, rows: Rows) -> list[str]:
    """Share prompts where that saves tokens. Gives what to tell the user."""
    if not trunk.share_prefix:
        return []
    prompt, response, count = tokens_of(method, rows, config.max_new_tokens)
    saved = (count - 1) * prompt / (count * (prompt + response))
    if config.share_prefix is None:
        trunk.share_prefix = saved >= SHARE_FROM
    if not trunk.share_prefix:
        return []
    rows_are = "in packed rows" if trunk.packing else "in padded rows"
    return [
        f"a prompt is computed once for its {count} responses, {rows_are}: {saved:.0%} fewer tokens"
    ]


def row_budget(config: Config, trunk: Any) -> int | None:
    """Tokens of one forward and backward pass: what fits, on a CPU no more than it gains from."""
    if config.micro_batch_tokens is not None:
        return config.micro_batch_tokens
    fits = int(_for_activations(trunk) / max(1.0, trunk.activation_bytes()))
    least = CPU_ROW_BUDGET if trunk.device.type == "cpu" else MOST_ROW_BUDGET
    return max(1, min(least, fits))


def compiles(config: Config, trunk: Any, tokens_per_step: float, steps: int) -> bool:
    """Whether the model's blocks are compiled: in runs that are long enough to win the time back.

    Raises:
        UserError: asked for, where it cannot be done.
    """
    able = can_compile(trunk.device)
    if config.compile and not able:
        raise UserError(
            "compile: no C++ compiler (on a GPU: no Triton) is at hand. Install one, or leave it "
            "out."
        )
    if config.compile is not None or not able:
        return bool(config.compile)
    weights = sum(p.numel() for p in trunk.model.parameters())
    seconds = 6 * weights * tokens_per_step * steps / RATES.get(trunk.device.type, 1e12)
    return seconds > COMPILE_FROM


def recomputes(config: Config, trunk: Any, longest: float) -> bool:
    """Whether activations are computed again in the backward pass rather than kept: only where
    the longest row is not expected to fit."""
    if config.activation_checkpointing is not None:
        return config.activation_checkpointing
    return longest * trunk.activation_bytes() > _for_activations(trunk)


def _for_activations(trunk: Any) -> float:
    """Bytes, those left out that the models will take first."""
    return FREE_SHARE * max(0, free_memory(trunk.device) - trunk.to_come)


def apply(trunk: Any, *, compiled: bool, recomputed: bool) -> None:
    """Make the model so. Its copies are made before: they would call the original's blocks."""
    if recomputed:
        recompute_blocks(trunk.whole.base_model)
    if compiled:
        trunk.compile()
        torch._dynamo.config.cache_size_limit = 64  # with and without gradients, of several types
