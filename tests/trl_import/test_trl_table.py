"""Every setting of the installed TRL has a row in the table, with TRL's default."""

import dataclasses
import importlib
import importlib.util

import pytest

from preftune.config import Config
from preftune.from_trl import table
from preftune.from_trl.converting import RULES
from preftune.from_trl.table import MAPPED

TABLE = table()
HAS_TRL = importlib.util.find_spec("trl") is not None


def of_trl(where: str) -> dict[str, object]:
    """Defaults by name of a dataclass of TRL's."""
    module, _, name = where.rpartition(".")
    found = {}
    for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
        made = field.default_factory
        found[field.name] = field.default if made is dataclasses.MISSING else made()
    return found


@pytest.fixture(scope="module")
def commons() -> dict[str, object]:
    """Settings of every command of TRL's."""
    names = ("trl.ModelConfig", "trl.ScriptArguments", "trl.DatasetMixtureConfig")
    return {k: v for name in names for k, v in of_trl(name).items()}


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed: the table is not compared with it")
@pytest.mark.parametrize("trainer", TABLE.trainers)
def test_every_setting_has_a_row_and_its_default(trainer, commons):
    theirs = commons | of_trl(TABLE.trainers[trainer].config)
    rows = TABLE.of(trainer)
    now = {n for n, f in rows.items() if not (f.older or f.launcher or f.script)}
    assert set(theirs) - now == set(), "TRL has settings that fields.yaml does not"
    assert now - set(theirs) == set(), "fields.yaml has settings that TRL does not (mark as older)"
    defaults = {n: f.defaults[trainer] for n, f in rows.items() if n in now and f.defaults}
    assert defaults == {n: getattr(theirs[n], "value", theirs[n]) for n in defaults}


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed: the table is not compared with it")
def test_the_table_is_of_the_installed_version():
    import trl

    assert trl.__version__.startswith(TABLE.version)


def test_rows_are_whole():
    for row in TABLE.fields:
        assert row.kind == MAPPED or row.why, row.name
        assert row.kind != MAPPED or row.to, row.name
        assert row.by in RULES or row.by == "same", row.name
        assert row.by != "same" or row.kind != MAPPED or row.to in Config.model_fields, row.name
        assert set(row.of) <= set(TABLE.trainers), row.name


@pytest.mark.parametrize("trainer", TABLE.trainers)
def test_a_trainer_has_each_setting_once(trainer):
    names = [f.name for f in TABLE.fields if trainer in f.of]
    assert sorted(names) == sorted(set(names))
