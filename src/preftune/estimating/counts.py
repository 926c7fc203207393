"""What a run will do, counted by going through it with hollow models."""

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune import (
    building,
    held_out,
    huggingface,
    loop,
    phases,
    reference_cache,
    reward_evaluation,
)
from preftune.automatic import row_budget
from preftune.checkpoint import KEEP
from preftune.collecting import Source
from preftune.config import Config
from preftune.estimating.hollow import Hollow, HollowScores, Lengths, Log, make
from preftune.gradient import gradient
from preftune.parts import Parts, keeps_reference, make_settings, make_world
from preftune.policies.scoring import score_all
from preftune.preparing import prepare
from preftune.rounds import World, group_terms, read
from preftune.runs import RunFolder
from preftune.samples import Samples
from preftune.sources import Offline

MOST = 512
"""Updates gone through one by one; of longer runs the rest is taken to be like these."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update does."""

    done: Log
    tokens: Mapping[str, int]
    """Of each phase, as `phases` counts them."""
    judged: int
    """Responses that the reward is asked about."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a run will do."""

    steps: int
    updates: list[Update]
    """The first of them, `MOST` at most."""
    cache: Log
    """The reference's log-probs of the data, before the first update."""
    baseline: Log
    """The reference's own answers to the held-out prompts."""
    evaluation: Log
    last_evaluation: Log
    evaluations: int
    """The last one with them."""
    figures: float
    """Seconds of an evaluation without the models' part."""
    checkpoints: int
    """Written in all; `KEEP` of them stay, and the best."""
    checkpoint_bytes: int
    model_bytes: int

    @property
    def kept_checkpoints(self) -> int:
        """Checkpoints on the disk in the end."""
        return min(self.checkpoints, KEEP)

    def scale(self) -> float:
        """Updates in all for each that was counted."""
        return self.steps / max(1, len(self.updates))


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A run's parts with hollow models."""

    parts: Parts
    settings: loop.Settings
    model: Hollow | HollowScores
    named_reference: Any
    """The model of `reference`, where one is named; on the meta device."""


def rehearsal(
    config: Config, overrides: Mapping[str, Any] | None = None, data: Any = None
) -> Rehearsal:
    """Prepare a run as `preparing.prepare` does, but load no weights, and write nothing.

    Raises:
        UserError: what `prepare` would raise.
    """
    method = building.method_of(config, overrides)
    tokenizer = huggingface.load_tokenizer(config.model)
    model = make(config, method, tokenizer)
    with tempfile.TemporaryDirectory() as place, _quiet():
        apart = config.model_copy(
            update={"output": str(Path(place) / "run"), "reference": None, "judge": None,
                    "gold": None, "resume": False}
        )  # fmt: skip
        parts = prepare(
            apart, model=model, tokenizer=tokenizer, data=data, overrides=overrides,
            reward=None if config.reward is None else counted_reward,
        )  # fmt: skip
    parts.notes = [note for note in parts.notes if not note.startswith("refused rows")]
    other = None
    if config.reference is not None and parts.reference is not None:
        with torch.device("meta"):
            other = huggingface.outline(config.reference, torch.float32)
    model.trunk.to_come = loaded_bytes(parts, other)
    parts.micro_batch_tokens = row_budget(config, model.trunk)
    return Rehearsal(parts=parts, settings=make_settings(parts), model=model, named_reference=other)


def counted_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Stands for a reward that is not to be asked. No two alike: ties would not be trained on."""
    return [i / len(completions) for i in range(len(completions))]


def asks_a_judge(config: Config) -> bool:
    """Whether a reward is a server's, which is not asked for an estimate."""
    named = [config.reward] if isinstance(config.reward, str) else config.reward or []
    return any(name.startswith("judge:") for name in named)


def tensor_bytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Of tensors, each once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def loaded_bytes(parts: Parts, named_reference: Any = None) -> int:
    """Of the models as they are loaded: the policy and the reference beside it."""
    found = tensor_bytes(list(parts.model.model.parameters()))
    return found + reference_bytes(parts, named_reference)


def reference_bytes(parts: Parts, named_reference: Any = None) -> int:
    """Of a reference with weights of its own."""
    reference = parts.reference
    if reference is None or reference.trunk.adapter_off:
        return 0
    copies = 1 if parts.method.reference_update == "fixed" else 2  # evaluation keeps another
    model = reference.model if named_reference is None else named_reference
    return copies * tensor_bytes(list(model.parameters()))


