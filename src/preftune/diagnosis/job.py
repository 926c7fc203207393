"""`preftune diagnose`: load, time, measure what fits the budget, and read the figures off."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from preftune import automatic, building, fingerprint, judges, loading, rewards
from preftune.config import Config
from preftune.data import Renderer, Rows
from preftune.data.findings import Health, warnings
from preftune.data.health import health
from preftune.diagnosis import cost, measure, trainer
from preftune.diagnosis.measure import Job, Measured
from preftune.diagnosis.pieces import Pieces
from preftune.diagnosis.reading import Figures, figures
from preftune.errors import UserError
from preftune.estimators.estimate import cannot_tell
from preftune.runs import JUDGED, RunFolder

Tick = Callable[[str], Callable[[int, int], None]]
"""The name of a stage to its progress (done, total)."""
PROBE = 4
"""Rows and prompts that the timing takes."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found, and of how much."""

    measured: Measured
    figures: Figures
    facts: Mapping[str, Any]
    """Models, rows, prompts and samples taken, label source, seconds expected."""
    health: Health
    """Of all rows."""
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "figures": {name: x.as_json() for name, x in self.figures.items()},
            "facts": dict(self.facts),
            "data": plain_health(self.health),
            "notes": self.notes,
        }


def diagnose(
    config: Config,
    *,
    policy: str | None = None,
    budget: str | None = None,
    tick: Tick = lambda stage: lambda done, total: None,
    note: Callable[[str], None] = lambda message: None,
) -> Diagnosis:
    """Measure a reference and its data before (or, with a policy, after) training.

    Args:
        config: `model` is the reference; `data` has pairs or completions; `reward` judges.
        policy: a run's folder or a model's, which is measured against the reference.
        budget: a time, as 10m; without it all of it is done.
        note: told at once what is about to be done.
    Raises:
        UserError: something given cannot be used.
    """
    if config.data is None:
        raise UserError("data: give --data a file or a Hub id, of pairs or completions.")
    allowed = None if budget is None else cost.seconds(budget)
    if not building.decoding_of(config).unmodified:
        raise UserError(
            "diagnose needs samples of the reference's own distribution: leave temperature, "
            "top_p, top_k, min_new_tokens and stop as they are."
        )
    began = time.perf_counter()
    job, facts, notes, sound = _prepare(config, policy)
    notes += warnings(sound)
    for message in notes:
        note(message)
    different = measure.distinct(job, len(job.rows))
    speeds, policies = _speeds(job, different), 1 + (policy is not None)
    left = None if allowed is None else cost.left(allowed, time.perf_counter() - began)
    sizes = cost.sizes(left, speeds, len(different), policies)
    said = f"{sizes.rows} prompts' responses scored, {sizes.prompts} prompts answered "
    note(f"{said}{sizes.samples} times each: about {sizes.expected:.0f} s")
    if sizes.note:
        notes.append(sizes.note)
        note(sizes.note)
    measured = Measured(
        data=measure.data(job, different[: sizes.rows], tick("data")),
        drawn=measure.drawn(job, different[: sizes.prompts], sizes.samples, tick("answers"))
        if sizes.prompts
        else None,
        own=measure.own(job, different[: sizes.prompts], sizes.samples, tick("policy"))
        if sizes.prompts and policy is not None
        else None,
    )
    found = figures(measured, config.seed)
    if not sizes.prompts:
        why = cannot_tell("no answers were drawn: " + sizes.note)
        found |= {"surprisal_own": why, "told_apart": why, "feature_ratio": why}
    taken = {"rows": sizes.rows, "prompts": sizes.prompts, "samples_per_prompt": sizes.samples}
    of_a_row = 2 if job.rows.kind == "pairs" else 1
    taken |= {"pairs": len(job.rows), "sample_price": speeds.sample_price(of_a_row)}
    return Diagnosis(
        measured=measured, figures=found, facts=facts | taken, health=sound, notes=notes
    )


def plain_health(found: Health) -> dict[str, Any]:
    """Data health as plain data."""
    return {
        "rows": found.rows,
        "distinct_rows": found.distinct_rows,
        "distinct_prompts": found.distinct_prompts,
        "findings": {
            name: {"count": f.count, "of": f.of, "where": list(f.where), "meaning": f.meaning}
            for name, f in found.findings.items()
        },
        "rules": {name: float(won.mean()) for name, won in found.rules.items() if len(won)},
    }


def _prepare(config: Config, policy: str | None) -> tuple[Job, dict[str, Any], list[str], Health]:
    """The models, the rows and the judge; and how the rows are."""
    reward = judges.make_reward(config.reward, config.reward_weights)
    reference, tokenizer = loading.model_of(config, config.model)
    renderer = building.make_renderer(config, tokenizer, reference)
    rows, report, refused = loading.load_rows(
        config.data, config, renderer, want="any", context=building.context_of(reference.model),
        reserve=config.max_new_tokens,
    )  # fmt: skip
    if rows.kind == "prompts":
        raise UserError(
            f"data '{config.data}' holds prompts alone: give pairs or completions, which are what "
            "is diagnosed."
        )
    notes = [loading.describe(rows, report, len(refused))]
    if rewards.is_open(reward):
        reward = reward and rewards.aimed(reward, judges.measured_mode(reference, rows))
    other = None if policy is None else loading.model_of(config, policy)[0]
    settings = json.dumps(
        {
            "model": fingerprint.of_weights(reference.model),
            "policy": None if other is None else fingerprint.of_weights(other.model),
            "reward": None if reward is None else reward.name,
            "config": config.model_dump(exclude={"output", "resume", "threads"}, mode="json"),
            "rows": _digest(rows),
        },
        sort_keys=True,
    )
    folder = None if config.output is None else Path(config.output)
    if reward is not None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        reward = rewards.kept(reward, folder / JUDGED)
    job = Job(
        reference=reference, policy=other, rows=rows, seed=config.seed,
        judge=None if reward is None else judges.judge_of(reward, rows, renderer),
        budget=config.micro_batch_tokens or automatic.CPU_ROW_BUDGET,
        pieces=Pieces(None if folder is None else folder / "pieces", settings),
    )  # fmt: skip
    told = judges.label_source(reward, config.data)
    facts = {
        "model": config.model, "policy": policy, **trainer.left(policy),
        "data": config.data, "kind": rows.kind,
        "reward": None if reward is None else reward.name,
        "label_source": config.label_source or told,
    }  # fmt: skip
    return job, facts, notes, _health(config, rows, renderer)


def _health(config: Config, rows: Rows, renderer: Renderer) -> Health:
    held_out = None
    if config.eval_data is not None:
        held_out, _, _ = loading.load_rows(
            config.eval_data, config, renderer, want="any", context=None
        )
    return health(
        rows, held_out=held_out, decode=renderer.decode, end_ids=renderer.end_ids,
        bos_id=renderer.bos_id,
    )  # fmt: skip


def _digest(rows: Rows) -> str:
    return fingerprint.digest(json.dumps([rows.prompts, rows.responses]))


def _speeds(job: Job, different: torch.Tensor) -> cost.Speeds:
    """Seconds a row and a prompt, by doing a few twice."""
    few = different[:PROBE]
    bare = Job(**{**vars(job), "pieces": Pieces(None, "")})
    return cost.Speeds(
        row=cost.timed(lambda: measure.data(bare, few), len(few)),
        prompt=cost.timed(lambda: measure.drawn(bare, few, cost.SAMPLES), len(few)),
    )


def save(whole: Mapping[str, Any], output: Path) -> None:
    """diagnosis.json in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    RunFolder(output).write_json("diagnosis.json", whole)
