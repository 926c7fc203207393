"""`preftune diagnose` on the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.cli_train import JSON, print_json
from preftune.errors import UserError


def diagnose(args: Sequence[str]) -> int:
    """Measure, print the verdict and the figures, write diagnosis.json and diagnosis.html."""
    from preftune import config, flags, inspecting
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
            JSON,
        ],
    )
    if "output" not in given:
        given["output"] = str(unnamed("diagnose"))
    settings, console = config.load(given), stderr()
    output = Path(str(settings.output))
    if output.is_file():
        raise UserError(f"output '{output}': is a file. Give a folder.")

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    with working(console, "loading"):
        from preftune.diagnosis import job, page, verdict
    with Progress(console) as bar:
        found = job.diagnose(
            settings, policy=own["policy"], budget=own["budget"], tick=bar.tick, note=say
        )
    source = found.facts["label_source"]
    advice = verdict.advise(found.figures, source)
    whole: dict[str, Any] = found.as_json() | {
        "advice": [a.as_json() for a in advice],
        "validated": verdict.VALIDATED,
    }
    job.save(whole, output)
    lines = verdict.lines(found.figures, advice, source)
    page.write_page(
        output / "diagnosis.html", found.measured, found.figures, found.facts, whole["data"], lines
    )
    say(f"written: {output / 'diagnosis.html'}")
    if own["json"]:
        print_json(whole)
        return 0
    inspecting.estimates(whole["figures"])
    print("\n".join(lines))
    return 0
