"""preftune reproduce: the papers' claims with their verdicts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from preftune.cli_train import JSON, print_json
from preftune.errors import UserError
from preftune.runs import unnamed

FLAGS = [
    ("list", bool, False, "print the claims, run nothing"),
    ("full", bool, False, "the rest of each claim's grid and its second model size too"),
    ("seed_base", int, 0, "added to every seed"),
    ("workers", int, 2, "processes, one thread each; 0: this one alone"),
    ("output", str | None, None, "folder; default: runs/reproduce-<UTC time>"),
    ("resume", bool, False, "go on with the folder given as --output"),
    JSON,
]


def reproduce(args: list[str]) -> int:
    """The command."""
    import tyro

    from preftune import flags, inspecting
    from preftune.progress import Progress, stderr, working

    text = "Run the papers' claims and say which hold; all of them if none is named."
    ids = ("ids", tyro.conf.Positional[tuple[str, ...]], (), "claims, or a group: bandits")
    _, own = flags.parse("reproduce", text, (), args, [ids, *FLAGS])
    for name in ("seed_base", "workers"):
        if own[name] < 0:
            raise UserError(f"flag '--{name.replace('_', '-')}': is {own[name]}. Give 0 or more.")
    console = stderr()
    with working(console, "loading"):
        from preftune.reproduce import runner
    if own["list"]:
        _show(runner.claims_listed(own["ids"], own["full"]), own["json"], inspecting)
        return 0
    if own["resume"] and own["output"] is None:
        raise UserError("--resume: say which folder with --output.")
    folder = Path(own["output"]) if own["output"] else unnamed("reproduce")
    with Progress(console) as bar:
        done = runner.reproduce(
            own["ids"], folder=folder, full=own["full"], seed_base=own["seed_base"],
            workers=own["workers"], resume=own["resume"], tick=sparse(bar.tick("run-updates")),
        )  # fmt: skip
    _show(done.rows, own["json"], inspecting)
    if not own["json"]:
        print(f"page: {done.page}")
    for key, why in done.failed.items():
        console.print(f"failed: {key}: {why}", markup=False, highlight=False)
    return 1 if done.failed else 0


def sparse(tick: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Only each twentieth of the way: without a terminal every call is a line."""
    shown = -1

    def told(done: int, total: int) -> None:
        nonlocal shown
        if 20 * done // max(1, total) > shown:
            shown = 20 * done // max(1, total)
            tick(done, total)

    return told


def _show(rows: list[dict[str, Any]], as_json: bool, inspecting: Any) -> None:
    if as_json:
        print_json(rows)
        return
    from preftune.reproduce.page import name, needed, said, shown

    title = "Claims; 95 % intervals over seeds"
    cells = [[name(r), r["claim"], shown(r), needed(r), said(r)] for r in rows]
    inspecting.table(title, ["id", "claim", "measured", "needed", "verdict"], cells)
