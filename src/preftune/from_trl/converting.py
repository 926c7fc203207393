"""TRL's settings into a preftune configuration, with a list of what differs and what is ignored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preftune import building
from preftune import config as configs
from preftune.from_trl import adapting, keeping, rows, rules
from preftune.from_trl.reading import Given, plain, unknown
from preftune.from_trl.rules import Back, Settings, Theirs, There
from preftune.from_trl.table import FIXED, IGNORED, MAPPED, Field, Table

RULES: Mapping[str, tuple[There, Back]] = {
    "model": (rules.model_there, rules.model_back),
    "data": (rules.data_there, rules.data_back),
    "batch_size": (rules.batch_there, rules.batch_back),
    "max_steps": (rules.max_steps_there, rules.max_steps_back),
    "warmup": (rules.warmup_there, rules.warmup_back),
    "schedule": (rules.schedule_there, rules.schedule_back),
    "optimizer": (rules.optimizer_there, lambda ours: {}),
    "max_grad_norm": (rules.norm_there, rules.norm_back),
    "weight_decay": (rules.decay_there, rules.decay_back),
    "precision": (rules.precision_there, rules.precision_back),
    "truncation": (keeping.length_there, keeping.length_back),
    "logging": (keeping.logging_there, keeping.logging_back),
    "saving": (keeping.saving_there, keeping.saving_back),
    "evaluation": (keeping.evaluation_there, keeping.evaluation_back),
    "rewards": (keeping.rewards_there, keeping.rewards_back),
    "template": (keeping.template_there, keeping.template_back),
    "device": (keeping.device_there, keeping.device_back),
    "recompute": (keeping.recompute_there, lambda ours: {}),
    "reference_cache": (keeping.cache_there, keeping.cache_back),
    "adapter": (adapting.adapter_there, adapting.adapter_back),
    "trackers": (adapting.trackers_there, adapting.trackers_back),
    "row": (rows.there, lambda ours: dict(ours.bound)),
}
ORDER = ("method", "model", "data", "reward", "output")
"""Settings that a reader looks for first."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A configuration, and what is to be known of how it came about."""

    trainer: str
    config: Settings
    mapped: list[dict[str, Any]] = field(default_factory=list)
    """{"trl", "value", "preftune", "given"}; given: by the user, not TRL's default."""
    differs: list[dict[str, Any]] = field(default_factory=list)
    """{"trl", "value", "preftune"}: what preftune does instead; `trl` is null of the whole run."""
    ignored: list[dict[str, Any]] = field(default_factory=list)
    """{"trl", "value", "why"}."""


def rule_of(row: Field) -> tuple[There, Back]:
    """How a field is converted."""
    return rules.same(row) if row.by == "same" else RULES[row.by]


def rule_name(row: Field) -> str:
    """Fields of one rule are converted together."""
    return row.name if row.by == "same" else row.by


def convert(table: Table, given: Given) -> Converted:
    """The configuration with which preftune does what TRL would.

    Raises:
        UserError: a value that cannot be, or a loss that preftune does not have.
    """
    found = unchecked(table, given)
    building.method_of(configs.load(found.config))
    return found


def unchecked(table: Table, given: Given) -> Converted:
    """The same, for values that come from a configuration."""
    trainer = table.trainers[given.trainer]
    own = table.of(given.trainer)
    values = {n: plain(own.get(n), v) for n, v in given.values.items()}
    whole = {n: f.defaults[given.trainer] for n, f in own.items() if given.trainer in f.defaults}
    known = {n: v for n, v in values.items() if n in own}
    theirs = Theirs(trainer=trainer, values=whole | known, given=frozenset(known))
    found = Converted(trainer=given.trainer, config={})
    for name, why in unknown(table, given.trainer, (n for n in values if n not in own)).items():
        found.ignored.append({"trl": name, "value": values[name], "why": why})
    settings, notes, of_rule = _applied(theirs, own)
    for name, note in notes.items():
        value = theirs.values.get(name)
        found.differs.append({"trl": name, "value": value, "preftune": note})
    told = {rule_name(own[n]) for n in theirs.given if own[n].kind == MAPPED}
    for row in own.values():
        _listed(found, theirs, row, of_rule, told)
    found.differs.extend({"trl": None, "value": None, "preftune": n} for n in trainer.differs)
    found.config.update({k: settings[k] for k in ORDER if k in settings} | settings)
    return found


def _applied(
    theirs: Theirs, own: Mapping[str, Field]
) -> tuple[Settings, rules.Notes, dict[str, Settings]]:
    """What all rules give, and what each gives."""
    settings, notes = rows.there(theirs)  # a trainer without any setting of its row has one, too
    of_rule: dict[str, Settings] = {"row": dict(settings)}
    for name, row in own.items():
        key = rule_name(row)
        if row.kind != MAPPED or key in of_rule or (row.given and name not in theirs.given):
            continue
        of_rule[key], differing = rule_of(row)[0](theirs)
        settings |= of_rule[key]
        notes |= differing
    return settings, notes, of_rule


def _listed(
    found: Converted, theirs: Theirs, row: Field, of_rule: Mapping[str, Settings], told: set[str]
) -> None:
    """Put a field where it belongs among what is mapped, differs or is ignored.

    Args:
        told: rules with a field among what is mapped; of defaults one stands for its rule.
    """
    given, value = row.name in theirs.given, theirs.values.get(row.name)
    if row.kind == IGNORED and given:
        found.ignored.append({"trl": row.name, "value": value, "why": row.why})
    elif row.kind == FIXED:
        moot = row.unless and all(theirs.values.get(k) == v for k, v in row.unless.items())
        if value not in row.ours and not moot:
            ours = "none" if row.ours[0] is None else str(row.ours[0]).lower()
            said = row.why if ours in ("none", "true", "false") else f"{ours}: {row.why}"
            found.differs.append({"trl": row.name, "value": value, "preftune": said})
        elif given:
            found.mapped.append({"trl": row.name, "value": value, "preftune": {}, "given": True})
    elif row.kind == MAPPED:
        became = of_rule.get(key := rule_name(row), {})
        if given or (became and value not in (None, []) and key not in told):
            found.mapped.append(
                {"trl": row.name, "value": value, "preftune": became, "given": given}
            )
            told.add(key)
