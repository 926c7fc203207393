"""A preftune configuration into TRL's settings, with a list of what does not go along."""

from dataclasses import dataclass
from typing import Any

from preftune import methods
from preftune.config import Config
from preftune.from_trl import rows
from preftune.from_trl.converting import ORDER, rule_name, rule_of, unchecked
from preftune.from_trl.reading import Given
from preftune.from_trl.rules import Ours
from preftune.from_trl.table import FIXED, MAPPED, Table

_SHOWN_FIRST = ("model_name_or_path", "dataset_name", "datasets", "output_dir")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """TRL's settings, and what is to be known of them."""

    trainer: str
    config: dict[str, Any]
    """By TRL's names."""
    lost: list[dict[str, Any]]
    """{"preftune", "value", "trl"}: settings that TRL's run would not follow, and what it does."""
    differs: list[str]
    """Of every run of this trainer."""


def export(table: Table, config: Config) -> Exported:
    """TRL's settings with which it does what preftune would.

    Raises:
        UserError: TRL has no such method, or cannot name such a reward.
    """
    found = rows.match(table.trainers, config)
    trainer = found.trainer
    own = table.of(trainer.name)
    whole = _complete(config)
    current = [n for n, f in own.items() if not f.older and not f.launcher]
    ours = Ours(trainer=trainer, config=whole, bound=found.bound, fields=frozenset(current))
    out: dict[str, Any] = {}
    done: set[str] = set()
    for name in current:
        row = own[name]
        key = rule_name(row)
        if row.kind == FIXED and row.defaults[trainer.name] not in row.ours:
            out[name] = row.ours[0]
        elif row.kind == MAPPED and key not in done:
            done.add(key)
            out |= rule_of(row)[1](ours)
    round_of = out.pop("prompts_per_round", None)
    if round_of is not None:
        out["generation_batch_size"] = round_of * found.bound["num_generations"]
    out = {n: v for n, v in out.items() if v is not None}
    names = [*(n for n in _SHOWN_FIRST if n in out), *(n for n in own if n not in _SHOWN_FIRST)]
    ordered = {n: out[n] for n in names if n in out}
    return Exported(
        trainer=trainer.name, config=ordered, differs=list(trainer.differs),
        lost=_lost(table, trainer.name, config, whole, ordered),
    )  # fmt: skip


def _complete(config: Config) -> Config:
    """With the learning rate that the row brings along."""
    row = methods.table().get(config.method) if isinstance(config.method, str) else None
    rate = config.learning_rate or (row.defaults if row else {}).get("learning_rate", 1e-6)
    return config.model_copy(update={"learning_rate": rate})


def _lost(
    table: Table, trainer: str, config: Config, whole: Config, values: dict[str, Any]
) -> list[dict[str, Any]]:
    """Settings given that come back otherwise when TRL's are read again."""
    back = Config(**unchecked(table, Given(trainer=trainer, values=values)).config)
    apart = {n for n in rows.OF_ROW if getattr(config, n) != getattr(back, n)}
    if apart and rows.same_row(config, back):  # a row spelled out and a named one, say
        apart = set()
    out = []
    for name in [*ORDER, *sorted(config.model_fields_set - set(ORDER))]:
        mine, other = getattr(whole, name), getattr(back, name)
        if mine == other or name not in config.model_fields_set:
            continue
        if name in rows.OF_ROW and name not in apart:
            continue
        out.append({"preftune": name, "value": mine, "trl": other})
    return out
