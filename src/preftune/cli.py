"""The command line: reads flags, calls a function, prints what it returns."""

import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from preftune.errors import GuardStop, UserError, nearest

HELP = """usage: preftune COMMAND [--help]

  quickstart   the main job on what ships with it: train three methods, compare, report
  methods      the table of methods; one row in full with its name
  train        tune a model on preferences
  evaluate     reward, KL and win rate of a model on prompts
  sample       responses with log-probs (JSON lines), side by side with --versus
  inspect      template, tokens, loss mask and end token of real rows, before any training
  report       one HTML page of run folders
  env          versions and devices, for a bug report
"""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run a command in this process.

    Returns:
        0 done, 1 a fault of ours, 2 a user's error, 3 stopped by a guard, 130 interrupted.
    """
    try:
        return _dispatch(list(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except GuardStop as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # tyro: 0 after --help, 2 after a wrong flag
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            return _fault()
        where = f"'{error.filename}': " if error.filename else ""
        print(f"error: {where}{error.strerror}. Give another place.", file=sys.stderr)
        return 2
    except Exception:
        return _fault()


_OF_THE_MACHINE = {
    getattr(errno, n) for n in ("EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENOSPC", "EROFS", "EDQUOT")
}
"""No permission, no such kind of place, no room."""


def _fault() -> int:
    traceback.print_exc()
    print("This is a fault in preftune: please report it with `preftune env`.", file=sys.stderr)
    return 1


def _dispatch(args: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "quickstart": _quickstart, "methods": _methods, "train": _train, "evaluate": _evaluate,
        "sample": _sample, "inspect": _inspect, "report": _report, "env": _env,
    }  # fmt: skip
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] in ("--version", "-V"):
        from preftune import __version__

        print(__version__)
        return 0
    if args[0] not in commands:
        raise UserError(
            f"command '{args[0]}' is unknown.{nearest(args[0], commands)} See preftune --help."
        )
    return commands[args[0]](args[1:])


_JSON = ("json", bool, False, "print one JSON document and nothing else on stdout")


def _print(value: Any) -> None:
    from preftune.runs import dumps

    print(dumps(value))


def _quickstart(args: list[str]) -> int:
    from preftune import flags, inspecting, quickstart
    from preftune.progress import stderr

    _, own = flags.parse(
        "quickstart",
        "Train three methods on the embedded model and data, and compare them.",
        (),
        args,
        [("output", str, "runs/quickstart", "folder; an earlier quickstart's is replaced"), _JSON],
    )
    rows = quickstart.run(Path(own["output"]), stderr())
    if own["json"]:
        _print(rows)
    else:
        title = "Held-out prompts, 95 % intervals over prompts; this run only (one training seed)"
        inspecting.table(title, *quickstart.cells(rows))
        print(quickstart.NOTE)
        print(f"report: {Path(own['output']) / 'report.html'}")
    return 0


def _methods(args: list[str]) -> int:
    from preftune import commands, flags, inspecting

    name = args.pop(0) if args and not args[0].startswith("-") else None
    _, own = flags.parse(
        "methods", "The table of methods, or one row: preftune methods hypo.", (), args, [_JSON]
    )
    found = commands.method_table() if name is None else commands.method_row(name)
    if own["json"]:
        _print(found)
    elif isinstance(found, list):
        inspecting.methods(found)
    else:
        inspecting.method(found)
    return 0


def _settings(
    given: dict[str, Any], config_file: str | None, pairs: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """The configuration from a file, flags and --set, and the overrides below `terms`."""
    import yaml

    from preftune import config as configs

    values = configs.read_yaml(Path(config_file)) if config_file else {}
    values.update(given)
    overrides: dict[str, Any] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: must be PATH=VALUE, as terms.1.weight=0.3.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {pair}: the value is no plain YAML.") from error
        if path.startswith("terms."):
            overrides[path] = value
        elif path in configs.Config.model_fields:
            values[path] = value
        else:
            known = [*configs.Config.model_fields, "terms.0.weight"]
            raise UserError(f"--set {path}: there is no '{path}'.{configs.suggest(path, known)}")
    return values, overrides


def _train(args: list[str]) -> int:
    import tyro

    from preftune import config as configs
    from preftune import flags
    from preftune.progress import Progress, stderr, working

    many = tyro.conf.UseAppendAction[tuple[str, ...]]
    given, own = flags.parse(
        "train",
        "Tune a model on preferences with a row of the table (preftune methods).",
        flags.TRAIN,
        args,
        [
            ("config", str | None, None, "YAML file of settings; flags win"),
            ("set", many, (), "PATH=VALUE, e.g. terms.1.weight=0.3; may be repeated"),
            _JSON,
        ],
    )
    values, overrides = _settings(given, own["config"], own["set"])
    configs.load(values)  # before torch is loaded, which takes seconds
    console = stderr()
    with working(console, "loading"):
        from preftune.training import resumed, train
    with Progress(console) as bar:
        done = train(resumed(values), callbacks=[bar], overrides=overrides)
    if own["json"]:
        _print({"folder": str(done.folder), "metrics": done.metrics[-1] if done.metrics else {}})
    else:
        print(f"model: {done.folder / 'model'}\nreport: {done.folder / 'report.html'}")
    return 0


def _evaluate(args: list[str]) -> int:
    from preftune import commands, config, flags, inspecting
    from preftune.progress import Progress, stderr

    given, own = flags.parse(
        "evaluate",
        "Reward, KL to the reference, win rate and length on prompts.",
        flags.EVALUATE,
        args,
        [_JSON],
    )
    settings, console = config.load(given), stderr()
    with Progress(console) as bar:
        found, notes = commands.evaluate(settings, bar.tick("prompts"))
    for note in notes:
        console.print(note, markup=False, highlight=False)
    if own["json"]:
        _print(found)
        return 0
    cells = [
        [name, *("" if figure[k] is None else f"{figure[k]:.4g}" for k in ("value", "low", "high"))]
        for name, figure in found.items()
    ]
    inspecting.table("95 % intervals over prompts", ["figure", "value", "low", "high"], cells)
    return 0


def _sample(args: list[str]) -> int:
    from preftune import commands, config, flags
    from preftune.progress import Progress, stderr

    given, own = flags.parse(
        "sample",
        "Responses with log-probs, one JSON object a line.",
        flags.SAMPLE,
        args,
        [("versus", str | None, None, "another model, whose answers stand beside"), _JSON],
    )
    settings = config.load(given)
    with Progress(stderr()) as bar:
        rows = commands.sample(settings, own["versus"], bar.tick("prompts"))
    if own["json"]:
        _print(rows)
    else:
        for row in rows:
            _print(row)
    return 0


def _inspect(args: list[str]) -> int:
    from preftune import commands, config, flags
    from preftune.progress import stderr, working

    given, own = flags.parse(
        "inspect",
        "What the model would see: tokens, loss mask, end token, truncation.",
        flags.INSPECT,
        args,
        [("rows", int, 3, "rows shown token by token"), _JSON],
    )
    if own["rows"] < 0:
        raise UserError(f"flag '--rows': is {own['rows']}. Give 0 or more.")
    settings = config.load(given)
    with working(stderr(), "reading"):
        facts = commands.inspect(settings, own["rows"])
    if own["json"]:
        _print(facts)
        return 0
    from preftune.inspecting import show

    show(facts)
    return 0


def _report(args: list[str]) -> int:
    import tyro

    from preftune import flags
    from preftune.report import write_report

    _, own = flags.parse(
        "report",
        "One self-contained page of run folders.",
        (),
        args,
        [
            ("folders", tyro.conf.Positional[tuple[str, ...]], (), "run folders"),
            ("output", str | None, None, "the page; default: report.html in the first folder"),
        ],
    )
    folders = [Path(f) for f in own["folders"]]
    if not folders:
        raise UserError("report: give at least one run folder.")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"report: no such folder '{folder}'.")
    print(write_report(folders, Path(own["output"] or folders[0] / "report.html")))
    return 0


def _env(args: list[str]) -> int:
    from preftune import commands, flags

    _, own = flags.parse("env", "Versions and devices.", (), args, [_JSON])
    facts = commands.environment()
    if own["json"]:
        _print(facts)
        return 0
    for name, value in {
        **{k: v for k, v in facts.items() if k != "versions"},
        **facts["versions"],
    }.items():
        print(f"{name:14} {value if value not in (None, []) else 'none'}")
    return 0
