"""The main job on what ships with the package: evaluate the reference, train three methods on the
same pairs, compare them on held-out prompts, write one page.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from preftune import loop, training
from preftune.config import Config
from preftune.errors import UserError
from preftune.evaluate import Answers, Figures, figures
from preftune.huggingface import DEFAULT_MODEL
from preftune.parts import Parts, make_settings, prepare, resolved_config
from preftune.progress import Progress
from preftune.report import write_report
from preftune.runs import RunFolder

METHODS = ("pref_ft", "dpo", "hypo")
REWARD = "length:within=20"
SETTINGS: dict[str, Any] = {
    "model": DEFAULT_MODEL, "reward": REWARD, "max_steps": 30, "batch_size": 8, "learning_rate": 2e-5,
    "max_new_tokens": 48, "seed": 0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {"hypo": {"weight": 0.02}}
"""What a method has besides the common settings."""
FINAL_SAMPLES = 2
MIDWAY_PROMPTS = 16
NOTE = (
    "The reward shown is the one that the pairs were labelled by, so it is the one trained on; it says nothing "
    "of quality. One training seed: the intervals are over held-out prompts, and another seed may differ. "
    "HyPO reaches a lower KL than DPO at the same number of steps; DPO stopped earlier reaches similar points, "
    "so read the frontier before calling either better."
)


def run(output: Path, console: Any) -> list[dict[str, Any]]:
    """Do it all.

    Returns:
        one row a method, the reference first: name, seconds, and each figure with its interval.
    """
    _clear(output)
    with resources.as_file(resources.files("preftune.data") / "default") as folder, Progress(console) as bar:
        common = {**SETTINGS, "data": str(folder / "pairs.jsonl"), "eval_data": str(folder / "heldout.jsonl")}
        rows, baseline = [], None
        for name in METHODS:
            bar.stage = name
            own = OWN.get(name, {})
            parts = prepare(Config(method=name, output=str(output / name), **common, **own))
            if baseline is None:
                began = time.perf_counter()
                baseline = _answers(parts, parts.policy, bar, "reference", with_kl=False)
                found = {**figures(baseline), "kl": {"value": 0.0, "low": 0.0, "high": 0.0}}
                _write_reference(output / "reference", parts, found, baseline)
                rows.append({"method": "reference", **found, "seconds": time.perf_counter() - began})
                start = training.eval_metrics(found)
            rows.append(_method(parts, output / name, baseline, start, bar))
    write_report(
        [output / "reference", *(output / name for name in METHODS)], output / "report.html",
        title="preftune quickstart", note=NOTE,
    )  # fmt: skip
    return rows


def _clear(output: Path) -> None:
    """Replace an earlier quickstart; leave anything else alone."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / "reference" / "config.yaml").is_file():
            raise UserError(f"output '{output}' is not empty and no quickstart. Give another folder.")
        shutil.rmtree(output)


def _answers(parts: Parts, policy: Any, bar: Progress, stage: str, *, with_kl: bool = True) -> Answers:
    assert parts.held_out is not None, "quickstart has held-out prompts"
    bar.begin(f"{stage} eval", len(parts.held_out))
    if with_kl:
        return training.held_out_answers(parts, policy, len(parts.held_out), FINAL_SAMPLES, _tick(bar))
    without = training.without_reference(parts)
    return training.held_out_answers(without, policy, len(parts.held_out), FINAL_SAMPLES, _tick(bar))


def _tick(bar: Progress) -> Callable[[int, int], None]:
    return lambda done, total: bar.advance(done)


def _write_reference(path: Path, parts: Parts, found: Figures, answers: Answers) -> None:
    folder = RunFolder.create(path, {"method": "reference", "model": parts.config.model, "reward": REWARD})
    folder.write_json("evaluation.json", found)
    folder.append("samples.jsonl", training.sample_rows(parts, answers, 0))


def _method(
    parts: Parts, path: Path, baseline: Answers, start: Mapping[str, Any], bar: Progress
) -> dict[str, Any]:
    """Train and evaluate one method."""
    began = time.perf_counter()
    settings = make_settings(parts)
    half = settings.max_steps // 2
    settings = loop.Settings(**{**vars(settings), "eval_every": half})
    folder = RunFolder.create(path, resolved_config(parts, settings))
    result: dict[str, Any] = {}

    def evaluate(step: int) -> dict[str, Any]:
        if step == 0:
            return dict(start)  # the policy is still the reference
        if step < settings.max_steps:
            few = training.held_out_answers(parts, parts.policy, MIDWAY_PROMPTS)
            return training.eval_metrics(figures(few))
        answers = _answers(parts, parts.policy, bar, parts.method.name)
        result.update(figures(answers, baseline))
        folder.append("samples.jsonl", training.sample_rows(parts, answers, step))
        return training.eval_metrics(result)

    training.execute(parts, settings, folder, evaluate=evaluate, tell=training.teller([bar]))
    seconds = time.perf_counter() - began
    folder.write_json("evaluation.json", {**result, "seconds": {"value": seconds, "low": None, "high": None}})
    return {"method": parts.method.name, **result, "seconds": seconds}


_COLUMNS = (
    ("reward", "reward", "{:.2f}"), ("kl", "KL to reference, nats", "{:.1f}"), ("win_rate", "win rate", "{:.2f}"),
    ("length", "tokens", "{:.1f}"), ("no_end", "no end token", "{:.2f}"),
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
        [row["method"], *(cell(row.get(key), form) for key, _, form in _COLUMNS), f"{row['seconds']:.0f}"] for row in rows
    ]
