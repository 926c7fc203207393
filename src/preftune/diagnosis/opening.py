"""What one pass of the reference over a few pairs tells, before anything is trained: tier 0."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preftune import automatic
from preftune.data import Renderer, Rows
from preftune.data.findings import warnings
from preftune.data.health import health
from preftune.diagnosis import job, measure, page
from preftune.diagnosis.job import Diagnosis
from preftune.diagnosis.measure import Job, Measured
from preftune.diagnosis.pieces import Pieces
from preftune.diagnosis.reading import SIDES, figures
from preftune.estimators.estimate import Estimate
from preftune.policies.transformer import Transformer

ROWS = 48
"""Pairs at most, each of another prompt: ten or twenty seconds for a small model on a CPU, and an
interval of about .3 standard deviations to either side for the surprise."""


def opening(
    reference: Transformer,
    rows: Rows,
    renderer: Renderer,
    *,
    name: str,
    held_out: Rows | None = None,
    seed: int = 0,
    micro_batch_tokens: int | None = None,
    most: int = ROWS,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Tier 0 of a diagnosis, of a model and rows that are loaded already; nothing is drawn.

    Args:
        name: of the model, for the page.
        held_out: rows whose prompts should not be among `rows`.
        micro_batch_tokens: of a forward pass.
        most: rows that are scored; data health is of all.
    """
    began = time.perf_counter()
    made = Job(
        reference=reference, policy=None, rows=rows, judge=None, seed=seed,
        budget=micro_batch_tokens or automatic.CPU_ROW_BUDGET, pieces=Pieces(None, ""),
    )  # fmt: skip
    taken = measure.distinct(made, most)
    measured = Measured(data=measure.data(made, taken, tick))
    sound = health(
        rows, held_out=held_out, decode=renderer.decode, end_ids=renderer.end_ids,
        bos_id=renderer.bos_id,
    )  # fmt: skip
    found = figures(measured, seed)
    facts: dict[str, Any] = {"model": name, "kind": rows.kind, "rows": len(taken)}
    facts["seconds"] = round(time.perf_counter() - began, 1)
    return Diagnosis(
        measured=measured, figures=found, facts=facts, health=sound, notes=warnings(sound)
    )


def lines(found: Diagnosis) -> list[str]:
    """It in a few lines, each with how to read it, and what is wrong with the data."""
    x, scored = found.figures, found.facts["rows"]
    said = [
        f"to the reference, by one pass over {scored} of {found.health.distinct_prompts} prompts' "
        f"pairs ({found.facts['seconds']:.0f} s):"
    ]
    for side in SIDES:
        name = f"surprisal_{side}"
        if name in x:
            said.append(f"  surprise of the {side}: {_words(x[name])}; {_SURPRISE[side]}")
    if "reference_accuracy" in x:
        share = _words(x["reference_accuracy"], 100, "{:.0f}")
        said.append(f"  % of pairs whose chosen it finds likelier: {share}; 50: no order yet")
    if "ln_ches_0.5" in x:
        alike = _words(x["ln_ches_0.5"], 1, "{:.0f}")
        said.append(f"  ln-CHES, median: {alike}; the higher, the more alike a pair's two are")
    return said + found.notes


_SURPRISE = {
    "chosen": "about 0 if they were its own, above: somebody else's",
    "rejected": "below 0: tamer than its samples",
}


def _words(x: Estimate, times: float = 1, form: str = "{:.2f}") -> str:
    if x.value is None or x.low is None or x.high is None:
        return x.note
    value, low, high = (form.format(times * part) for part in (x.value, x.low, x.high))
    return f"{value} [{low}, {high}]"


def write(found: Diagnosis, output: Path) -> Path:
    """diagnosis.json and diagnosis.html in a folder; the path of the page."""
    whole = found.as_json()
    job.save(whole, output)
    return page.write_page(
        output / "diagnosis.html", found.measured, found.figures, found.facts, whole["data"],
        lines(found), title="Before training", heading="What the pairs look like",
        note="One pass of the model over some of the pairs. Nothing was drawn from it, so nothing "
        "is said of what it would answer; preftune diagnose does that, and advises a method.",
    )  # fmt: skip
