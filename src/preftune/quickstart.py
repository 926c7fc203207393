"""The main job on what ships with the package: look at the pairs with the reference, evaluate it,
train three methods on the same pairs, compare them on held-out prompts, write one page.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from preftune import held_out, training
from preftune.config import load
from preftune.diagnosis import opening
from preftune.diagnosis.job import Diagnosis
from preftune.errors import UserError
from preftune.evaluate import Answers, figures
from preftune.events import teller
from preftune.huggingface import DEFAULT_MODEL
from preftune.numerics import permutation, stream_key
from preftune.parts import Parts, make_settings, resolved_config
from preftune.preparing import prepare
from preftune.progress import Progress
from preftune.report import write_report
from preftune.runs import RunFolder

METHODS = ("pref_ft", "dpo", "hypo")
REWARD = "length:within=20"
SETTINGS: dict[str, Any] = {
    "model": DEFAULT_MODEL, "reward": REWARD, "max_steps": 12, "batch_size": 6,
    "learning_rate": 4e-5, "max_new_tokens": 48, "seed": 0,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {"hypo": {"terms.1.weight": 0.02, "terms.1.share": 0.5}}
"""What a method has besides: HyPO draws to half as many prompts as it has pairs, to save time."""
FINAL_SAMPLES = 1
CURVE_PROMPTS = 16
"""Held-out prompts that the learning curves are drawn from; the table takes all."""
NOTE = (
    "The reward shown is the one that the pairs were labelled by, so it is the one trained on; it "
    "says nothing of quality. One training seed: the intervals are over held-out prompts, and "
    "another seed may differ. The table is of all held-out prompts, the curves of 16 of them. "
    "The KL term of HyPO aims at a lower KL at the same steps, not at a better model: DPO stopped "
    "earlier may reach the same points, so read reward against KL first."
)


def run(output: Path, console: Any) -> list[dict[str, Any]]:
    """Do it all.

    Returns:
        one row a method, the reference first: name, seconds, and each figure with its interval;
        the reference's has its `diagnosis`, too.
    """
    _clear(output)
    with (
        resources.as_file(resources.files("preftune.data") / "default") as data,
        Progress(console) as bar,
    ):
        parts = _prepare(METHODS[0], output, data)
        found = _opening(parts, bar)
        row, baseline = _reference(parts, output / "reference", bar)
        # only now: a folder without `reference` would not be known as a quickstart's
        looked_at = opening.write(found, output)
        rows = [{**row, "diagnosis": found.as_json()}]
        for name in METHODS:
            if name != METHODS[0]:
                parts = _prepare(name, output, data)
            rows.append(_method(parts, output / name, baseline, row, bar))
    write_report(
        [output / "reference", *(output / name for name in METHODS)],
        output / "report.html",
        title="preftune quickstart",
        note=NOTE,
        links={looked_at.name: "What the pairs look like to the reference, before training"},
    )
    return rows


def _prepare(name: str, output: Path, data: Path) -> Parts:
    files = {"data": str(data / "pairs.jsonl"), "eval_data": str(data / "heldout.jsonl")}
    config = load({"method": name, "output": str(output / name), **SETTINGS, **files})
    parts = prepare(config, overrides=OVERRIDES.get(name))
    assert parts.held_out is not None, "quickstart has held-out prompts"
    mixed = permutation(stream_key("quickstart"), 0, len(parts.held_out))  # the file is by kinds
    parts.held_out = parts.held_out.select(mixed)
    return parts


def _opening(parts: Parts, bar: Progress) -> Diagnosis:
    """What one pass over some of the pairs tells, said at once."""
    assert parts.data is not None and parts.renderer is not None, "quickstart has pairs"
    found = opening.opening(
        parts.reference or parts.policy, parts.data, parts.renderer, name=parts.config.model,
        held_out=parts.held_out, seed=parts.config.seed,
        micro_batch_tokens=parts.micro_batch_tokens, tick=bar.tick("pairs"),
    )  # fmt: skip
    for line in opening.lines(found):
        bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
    return found


def _reference(parts: Parts, path: Path, bar: Progress) -> tuple[dict[str, Any], Answers]:
    """Evaluate the model as it is; its KL to itself is 0 by definition."""
    began = time.perf_counter()
    answers = _answers(replace(parts, reference=None), bar, "reference")
    found = {**figures(answers), "kl": {"value": 0.0, "low": 0.0, "high": 0.0}}
    config = {"method": "reference", "model": parts.config.model, "reward": REWARD}
    folder = RunFolder.create(path, config)
    folder.write_json("evaluation.json", found)
    folder.append("samples.jsonl", held_out.sample_rows(parts, answers, 0))
    return {"method": "reference", **found, "seconds": time.perf_counter() - began}, answers


def _clear(output: Path) -> None:
    """Replace an earlier quickstart; leave anything else alone."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / "reference" / "config.yaml").is_file():
            raise UserError(
                f"output '{output}' is not empty and no quickstart. Give another folder."
            )
        shutil.rmtree(output)


