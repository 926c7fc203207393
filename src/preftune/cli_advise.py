"""preftune advise-study: what the advice of `diagnose` is worth, on problem files."""

from pathlib import Path
from typing import Any

from preftune.cli_train import JSON, print_json
from preftune.errors import UserError
from preftune.runs import unnamed

FLAGS = [
    ("draw", int | None, None, "write so many problem files to OUTPUT, and run nothing"),
    ("texts", int, 0, "with --draw: also so many whose reference is a small language model"),
    ("problems", str | None, None, "folder of problem files to run"),
    ("fit", bool, False, "fit rules anew, each judged on a family that it has not seen; without "
     "it the shipped rule is measured as it is"),
    ("seed_base", int, 0, "moves every seed, of drawing and of running"),
    ("workers", int, 2, "processes, one thread each"),
    ("output", str | None, None, "folder, gone on with if it is there; default: "
     "runs/advise-study-<UTC time>"),
    JSON,
]  # fmt: skip


def advise_study(args: list[str]) -> int:
    """The command."""
    from preftune import flags
    from preftune.cli_reproduce import sparse
    from preftune.progress import Progress, stderr, working

    text = "Run every candidate on problem files, and measure the regret of the advice."
    _, own = flags.parse("advise-study", text, (), args, FLAGS)
    _check(own)
    console = stderr()
    with working(console, "loading"):
        from preftune.advising import report, study
    output = Path(own["output"]) if own["output"] else unnamed("advise-study")
    with Progress(console) as bar:

        def tick(stage: str) -> Any:
            return sparse(bar.tick(stage))

        if own["problems"] is None:
            names = study.draw(own["draw"], output, own["seed_base"], tick("problems"),
                               of_text=own["texts"])  # fmt: skip
            _print_drawn(names, output, own["json"])
            return 0
        done = study.run(
            Path(own["problems"]), output, seed_base=own["seed_base"], workers=own["workers"],
            tuned=None if own["fit"] else report.shipped_tuning(), tick=tick,
        )  # fmt: skip
        result = report.conclude(done, output, fit=own["fit"])
    if own["json"]:
        print_json(result)
        return 0
    print("\n".join(report.lines(result)))
    print(f"page: {output / 'advice.html'}")
    return 0


def _print_drawn(names: list[str], folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({"problems": names, "folder": str(folder)})
    else:
        print(f"{len(names)} problems in {folder}; run them with --problems {folder}")


def _check(own: dict[str, Any]) -> None:
    if (own["draw"] is None) == (own["problems"] is None):
        raise UserError(
            "advise-study: give --draw N to write problem files, or --problems DIR to run some."
        )
    if own["draw"] is not None and (own["texts"] < 0 or own["draw"] + own["texts"] < 1):
        raise UserError(f"flag '--draw': is {own['draw']}. Give 1 or more, or --texts beside 0.")
    if own["draw"] is None and own["texts"]:
        raise UserError("flag '--texts': goes with --draw N (0 for none but them).")
    if own["seed_base"] < 0 or own["workers"] < 1:
        raise UserError("flags '--seed-base' and '--workers': give 0 or more, and 1 or more.")
