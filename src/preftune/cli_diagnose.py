"""`preftune diagnose` on the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.cli_train import JSON, print_json
from preftune.errors import UserError

UNIT = "in units of training on one response"
PROBE = (
    "updates of a short run on the pairs, whose answers are measured, too (default: where --budget "
    "has room, a twentieth of what --spend buys; 0: none)"
)


def diagnose(args: Sequence[str]) -> int:
    """Measure, print the verdict and the figures, write diagnosis.json and diagnosis.html."""
    from preftune import config, flags, inspecting
    from preftune.diagnosis import cost
    from preftune.progress import Progress, stderr, working
    from preftune.runs import unnamed

    given, own = flags.parse(
        "diagnose",
        "What the reference, the data and the reward look like, and which method that suggests.",
        flags.DIAGNOSE,
        args,
        [
            ("policy", str | None, None, "a finished run or model, measured against --model"),
            ("budget", str | None, None, "time that it may take: 90s, 10m, 1h (default: all)"),
            ("probe_steps", int | None, None, PROBE),
            ("label_price", float | None, None, f"of a fresh response's label, {UNIT}"),
            ("spend", float | None, None, f"on training in all, {UNIT} (default: 3 epochs)"),
            JSON,
        ],
    )
    cost.check_prices(spend=own["spend"], label_price=own["label_price"])
    named = "output" in given
    if not named:
        given["output"] = str(unnamed("diagnose"))
    settings, console = config.load(given), stderr()
    output = Path(str(settings.output))
    if output.is_file():
        raise UserError(f"output '{output}': is a file. Give a folder.")

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    if not named:
        say(f"where it is cut off, the command with --output {output} goes on")
    with working(console, "loading"):
        from preftune.advising import verdict
        from preftune.diagnosis import job, page
    with Progress(console) as bar:
        found = job.diagnose(
            settings, policy=own["policy"], budget=own["budget"],
            probe_steps=own["probe_steps"], spend=own["spend"], tick=bar.tick, note=say,
        )  # fmt: skip
    advised = verdict.advise(found, settings.beta, own["label_price"], own["spend"])
    whole: dict[str, Any] = found.as_json() | advised.as_json()
    job.save(whole, output)
    lines = verdict.lines(advised)
    page.write_page(
        output / "diagnosis.html", found.measured, found.figures, found.facts, whole["data"],
        lines, note=verdict.validated(),
    )  # fmt: skip
    say(f"written: {output / 'diagnosis.html'}")
    if own["json"]:
        print_json(whole)
        return 0
    inspecting.estimates(whole["figures"])
    print("\n".join([*lines, verdict.validated()]))
    return 0