def counted(of: Rehearsal, lengths: Lengths | None = None, most: int = MOST) -> Counts:
    """Go through the run.

    Args:
        lengths: of sampled responses; None: half of the limit each.
        most: updates gone through.
    """
    parts, settings = of.parts, of.settings
    log = of.model.log
    if lengths is not None:
        for policy in (of.model, parts.reference):
            if isinstance(policy, Hollow):
                policy.lengths = lengths
    log.taken()
    with tempfile.TemporaryDirectory() as place, _quiet():
        baseline, evaluation, last, seconds = _evaluation(of, RunFolder(Path(place)))
        world = make_world(parts)
        cache = Log()
        if keeps_reference(parts):
            cache, world = _cached(of, world)
        updates = list(_updates(of, world, min(most, settings.max_steps)))
    due = settings.save_every
    saves = 0 if not due else -(-settings.max_steps // due)
    return Counts(
        steps=settings.max_steps, updates=updates, cache=cache, baseline=baseline,
        evaluation=evaluation, last_evaluation=last, evaluations=_evaluations(of),
        figures=seconds, checkpoints=saves, checkpoint_bytes=checkpoint_bytes(parts),
        model_bytes=model_bytes(parts),
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that a rehearsal warns of is the run's."""
    log = logging.getLogger("preftune")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _updates(of: Rehearsal, world: World, number: int) -> Iterator[Update]:
    groups = group_terms(of.parts.method)
    asked = 0
    for version in range(number):
        with phases.recording() as spent:
            gradient(groups, world, version, measure=False)
        before, asked = asked, sum(g.queries for g in groups)
        yield Update(done=of.model.log.taken(), tokens=dict(spent.tokens), judged=asked - before)


def _cached(of: Rehearsal, world: World) -> tuple[Log, World]:
    """Passes that fill the cache of the reference's log-probs, and the world that knows them."""
    method, reference = of.parts.method, world.reference
    assert reference is not None, "its log-probs are kept"
    for plan in reference_cache.plans(world, method, of.settings.max_steps):
        for block in plan.blocks:
            score_all(reference, read(plan.group, world, plan.rows[block]), None)

    def known(source: Source, samples: Samples) -> Tensor | None:
        return torch.zeros(samples.mask.shape) if type(source) is Offline else None

    asked = reference if reference_cache.still_asked(method) else None
    return of.model.log.taken(), replace(world, known=known, reference=asked)


def _evaluations(of: Rehearsal) -> int:
    if of.parts.held_out is None:
        return 0
    steps, each = of.settings.max_steps, of.settings.eval_every or of.settings.max_steps
    return 1 + -(-steps // each)


def _evaluation(of: Rehearsal, folder: RunFolder) -> tuple[Log, Log, Log, float]:
    """The reference's answers, an evaluation, the last one, and seconds beside the models'."""
    parts, log = of.parts, of.model.log
    rows = parts.held_out
    if rows is None:
        return Log(), Log(), Log(), 0.0
    if isinstance(of.model, HollowScores):
        reward_evaluation.scores_of(of.model, rows, parts.micro_batch_tokens)
        once = log.taken()
        # the model as it was is asked once what it would rather say
        asks = "model" in parts.config.model_fields_set
        return once if asks else Log(), once, once, 0.1
    evaluate = held_out.evaluator(parts, folder)
    baseline = log.taken()
    began = time.perf_counter()
    evaluate(0, False)
    first, seconds = log.taken(), time.perf_counter() - began
    if of.settings.max_steps:
        evaluate(of.settings.max_steps, True)
    return baseline, first, log.taken(), seconds


def checkpoint_bytes(parts: Parts) -> int:
    """Of the tensors in a checkpoint, but for rounds that are under way: the weights that are
    trained, two moments and a count of each, and a reference that moves."""
    trained = list(parts.model.parameters())
    moving = 0
    if parts.method.reference_update != "fixed" and parts.reference is not None:
        moving = tensor_bytes([t for _, t in parts.reference.tensors()])
    return 3 * tensor_bytes(trained) + 4 * len(trained) + moving


def model_bytes(parts: Parts) -> int:
    """Of the weights that the run leaves: the model's, of an adapter its own."""
    if parts.model.trunk.has_adapter:
        return tensor_bytes(list(parts.model.parameters()))
    return tensor_bytes(list(parts.model.model.parameters()))