def _answers(parts: Parts, bar: Progress, stage: str) -> Answers:
    assert parts.held_out is not None, "quickstart has held-out prompts"
    total = len(parts.held_out)
    bar.begin(f"{stage} eval", total)
    return held_out.held_out_answers(
        parts, parts.policy, total, FINAL_SAMPLES, lambda done, _: bar.advance(done)
    )


def _method(
    parts: Parts, path: Path, baseline: Answers, reference: Mapping[str, Any], bar: Progress
) -> dict[str, Any]:
    """Train and evaluate one method."""
    began = time.perf_counter()
    settings = make_settings(parts)
    half = settings.max_steps // 2
    settings = replace(settings, eval_every=half)
    folder = RunFolder.create(path, resolved_config(parts, settings))
    few = baseline.first(CURVE_PROMPTS)
    start = held_out.eval_metrics({**figures(few, few), "kl": reference["kl"]})
    result: dict[str, Any] = {}

    def evaluate(step: int, last: bool) -> dict[str, Any]:
        if step == 0:
            return start  # the policy is still the reference
        if not last:
            answers = held_out.held_out_answers(parts, parts.policy, CURVE_PROMPTS)
            return held_out.eval_metrics(figures(answers, few))
        answers = _answers(parts, bar, parts.method.name)
        result.update(figures(answers, baseline))
        folder.append("samples.jsonl", held_out.sample_rows(parts, answers, step))
        return held_out.eval_metrics(figures(answers.first(CURVE_PROMPTS), few))

    training.execute(parts, settings, folder, evaluate=evaluate, tell=teller([bar]))
    seconds = time.perf_counter() - began
    folder.write_json(
        "evaluation.json", {**result, "seconds": {"value": seconds, "low": None, "high": None}}
    )
    return {"method": parts.method.name, **result, "seconds": seconds}


_COLUMNS = (
    ("reward", "reward", "{:.2f}"), ("kl", "KL to reference, nats", "{:.1f}"),
    ("win_rate", "win rate", "{:.2f}"), ("length", "tokens", "{:.1f}"),
    ("no_end", "no end token", "{:.2f}"),
)  # fmt: skip


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table as text: column names and cells."""

    def cell(figure: Mapping[str, float | None] | None, form: str) -> str:
        if figure is None or figure["value"] is None:
            return "–"
        text = form.format(figure["value"])
        if figure["low"] is None or figure["high"] is None or figure["low"] == figure["high"]:
            return text
        return f"{text} [{form.format(figure['low'])}, {form.format(figure['high'])}]"

    names = ["method", *(title for _, title, _ in _COLUMNS), "seconds"]
    return names, [
        [
            row["method"],
            *(cell(row.get(key), form) for key, _, form in _COLUMNS),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
