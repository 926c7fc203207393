"""`preftune import-trl` and `preftune export-trl` on the command line."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.cli_train import JSON, print_json
from preftune.errors import UserError

OUTPUT = ("output", str | None, None, "a file to write; default: standard output")


def import_trl(args: Sequence[str]) -> int:
    """Print a preftune configuration; what differs and what is ignored goes to stderr."""
    import tyro

    from preftune import flags
    from preftune import from_trl as trl

    before, after = _split(list(args))
    table = trl.table()
    _, own = flags.parse(
        "import-trl",
        "Turn a configuration of TRL's into one of preftune's: a YAML file, or a command line "
        "behind --, as preftune import-trl -- trl dpo --beta 0.2.",
        (),
        before,
        [
            ("file", tyro.conf.Positional[str | None], None, "TRL's YAML file, or a command line"),
            ("trainer", str | None, None, f"one of {', '.join(table.trainers)}"),
            OUTPUT,
            JSON,
        ],
    )
    found = trl.convert(table, trl.read(table, own["file"], after, own["trainer"]))
    text = f"# TRL {table.version}'s {found.trainer}, by preftune import-trl\n"
    text += _yaml(found.config)
    if own["output"]:
        _write(own["output"], text)
    if own["json"]:
        print_json({
            "trainer": found.trainer, "config": found.config, "mapped": found.mapped,
            "differs": found.differs, "ignored": found.ignored,
        })  # fmt: skip
        return 0
    if not own["output"]:
        print(text, end="")
    _say("mapped", [_mapped(m) for m in found.mapped if m["given"]])
    _say("TRL's defaults, written out", [_mapped(m) for m in found.mapped if not m["given"]])
    _say("differs", [_differs(d) for d in found.differs])
    _say("ignored", [f"{i['trl']}: {i['value']!s:.60} ({i['why']})" for i in found.ignored])
    return 0


def export_trl(args: Sequence[str]) -> int:
    """Print TRL's YAML for a preftune configuration, with the command that takes it."""
    import tyro

    from preftune import config as configs
    from preftune import flags
    from preftune import from_trl as trl

    _, own = flags.parse(
        "export-trl",
        "Turn a configuration of preftune's into YAML for TRL's command line.",
        (),
        args,
        [("file", tyro.conf.Positional[str | None], None, "preftune's YAML file"), OUTPUT, JSON],
    )
    if own["file"] is None:
        raise UserError("export-trl: give a YAML file of preftune's.")
    found = trl.export(trl.table(), configs.load(own["file"]))
    text = f"# trl {found.trainer.replace('_', '-')} --config {own['output'] or 'FILE'}\n"
    text += _yaml(found.config)
    if own["output"]:
        _write(own["output"], text)
    if own["json"]:
        print_json({
            "trainer": found.trainer, "config": found.config, "lost": found.lost,
            "differs": found.differs,
        })  # fmt: skip
        return 0
    if not own["output"]:
        print(text, end="")
    _say("does not go along", [
        f"{x['preftune']}: {x['value']!s:.60} (TRL's run: {x['trl']!s:.60})" for x in found.lost
    ])  # fmt: skip
    _say("differs", found.differs)
    return 0


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and the command line behind it."""
    if "--" not in args:
        return args, []
    at = args.index("--")
    return args[:at], args[at + 1 :]


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _write(path: str, text: str) -> None:
    from preftune.durable import write_text

    place = Path(path)
    if place.is_dir():
        raise UserError(f"output '{path}': is a folder. Give a file.")
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, text)


def _mapped(entry: dict[str, Any]) -> str:
    became = ", ".join(f"{k}: {_brief(v)}" for k, v in entry["preftune"].items())
    return f"{entry['trl']}: {entry['value']!s:.60} -> {became or 'what preftune does'}"


def _brief(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value!s:.60}"
    if "name" in value:  # a row
        return f"{value['name']}, spelled out"
    return ", ".join(f"{k} {v}" for k, v in value.items())


def _differs(entry: dict[str, Any]) -> str:
    if entry["trl"] is None:
        return entry["preftune"]
    return f"{entry['trl']}: TRL {entry['value']!s:.60}, preftune {entry['preftune']}"


def _say(title: str, lines: Sequence[str]) -> None:
    """A list on stderr, where it has an entry."""
    if lines:
        print("\n".join([f"{title}:", *(f"  {line}" for line in lines)]), file=sys.stderr)
