"""What a Trainer (transformers, TRL) left beside a model."""

import json
from pathlib import Path
from typing import Any

from preftune.errors import UserError

_STATE = "trainer_state.json"
SHOWN = (
    "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "epoch",
)  # fmt: skip
"""Of its log; TRL's names."""


def left(policy: str | None) -> dict[str, Any]:
    """Steps of training and the last of each figure; nothing where no Trainer was.

    Raises:
        UserError: its state cannot be read.
    """
    if policy is None:
        return {}
    folder = Path(policy)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=_number, reverse=True)
    places = (p / _STATE for p in (folder, folder.parent, *checkpoints))
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        last: dict[str, Any] = {}
        for row in state["log_history"]:
            last |= {k: v for k, v in row.items() if k in SHOWN and isinstance(v, int | float)}
        return {"trained_steps": int(state["global_step"]), **last}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"policy '{policy}': {path} cannot be read ({type(error).__name__}: {error}). "
            "Remove it, or restore it."
        ) from error


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1
