"""`preftune diagnose`: load, time, measure what fits the budget, and read the figures off."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from preftune import automatic, building, judges, loading, phases, rewards
from preftune.config import Config
from preftune.data import Renderer, Rows
from preftune.data.findings import Health, warnings
from preftune.data.health import health
from preftune.diagnosis import cost, hanging, measure, probe, reading, trainer
from preftune.diagnosis.measure import Job, Measured
from preftune.diagnosis.pieces import Pieces
from preftune.diagnosis.reading import Figures
from preftune.errors import GuardStop, UserError
from preftune.estimators.estimate import cannot_tell
from preftune.policies.scoring import score_all
from preftune.policies.transformer import Transformer
from preftune.runs import JUDGED, RunFolder

Tick = Callable[[str], Callable[[int, int], None]]
"""The name of a stage to its progress (done, total)."""
TIMED = 4
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
    probe_steps: int | None = None,
    spend: float | None = None,
    tick: Tick = lambda stage: lambda done, total: None,
    note: Callable[[str], None] = lambda message: None,
) -> Diagnosis:
    """Measure a reference and its data before (or, with a policy, after) training.

    Args:
        config: `model` is the reference; `data` has pairs or completions; `reward` judges.
        policy: a run's folder or a model's, which is measured against the reference.
        budget: a time, as 10m; without it all of it is done but for a probe.
        probe_steps: updates of a probe; 0: none; None: a few, where the budget has room for it.
        spend: on the run that the probe is the beginning of, in units of training on a response.
        note: told at once what is about to be done.
    Raises:
        UserError: something given cannot be used.
    """
    if config.data is None:
        raise UserError("data: give --data a file or a Hub id, of pairs or completions.")
    allowed = None if budget is None else cost.seconds(budget)
    cost.check_prices(spend=spend)
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
    planned = probe.planned(config, job, probe_steps, spend)
    speeds = _speeds(job, different, time.perf_counter() - began)
    left = None if allowed is None else cost.left(allowed, time.perf_counter() - began)
    sizes = cost.sizes(left, speeds, len(different), 1 + (policy is not None), planned)
    note(_foreseen(sizes))
    for message in filter(None, (sizes.note, sizes.no_probe)):
        notes.append(message)
        note(message)
    measured = _measured(job, different, sizes, tick)
    found: Figures = {}
    taken = {"rows": sizes.rows, "prompts": sizes.prompts, "samples_per_prompt": sizes.samples}
    if sizes.probe_steps and measured.data is not None:
        run = probe.Probe(config, job, sizes.probe_steps, tick)
        taken |= {"probe_steps": sizes.probe_steps, "probe_learning_rate": run.learning_rate}
        try:
            own, data = run.measured(different[: sizes.prompts], sizes.samples, measured.data)
            measured = replace(measured, probe=own, probe_data=data)
        except GuardStop as error:
            found = reading.no_probe(f"the probe ended early: {error}")
    found = reading.figures(measured, config.seed) | found
    if sizes.prompts and measured.data is not None:
        other = measure.other_limit(measured.data, config.max_new_tokens)
        for message in filter(None, [other]):
            notes.append(message)
            note(message)
    if not sizes.prompts:
        why = cannot_tell("no answers were drawn: " + sizes.note)
        found |= dict.fromkeys(_OF_ANSWERS, why)
    of_a_row = 2 if job.rows.kind == "pairs" else 1
    taken |= {"pairs": len(job.rows), "sample_price": speeds.sample_price(of_a_row)}
    return Diagnosis(
        measured=measured, figures=found, facts=facts | taken, health=sound, notes=notes
    )


_OF_ANSWERS = ("surprisal_own", "told_apart", "feature_ratio", "ensemble_ratio")


def _foreseen(sizes: cost.Sizes) -> str:
    """What is about to be done, and how long it will take."""
    probed = f", a probe of {sizes.probe_steps} updates" if sizes.probe_steps else ""
    return (
        f"{sizes.rows} prompts' responses scored, {sizes.prompts} prompts answered "
        f"{sizes.samples} times each{probed}: about {sizes.expected:.0f} s"
    )


def _measured(job: Job, different: torch.Tensor, sizes: cost.Sizes, tick: Tick) -> Measured:
    """All but a probe."""
    prompts, other = different[: sizes.prompts], job.policy
    data = measure.data(job, different[: sizes.rows], tick("data"))
    if not sizes.prompts:
        return Measured(data=data)
    return Measured(
        data=data,
        drawn=measure.drawn(job, prompts, sizes.samples, tick("answers")),
        own=None
        if other is None
        else measure.own(job, lambda: other, prompts, sizes.samples, tick("policy")),
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
    device = building.pick_device(config.device)
    reward = judges.make_reward(config.reward, config.reward_weights, device)
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
    other = None if policy is None else _finished(config, policy, reference)
    identity = hanging.of_models(reference, rows)
    settings = hanging.of_pieces(config, identity, reference, other, rows, reward)
    folder = None if config.output is None else Path(config.output)
    if reward is not None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        reward = rewards.kept(reward, folder / JUDGED)
    job = Job(
        reference=reference, policy=other, rows=rows, seed=config.seed,
        judge=None if reward is None else judges.judge_of(reward, rows, renderer),
        budget=config.micro_batch_tokens or automatic.CPU_ROW_BUDGET,
        pieces=Pieces(
            None if folder is None else folder / "pieces", json.dumps(settings, sort_keys=True)
        ),
        identity=json.dumps(identity, sort_keys=True),
    )  # fmt: skip
    told = judges.label_source(reward, config.data)
    facts = {
        "model": config.model, "policy": policy, **trainer.left(policy),
        "data": config.data, "kind": rows.kind,
        "reward": None if reward is None else reward.name,
        "label_source": config.label_source or told,
    }  # fmt: skip
    return job, facts, notes, _health(config, rows, renderer)


def _finished(config: Config, policy: str, reference: Transformer) -> Transformer:
    """The policy that is diagnosed.

    Raises:
        UserError: its tokens are not the reference's.
    """
    found = loading.model_of(config, policy)[0]
    mine, theirs = (p.model.config.vocab_size for p in (found, reference))
    if mine != theirs:
        raise UserError(
            f"policy '{policy}': has {mine} tokens, the model {theirs}. "
            "Give the model that it was trained from as --model."
        )
    return found


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


def _speeds(job: Job, different: torch.Tensor, load: float) -> cost.Speeds:
    """Seconds of each part of the work, by doing a few twice, and judging them once."""
    few, other = different[:TIMED], job.policy
    bare = replace(job, policy=None, judge=None, pieces=Pieces(None, ""))
    with phases.recording() as spent:
        prompt = cost.timed(lambda: measure.drawn(bare, few, cost.SAMPLES), len(few))
    drawing = sum(spent.seconds.get(name, 0.0) for name in ("prefill", "decode"))
    row = cost.timed(lambda: measure.data(bare, few), len(few))
    by_policy = 0.0
    if other is not None:
        own = job.rows.samples(few)
        by_policy = cost.timed(lambda: score_all(other, own, job.budget), len(few))
    judged_row, judged_prompt = _judging(job, few)
    return cost.Speeds(
        row=row, prompt=prompt, drawing=drawing / (cost.TIMES * len(few)), load=load,
        policy_row=by_policy, judged_row=judged_row, judged_prompt=judged_prompt,
    )  # fmt: skip


def _judging(job: Job, few: torch.Tensor) -> list[float]:
    """Seconds of judging a row, and a prompt's answers.

    Told once: a judge's answers are kept, so that asking again would take no time.
    """
    judge = job.judge
    if judge is None:
        return [0.0, 0.0]

    def timed() -> dict[str, torch.Tensor]:
        drawn = measure.answers(job, job.reference, few, cost.SAMPLES, "reference")
        both = (job.rows.samples(few), drawn)
        took = [cost.took(lambda s=samples: judge(s)) / len(few) for samples in both]
        return {"seconds": torch.tensor(took, dtype=torch.float64)}

    return job.pieces.get("judging", few, timed)["seconds"].tolist()


def save(whole: Mapping[str, Any], output: Path) -> None:
    """diagnosis.json in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    RunFolder(output).write_json("diagnosis.json", whole)
