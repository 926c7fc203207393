"""The exact claims at small settings, for the tests of this folder."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.reproduce import claims, exact, fits, modes

MODULES = (exact, fits, modes)
"""Importing them registers the experiments."""
KNOWN = claims.load()
SMALL: dict[str, dict[str, Any]] = {
    "m3-cases": {"instances": 200},
    "m3-bimodal": {},
    "m3-reuse-limit": {"steps": 300},
    "first-2": {"far": 50, "most": 400},
    "c1-prop41": {},
    "c2-kl-bound": {"instances": 200},
    "c3-global-suffices": {"sizes": [100, 1000, 10000]},
    "c10-fig2": {"steps": 150, "pairs": 1000},
    "d2-isomorphic": {},
    "d5-misspecified": {},
}


def measure(name: str, seeds: Sequence[int] = (0, 7, 3), **settings: Any) -> claims.Measured:
    claim = KNOWN[name]
    changed = {**claim.settings, **SMALL[name], **settings}
    claim = dataclasses.replace(claim, settings=changed)
    return claims.EXPERIMENTS[name].conclude(claim, seeds, {})


def f64(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)
