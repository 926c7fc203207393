"""The command line: reads flags, calls a function, prints what it returns."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from preftune import startup
from preftune.cli_train import JSON, print_json, reward, train
from preftune.errors import Elsewhere, GuardStop, Saved, UserError, exit_code, nearest

HELP = """usage: preftune COMMAND [--help]

  quickstart   the main job on what ships with it: train three methods, compare, report
  methods      the table of methods; one row in full with its name
  train        tune a model on preferences
  reward       train a Bradley-Terry reward model on preferences
  evaluate     reward, KL, win rate and more of a model on prompts
  sample       responses with log-probs (JSON lines), side by side with --versus
  label        two fresh samples side by side on a local page: preferences by people
  diagnose     what reference, data and reward look like, and which method that suggests
  compare      several methods at the same budget, several seeds: which one, and by how much
  advise-study what that suggestion is worth, on problems drawn or given
  estimate     memory and time of a run before it runs; what to change where it will not fit
  inspect      template, tokens, loss mask and end token of real rows, before any training
  pipeline     the papers' critical path: imitate, learn a reward, optimise it, judge by another
  reproduce    the papers' claims, run again: claim, measured, verdict
  merge        the full model of a run with an adapter, or of a PEFT folder
  report       one HTML page of run folders
  import-trl   TRL's YAML or command line as a preftune config; what differs or is ignored
  export-trl   a preftune config as YAML for TRL
  launch       a run in several processes: here, on Slurm or on SkyPilot
  env          versions and devices, for a bug report
  completion   what bash, zsh or fish offers after preftune: source <(preftune completion bash)
