"""Who competes: rows of the table, or a row with settings of its own under a name of its own."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preftune import config as configs
from preftune.building import method_of
from preftune.config import Config
from preftune.errors import UserError

SHARED = (
    "model", "reference", "reward", "reward_weights", "gold", "label_source", "data", "eval_data",
    "prompts", "max_rows", "bad_rows", "follow", "seed", "max_new_tokens", "min_new_tokens", "stop",
    "temperature", "top_p", "top_k", "template", "system_prompt", "max_length", "truncation",
    "device", "threads",
)  # fmt: skip
"""Settings that all methods have alike: what they start from, are trained on and are judged by."""
DECIDED = ("max_steps", "epochs", "eval_fraction", "eval_every", "best_by", "output", "resume")
"""Settings of a run that the comparison itself makes."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A competitor."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its own, `method` among them."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of its terms, by dotted path."""

    def config(self, common: Mapping[str, Any]) -> Config:
        """Its settings whole.

        Raises:
            UserError: they do not fit together.
        """
        return configs.load({**common, **self.settings})


def make(
    names: Sequence[str],
    common: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]],
    overrides: Mapping[str, Any],
) -> list[Entry]:
    """The competitors, each checked.

    Args:
        names: of `--methods`; all of `own` if empty.
        common: settings of all.
        own: by name, settings of one; where none of them is `method`, the name is a row's.
        overrides: dotted paths to values from --set; those that begin with a competitor's name are
            its own.

    Raises:
        UserError: too few, an unknown name, settings that do not fit.
    """
    listed = list(names) or list(own)
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise UserError(f"--methods: '{twice[0]}' is given twice.")
    if len(listed) < 2:
        raise UserError("--methods: give two or more, as --methods dpo,on_policy_dpo.")
    strangers = [name for name in own if name not in listed]
    if strangers:
        raise UserError(f"methods: '{strangers[0]}' has settings and is not among --methods.")
    found = [_entry(name, own.get(name, {}), overrides, listed) for name in listed]
    for entry in found:
        _check_own(entry)
        _check(entry, common)
    return found


def _entry(
    name: str, own: Mapping[str, Any], overrides: Mapping[str, Any], listed: Sequence[str]
) -> Entry:
    if _NAME.fullmatch(name) is None:
        raise UserError(f"--methods: '{name}' is no name. Use letters, digits and _ . + -")
    settings: dict[str, Any] = {"method": name, **own}
    terms: dict[str, Any] = {}
    for path, value in overrides.items():
        first, _, rest = path.partition(".")
        whose, place = (first, rest) if first in listed and rest else (name, path)
        if whose != name:
            continue
        if place.startswith("terms."):
            terms[place] = value
        elif place in Config.model_fields:
            settings[place] = value
        else:
            known = [
                *Config.model_fields,
                "terms.0.weight",
                *(f"{n}.terms.0.weight" for n in listed),
            ]
            raise UserError(f"--set {path}: there is no '{place}'.{configs.suggest(place, known)}")
    return Entry(name=name, settings=settings, overrides=terms)


def _check_own(entry: Entry) -> None:
    """A method's own settings leave what it is compared by alone."""
    for key in entry.settings:
        if key in SHARED:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(
                f"{entry.name}: '{key}' of one method would make its figures those of something "
                f"else. Leave it out there, and give it for all of them, as {flag}."
            )
        if key in DECIDED:
            raise UserError(f"{entry.name}: '{key}' is what compare decides. Leave it out.")


def _check(entry: Entry, common: Mapping[str, Any]) -> None:
    try:
        config = entry.config(common)
        row = method_of(config, entry.overrides)
    except UserError as error:
        raise UserError(f"{entry.name}: {error}") from error
    if "score" in row.outputs:
        raise UserError(f"--methods: '{entry.name}' trains a model of a reward, no policy.")
    drawing = [t for t in row.terms if "reward" in t.needs and t.source.draws]
    if drawing and config.reward is None:
        raise UserError(
            f"{entry.name}: it judges responses and needs a reward, e.g. --reward length:within=20."
        )
