"""What to change where a run will not fit, what each change would bring, and what it costs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from preftune import config as configs
from preftune.config import Config
from preftune.errors import UserError
from preftune.estimating.counts import Rehearsal, counted, rehearsal
from preftune.estimating.memory import Memory, memory

ROWS = 2000
"""Of the data that are gone through for a change: their longest stand for all."""
UPDATES = 32
_HELPS = 0.01
"""Of the peak, what a change must save to be named."""
_LEAST_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class Change:
    """Settings, and the run's memory with them."""

    settings: dict[str, Any]
    costs: str
    peak: int
    """Bytes."""
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "settings": self.settings, "costs": self.costs, "peak": self.peak, "fits": self.fits
        }  # fmt: skip

    def in_words(self) -> str:
        """As flags."""
        return " ".join(
            f"--set {name}={_plain(value)}"
            if "." in name or isinstance(value, bool)
            else f"--{name.replace('_', '-')} {value}"
            for name, value in self.settings.items()
        )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def changes(
    config: Config, of: Rehearsal, now: Memory, overrides: Mapping[str, Any] | None = None
) -> list[Change]:
    """Those that help, the cheapest first: each by itself, and together as far as it takes.

    Args:
        now: of the run as it is.
    """
    found: list[Change] = []
    together: dict[str, Any] = {}
    costs: list[str] = []
    for settings, cost in _candidates(config, of):
        alone = _tried(config, settings, cost, overrides)
        if alone is None or alone.peak > (1 - _HELPS) * now.peak:
            continue
        found.append(alone)
        if alone.fits:
            break
        together |= settings
        costs.append(cost)
        if len(costs) > 1:
            all_of_it = _tried(config, dict(together), "; ".join(costs), overrides)
            if all_of_it is not None and all_of_it.peak < alone.peak:
                found.append(all_of_it)
                if all_of_it.fits:
                    break
    return found


def _candidates(config: Config, of: Rehearsal) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings and what they cost, in order of that."""
    parts = of.parts
    if config.dtype == "float64":
        yield {"dtype": "auto"}, "nothing but digits"
    budget = parts.micro_batch_tokens or 0
    for share in (4, 16):
        if budget // share >= 64:
            yield {"micro_batch_tokens": budget // share}, "the same results; a little slower"
    if config.reference_cache is False:
        yield {"reference_cache": True}, "a file on the disk"
    if config.dtype == "float32":
        yield {"dtype": "bfloat16"}, "products are rounded"
    if config.save_every is not None:
        yield {"save_every": None}, "a checkpoint is written only when the run is interrupted"
    if not config.activation_checkpointing:
        yield {"activation_checkpointing": True}, "about a third more time in training"
    if config.adapter is None:
        yield {"adapter": "lora"}, "fewer directions are learnt; another learning rate"
    if of.model.trunk.device.type == "cuda":
        four = {"adapter": {"kind": "lora", "quantize": "4bit"}}
        yield four, "the base model is rounded to 4 bits"
    samples = max(t.source.num_responses for t in parts.method.terms if t.source.draws or True)
    if any(t.source.on_policy for t in parts.method.terms) and samples > 2:
        yield {"samples_per_prompt": max(2, samples // 2)}, "noisier gradients"
    length = config.max_length or 1024
    if length // 2 >= _LEAST_LENGTH:
        yield {"max_length": length // 2}, "longer rows are dropped"


def _tried(
    config: Config, settings: Mapping[str, Any], cost: str, overrides: Mapping[str, Any] | None
) -> Change | None:
    """The change's memory by the same estimate; None where the run refuses it."""
    values = config.model_dump(exclude_unset=True) | dict(settings)
    values["max_rows"] = min(config.max_rows or ROWS, ROWS)
    try:
        of = rehearsal(configs.load({k: v for k, v in values.items() if v is not None}), overrides)
        found = memory(of, counted(of, most=UPDATES))
    except UserError:
        return None
    return Change(settings=dict(settings), costs=cost, peak=found.peak, fits=found.fits)
