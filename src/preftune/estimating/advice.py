"""What to change where a run will not fit, what each change would bring, and what it costs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from preftune import config as configs
from preftune.config import Config
from preftune.errors import UserError
from preftune.estimating.counts import Rehearsal, counted, rehearsal
from preftune.estimating.memory import Memory, memory
from preftune.loading import DEFAULT_MAX_LENGTH

ROWS = 2000
"""Of the data that are gone through for a change: their longest stand for all."""
UPDATES = 32
_HELPS = 0.01
"""Of the peak, what a change must save to be named."""
LEAST = 64
"""Tokens of a row or micro-batch below which nothing is suggested."""


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
            f"--set {path}={value}" if "." in path else f"--{path.replace('_', '-')} {value}"
            for path, value in _flat(self.settings)
        )


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Paths and values, as they are typed."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", str(inner)) for key, inner in value.items())
        elif value is None:
            yield f"{name}", "(leave it out)"
        else:
            yield name, str(value).lower() if isinstance(value, bool) else str(value)


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
        if alone is None or alone.peak >= (1 - _HELPS) * now.peak:
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
    sources = [t.source for t in of.parts.method.terms]
    budget = of.parts.micro_batch_tokens or 0
    samples = max((s.num_responses for s in sources if s.on_policy), default=0)
    length = config.max_length or DEFAULT_MAX_LENGTH
    four = {"adapter": {"kind": "lora", "quantize": "4bit"}}
    less = "the same results, a little slower"
    table: list[tuple[bool, dict[str, Any], str]] = [
        (config.dtype == "float64", {"dtype": "auto"}, "digits that training does not need"),
        (budget // 4 >= LEAST, {"micro_batch_tokens": budget // 4}, less),
        (budget // 16 >= LEAST, {"micro_batch_tokens": budget // 16}, less),
        (config.reference_cache is False, {"reference_cache": True}, "a file on the disk"),
        (config.dtype == "float32", {"dtype": "bfloat16"}, "products are rounded"),
        (config.save_every is not None, {"save_every": None}, "checkpoints at interruptions only"),
        (not config.activation_checkpointing, {"activation_checkpointing": True},
         "about a third more time in training"),
        (config.adapter is None, {"adapter": "lora"}, "fewer directions to learn in"),
        (of.model.trunk.device.type == "cuda", four, "a base model rounded to 4 bits"),
        (samples > 2, {"samples_per_prompt": max(2, samples // 2)}, "noisier gradients"),
        (length // 2 >= LEAST, {"max_length": length // 2}, "longer rows are dropped"),
    ]  # fmt: skip
    return ((settings, cost) for applies, settings, cost in table if applies)


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