"""


def main() -> None:
    """The console script."""
    if sys.argv[1:2] and sys.argv[1] in _COMPUTING and not {"-h", "--help"} & set(sys.argv):
        startup.restart()
    sys.exit(run(sys.argv[1:]))


_COMPUTING = {
    "quickstart", "train", "diagnose", "advise-study", "reward", "evaluate", "sample", "reproduce",
    "pipeline", "compare", "estimate",
}  # fmt: skip
"""Commands whose time is that of large tensors."""


def run(args: Sequence[str]) -> int:
    """Run a command in this process.

    Returns:
        0 done, 1 a fault of ours, 2 a user's error, 3 stopped by a guard, 75 saved on SIGTERM or
        SIGUSR1, 130 interrupted.
    """
    try:
        return _as_one_of_many(list(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except GuardStop as error:
        print(f"stopped: {error}", file=sys.stderr)
        return exit_code(error)
    except Saved as ended:
        print(f"saved: {ended}", file=sys.stderr)
        return exit_code(ended)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return exit_code(stop)
    except (SystemExit, Elsewhere) as stop:  # tyro: 0 after --help, 2 after a wrong flag
        return exit_code(stop)
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


def _as_one_of_many(args: list[str]) -> int:
    """The command, which several processes may do together; the main one speaks."""
    if startup.place()[1] == 1:
        return _dispatch(args)
    with ExitStack() as held:
        if startup.place()[0]:
            held.enter_context(redirect_stdout(held.enter_context(open(os.devnull, "w"))))
        if not args or args[0] not in _COMPUTING:
            return _dispatch(args)
        from preftune.team import together

        with together():
            if args[0] not in ("train", "reward"):
                raise UserError(
                    f"command '{args[0]}': works in one process. Start it without accelerate."
                )
            return _dispatch(args)


_OF_THE_MACHINE = {
    getattr(errno, n) for n in ("EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENOSPC", "EROFS", "EDQUOT")
}
"""No permission, no such kind of place, no room."""


def _fault() -> int:
    traceback.print_exc()
    print("This is a fault in preftune: please report it with `preftune env`.", file=sys.stderr)
    return 1


def _commands() -> dict[str, Callable[[list[str]], int]]:
    return {
        "quickstart": _quickstart, "methods": _methods, "train": train,
        "reward": reward, "evaluate": _evaluate,
        "sample": _sample, "label": _label, "diagnose": _diagnose, "advise-study": _advise_study,
        "compare": _compare, "estimate": _estimate,
        "inspect": _inspect,
        "pipeline": _pipeline, "reproduce": _reproduce, "report": _report,
        "merge": _merge, "env": _env,
        "import-trl": _import_trl, "export-trl": _export_trl, "completion": _completion,
        "launch": _launch,
    }  # fmt: skip


def _dispatch(args: list[str]) -> int:
    commands = _commands()
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


def _compare(args: list[str]) -> int:
    from preftune.cli_compare import compare

    return compare(args)


def _advise_study(args: list[str]) -> int:
    from preftune.cli_advise import advise_study

    return advise_study(args)


def _quickstart(args: list[str]) -> int:
    from preftune import flags, inspecting, quickstart
    from preftune.progress import stderr

    _, own = flags.parse(
        "quickstart",
        "Train three methods on the embedded model and data, and compare them.",
        (),
        args,
        [("output", str, "runs/quickstart", "folder; an earlier quickstart's is replaced"), JSON],
    )
    rows = quickstart.run(Path(own["output"]), stderr())
    if own["json"]:
        print_json(rows)
    else:
        title = "Held-out prompts, 95 % intervals over prompts; this run only (one training seed)"
        inspecting.table(title, *quickstart.cells(rows))
        print(quickstart.NOTE)
        print(f"before training: {Path(own['output']) / 'diagnosis.html'}")
        print(f"report: {Path(own['output']) / 'report.html'}")
    return 0


def _pipeline(args: list[str]) -> int:
    from preftune import config, flags, inspecting
    from preftune.progress import Progress, stderr, working

    given, own = flags.parse(
        "pipeline",
        "Imitate, learn a reward from half of the pairs, optimise it by several methods, and judge "
        "them by a reward of the other half.",
        flags.PIPELINE, args, [JSON],
    )  # fmt: skip
    output = Path(given.pop("output", "runs/pipeline"))
    settings, console = config.load(given), stderr()
    with working(console, "loading"):
        from preftune import pipeline

    def say(stage: str) -> None:
        console.print(f"stage: {stage}", markup=False, highlight=False)

    with Progress(console) as bar:
        page = pipeline.run(settings, output, say=say, follow=bar)
    found = pipeline.evaluations(output)
    if own["json"]:
        print_json(found)
        return 0
    for name, figures in found.items():
        inspecting.figures(f"{name}: 95 % intervals over prompts, one training seed", figures)
    print(f"page: {page}")
    return 0


def _methods(args: list[str]) -> int:
    from preftune import commands, flags, inspecting

    name = args.pop(0) if args and not args[0].startswith("-") else None
    _, own = flags.parse(
        "methods", "The table of methods, or one row: preftune methods hypo.", (), args, [JSON]
    )
    found = commands.method_table() if name is None else commands.method_row(name)
    if own["json"]:
        print_json(found)
    elif isinstance(found, list):
        inspecting.methods(found)
    else:
        inspecting.method(found)
    return 0


def _evaluate(args: list[str]) -> int:
    from preftune import config, flags, inspecting
    from preftune.progress import Progress, stderr, working

    given, own = flags.parse(
        "evaluate",
        "Reward, KL to the reference, win rate, best-of-n and more, as far as what is given goes.",
        flags.EVALUATE,
        args,
        [("best_of_n", int | None, None, _BEST_OF), JSON],
    )
    if own["best_of_n"] is not None and own["best_of_n"] < 0:
        raise UserError(f"flag '--best-of-n': is {own['best_of_n']}. Give 0 or more.")
    settings, console = config.load(given), stderr()
    with working(console, "loading"):
        from preftune.evaluating import evaluate
    with Progress(console) as bar:
        found, notes = evaluate(settings, bar.tick, own["best_of_n"])
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if own["json"]:
        print_json(found)
        return 0
    inspecting.figures("95 % intervals over prompts; this run only (one training seed)", found)
    return 0


_BEST_OF = "reference samples a prompt; 0: no best-of-n; default: 16 on some of the prompts"


def _sample(args: list[str]) -> int:
    from preftune import commands, config, flags
    from preftune.progress import Progress, stderr

    given, own = flags.parse(
        "sample",
        "Responses with log-probs, one JSON object a line.",
        flags.SAMPLE,
        args,
        [("versus", str | None, None, "another model, whose answers stand beside"), JSON],
    )
    settings = config.load(given)
    with Progress(stderr()) as bar:
        rows = commands.sample(settings, own["versus"], bar.tick("prompts"))
    if own["json"]:
        print_json(rows)
    else:
        for row in rows:
            print_json(row)
    return 0


def _label(args: list[str]) -> int:
    from preftune.cli_label import label

    return label(args)


def _diagnose(args: list[str]) -> int:
    from preftune.cli_diagnose import diagnose

    return diagnose(args)


def _estimate(args: list[str]) -> int:
    from preftune.cli_estimate import estimate

    return estimate(args)


def _inspect(args: list[str]) -> int:
    from preftune import commands, config, flags
    from preftune.progress import stderr, working

    given, own = flags.parse(
        "inspect",
        "What the model would see: tokens, loss mask, end token, truncation.",
        flags.INSPECT,
        args,
        [("rows", int, 3, "rows shown token by token"), JSON],
    )
    if own["rows"] < 0:
        raise UserError(f"flag '--rows': is {own['rows']}. Give 0 or more.")
    settings = config.load(given)
    with working(stderr(), "reading"):
        facts = commands.inspect(settings, own["rows"])
    if own["json"]:
        print_json(facts)
        return 0
    from preftune.inspecting import show

    show(facts)
    return 0


def _merge(args: list[str]) -> int:
    from preftune.cli_train import merge

    return merge(args)


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


def _reproduce(args: list[str]) -> int:
    from preftune.cli_reproduce import reproduce

    return reproduce(args)


def _launch(args: list[str]) -> int:
    from preftune.cli_launch import launch

    return launch(args)


def _import_trl(args: list[str]) -> int:
    from preftune.cli_trl import import_trl

    return import_trl(args)


def _export_trl(args: list[str]) -> int:
    from preftune.cli_trl import export_trl

    return export_trl(args)


def _env(args: list[str]) -> int:
    from preftune import commands, flags

    _, own = flags.parse("env", "Versions and devices.", (), args, [JSON])
    facts = commands.environment()
    if own["json"]:
        print_json(facts)
        return 0
    for name, value in {
        **{k: v for k, v in facts.items() if k != "versions"},
        **facts["versions"],
    }.items():
        print(f"{name:14} {value if value not in (None, []) else 'none'}")
    return 0


def _completion(args: list[str]) -> int:
    import tyro

    from preftune import completion, flags

    _, own = flags.parse(
        "completion",
        "What a shell reads to complete preftune: source <(preftune completion bash).",
        (),
        args,
        [("shell", tyro.conf.Positional[tuple[str, ...]], (), "bash, zsh or fish")],
    )
    if len(own["shell"]) != 1 or own["shell"][0] not in completion.SHELLS:
        raise UserError(f"completion: name one shell: {', '.join(completion.SHELLS)}.")
    from preftune import methods

    found = completion.offered(_commands(), list(methods.table()))
    print(completion.script(own["shell"][0], found), end="")
    return 0
