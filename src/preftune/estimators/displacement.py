"""Which pairs will push their own chosen response down? By the hidden states of the two."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from preftune.estimators.estimate import Estimate, bootstrap, cannot_tell, columns, of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LEAST_BEYOND = 5
"""Pairs that a quantile needs on either side of it."""


@dataclass(frozen=True, kw_only=True)
class Ches:
    """How alike chosen and rejected are in the model's own representation."""

    ches: Float[Tensor, " N"]
    ln_ches: Float[Tensor, " N"]
    quantiles: dict[float, Estimate]
    """Of ln-CHES. Higher pairs are the likelier to lower their chosen response's probability."""


def ches(
    chosen_sum: Float[Tensor, "N D"],
    rejected_sum: Float[Tensor, "N D"],
    chosen_tokens: Int[Tensor, " N"],
    rejected_tokens: Int[Tensor, " N"],
    quantiles: tuple[float, ...] = QUANTILES,
    seed: int = 0,
) -> Ches:
    """Centered hidden embedding similarity, and by tokens.

    CHES = ⟨H⁺, H⁻⟩ − ‖H⁺‖²,  ln-CHES = ⟨H⁺, H⁻⟩ / (|y⁺| |y⁻|) − ‖H⁺‖² / |y⁺|²,  H = Σ_t h_t

    h_t are the last hidden states that predict the response's tokens: from the last of the prompt
    to the last but one of the response.

    Paper: Razin et al. 2024, arXiv 2410.08847, definition 2.

    Args:
        chosen_sum, rejected_sum: [N, D], H⁺ and H⁻.
        chosen_tokens, rejected_tokens: [N], tokens of the responses, ≥ 1.
        quantiles: of ln-CHES, each in (0, 1).

    Returns:
        a quantile is not trusted with under five pairs beyond it.
    """
    mine, other = chosen_sum.double(), rejected_sum.double()
    by_token = mine / chosen_tokens[:, None]
    ln = ((other / rejected_tokens[:, None] - by_token) * by_token).sum(-1)
    values = columns(ln)[:, 0]

    def quantile(q: float) -> Estimate:
        if len(values) * min(q, 1 - q) < LEAST_BEYOND - 1e-9:
            needed = int(np.ceil(LEAST_BEYOND / min(q, 1 - q) - 1e-9))
            return cannot_tell(f"cannot tell with {len(values)} pairs: {needed} are needed")
        return of(bootstrap(lambda i: float(np.quantile(values[i], q)), len(values), seed))

    return Ches(
        ches=((other - mine) * mine).sum(-1),
        ln_ches=ln,
        quantiles={q: quantile(q) for q in quantiles},
    )
