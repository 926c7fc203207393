"""`preftune estimate` on the command line."""

from collections.abc import Sequence
from typing import Any

from preftune.cli_train import of_run, print_json


def estimate(args: Sequence[str]) -> int:
    """Print memory and time of the run that `train` would make of the same flags."""
    from preftune import config, flags, inspecting
    from preftune.progress import stderr, working

    probing = ("no_probe", bool, False, "load no model: times are taken from a table, and rough")
    values, overrides, own = of_run(
        "estimate",
        "Memory and time of a run before it runs, and what to change where it will not fit.",
        flags.TRAIN,
        args,
        [probing],
    )
    loaded, console = config.load(values), stderr()

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    with working(console, "counting"):
        from preftune.estimating.estimate import estimate as found_of

        found = found_of(loaded, overrides=overrides, probes=not own["no_probe"], note=say)
    whole: dict[str, Any] = found.as_json()
    for note in found.notes:
        say(note)
    if own["json"]:
        print_json(whole)
    else:
        inspecting.resources(whole, [c.in_words() for c in found.changes])
    return 0
