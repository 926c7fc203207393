"""PEFT folders of the tiny model, with adapters that change it."""

from pathlib import Path
from typing import Any

import torch

from preftune import adapters
from preftune.adapter_saving import save_model
from preftune.huggingface import classifier_from, load_model, load_tokenizer


def moved(model: Any, seed: int = 0, size: float = 0.1) -> Any:
    """The model with everything that is trained moved at random."""
    own = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=own))
    return model


def fresh(base: str, kind: str = "lora", *, scores: bool = False, **changes: Any) -> Any:
    """A model with a new adapter."""
    make = classifier_from if scores else load_model
    given: dict[str, Any] = {"rank": 4, "alpha": 8, "target_modules": "all-linear", "seed": 0}
    recipe = adapters.Recipe(kind=kind, scores=scores, **(given | changes))
    return adapters.attach(make(base, torch.float32), recipe)


def write(folder: Path, base: str, kind: str = "lora", **changes: Any) -> str:
    """The folder of an adapter that changes its base, with the tokenizer."""
    model = moved(fresh(base, kind, **changes))
    save_model(model, load_tokenizer(base), folder)
    return str(folder)
