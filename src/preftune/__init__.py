"""preftune: tune language models on preferences, and see which method fits.

A method is a row of terms (source -> labeller -> objective); one loop runs every row.
Importing this package loads neither torch nor transformers; names resolve when they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preftune import labellers, methods, objectives
    from preftune.config import Config
    from preftune.outside_check import first_gradient
    from preftune.training import train

__version__ = "0.1.0"
__all__ = ["Config", "first_gradient", "labellers", "methods", "objectives", "train"]

_HOME = {"Config": "config", "train": "training", "first_gradient": "outside_check"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"preftune.{_HOME[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"preftune.{name}")
    raise AttributeError(f"module 'preftune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
