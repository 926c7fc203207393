"""The DPO step against TRL's: time, memory, and the share of what this processor can do.

Both sides are given the same texts and see the same token ids, which is checked; their losses are
compared where both have made the same updates.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import inputs
import ours
from flops import Shape, useful
from results import Failed, Plan, Row
from workers import Answer, Worker, take_turns, typical

from preftune import huggingface

BATCH = 8
RATE = 1e-5
"""Learning rate of both sides: high enough that three updates show in the loss."""
FIRST, LATER, SHARE = 0.01, 0.02, 0.5
"""How far losses may lie apart: from ln 2 before any update; from each other later, by as much and
by this share of what the loss has fallen, so that a side which does not train is found out."""
REAL = Path(__file__).parent.parent.parent / "shared" / "data"
SAME = {"learning_rate": RATE, "lr_schedule": "constant", "warmup_ratio": 0.0}
TRL_SAME = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0}
TUNED: dict[str, Any] = {**TRL_SAME, "per_device_train_batch_size": BATCH}
PEAK_AFTER = 3
"""Steps, of which the peak of memory is taken."""
SETTLED = (
    "dtype", "micro_batch_tokens", "share_prefix", "packing", "compile",
    "activation_checkpointing", "reference_cache", "threads",
)  # fmt: skip
"""Settings that a run makes for itself; printed, since a ratio depends on them."""

Rows = Sequence[Mapping[str, str]]


def made(plan: Plan, prompt: int = 96, response: int = 96) -> list[dict[str, str]]:
    """A batch of pairs of plain words with exactly so many tokens; the end token is one of a
    response's."""
    tokenizer = huggingface.load_tokenizer(plan.model)
    return inputs.made_pairs(tokenizer, BATCH, prompt, response)


@contextmanager
def our_side(rows: Rows, plan: Plan, more: Mapping[str, Any], **job: Any) -> Iterator[Worker]:
    """A run of this library on the rows."""
    with TemporaryDirectory() as folder:
        config = {
            # the default model is converted here, once, before anything is measured
            "method": "dpo", "model": huggingface.resolve_model(plan.model), "template": "none",
            # as many as are taken, and some: whether to compile is decided by how long a run is
            "max_steps": 4 * max(plan.turns, plan.pairs // BATCH),
            "output": f"{folder}/run",
            "data": inputs.write(rows, Path(folder) / "rows.jsonl"), **more,
        }  # fmt: skip
        given = {"config": config, "label": config["method"], **job}
        # a cache of its own: every run computes its reference, and leaves nothing behind
        environment = {**ours.environment(), "PREFTUNE_CACHE": f"{folder}/cache"}
        with Worker("ours.py", given, environment=environment) as worker:
            settled = worker.ready["config"]
            listed = ", ".join(f"{k} {settled[k]}" for k in SETTLED if k in settled)
            say(f"{config['method']}, settled by itself: {listed}")
            yield worker


@contextmanager
def trl_side(
    rows: Rows, plan: Plan, steps: int, *, tuned: bool = True, method: str = "dpo",
    environment: Mapping[str, str] | None = None, **settings: Any,
) -> Iterator[Worker]:  # fmt: skip
    """TRL on the rows, in the environment as it is."""
    with TemporaryDirectory() as folder:
        job = {
            "method": method, "model": huggingface.resolve_model(plan.model), "tuned": tuned,
            "data": inputs.write(rows, Path(folder) / "rows.jsonl"), "settings": settings,
            "steps": steps,
        }  # fmt: skip
        with Worker("trl_side.py", job, environment=environment) as worker:
            yield worker


def same_work(mine: Worker, theirs: Worker) -> None:
    """Both sides have tokenised their texts alike."""
    if mine.ready["digest"] != theirs.ready["digest"]:
        raise Failed("the two sides see different token ids")


def same_losses(name: str, mine: Sequence[Answer], theirs: Sequence[Answer], steps: int) -> None:
    """Both sides have made the same updates, up to rounding."""
    losses = [[answer["loss"] for answer in side[:steps]] for side in (mine, theirs)]
    shown = " against ".join(" ".join(f"{loss:.4f}" for loss in side) for side in losses)
    say(f"{name}: losses {shown}")
    for step, (a, b) in enumerate(zip(*losses, strict=True)):
        if step == 0 and max(abs(a - math.log(2)), abs(b - math.log(2))) > FIRST:
            raise Failed(f"{name}: the first loss is {a:.4f} and {b:.4f}, not ln 2")
        if abs(a - b) > LATER + SHARE * max(0.0, math.log(2) - min(a, b)):
            raise Failed(f"{name}: after {step} updates the losses are {a:.4f} and {b:.4f}")


def say(line: str) -> None:
    """For the reader, beside the rows."""
    print(line, file=sys.stderr, flush=True)


def shown(name: str, mine: Sequence[Answer], theirs: Sequence[Answer], plan: Plan) -> float:
    """The ratio of the typical step times, printed with every step."""
    times = [" ".join(f"{a['seconds']:.2f}" for a in side) for side in (mine, theirs)]
    ratio = typical(theirs, plan) / typical(mine, plan)
    say(f"{name}: seconds {times[0]} against {times[1]}: {ratio:.2f}")
    return ratio


def against_trl(
    name: str, rows: Rows, plan: Plan, *, tuned: bool = True,
    environment: Mapping[str, str] | None = None,
) -> float:  # fmt: skip
    """The ratio of step times, on one batch over and over, by both sides in turn."""
    mine, theirs = (SAME, TUNED) if tuned else ({}, {})
    with (
        our_side(rows, plan, mine) as own,
        trl_side(
            rows, plan, plan.turns + 1, tuned=tuned, environment=environment, **theirs
        ) as other,
    ):
        same_work(own, other)
        found = take_turns({"ours": own, "trl": other}, plan.turns)
        # as they come, the sides differ in learning rate and schedule
        same_losses(name, found["ours"], found["trl"], 3 if tuned else 1)
        return shown(name, found["ours"], found["trl"], plan)


def step(plan: Plan) -> list[Row]:
    """The step, its peak of memory, and how near it comes to what the processor can do; beside it,
    without a target, the step against TRL with our allocator settings."""
    prompt = response = 96
    rows = made(plan, prompt, response)
    tokens = BATCH * (prompt + 2 * response)
    peaks: list[int] = []
    measured: list[dict[str, float]] = []
    with (
        our_side(rows, plan, SAME, tokens=tokens) as own,
        trl_side(rows, plan, plan.turns + 1, **TUNED) as other,
    ):
        same_work(own, other)

        def after(turn: int) -> None:
            if turn == min(PEAK_AFTER, plan.turns):
                peaks.extend(worker.ask("peak")["peak"] for worker in (own, other))
            if peaks:  # products take memory of their own
                measured.append(own.ask("rates")["rates"])

        found = take_turns({"ours": own, "trl": other}, plan.turns, after)
        same_losses("dpo_step", found["ours"], found["trl"], 3)
        ratio = shown("dpo_step", found["ours"], found["trl"], plan)
        shape = Shape(**own.ready["shape"])
    needed = BATCH * useful(shape, prompt, (response, response))
    say(f"dpo_memory: peak {peaks[0] / 1e6:.0f} MB against {peaks[1] / 1e6:.0f} MB")
    share = of_ceiling(needed, typical(found["ours"], plan), measured)
    few = replace(plan, turns=min(plan.turns, plan.dropped + 2))
    against_trl("dpo_step, TRL with our allocator", rows, few, environment=ours.environment())
    return [
        Row("dpo_step", ratio, 1.8),
        Row("dpo_memory", peaks[1] / peaks[0], 1.7),
        Row("dpo_ceiling", share, 0.5),
    ]


def of_ceiling(needed: int, seconds: float, measured: Sequence[Mapping[str, float]]) -> float:
    """Useful operations a second, over the best rate of a matrix product measured in between."""
    rates = {name: median(m[name] for m in measured) for name in measured[0]}
    best = max(rates, key=lambda name: rates[name])
    rate = needed / seconds
    listed = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in rates.items())
    say(
        f"dpo_ceiling: {needed / 1e12:.2f} useful TFLOP a step, {rate / 1e9:.0f} GFLOP/s; "
        f"bfloat16 products, GFLOP/s: {listed}; the best ({best}) is the ceiling"
    )
    return rate / rates[best]


def step_default(plan: Plan) -> list[Row]:
    """Both sides as they come."""
    return [
        Row("dpo_step_default", against_trl("dpo_step_default", made(plan), plan, tuned=False), 2.5)
    ]


def step_long_prompt(plan: Plan) -> list[Row]:
    """Prompts as in summarisation: long, with short responses."""
    name = "dpo_step_long_prompt"
    return [Row(name, against_trl(name, made(plan, 384, 40), plan), 2.5)]


def real_rows(plan: Plan) -> list[Row]:
    """An epoch of ragged pairs, each batch the same on both sides.

    Our side goes through a whole epoch before, of which TRL takes part in the first two steps:
    whenever the cache of the reference is filled, it is full then.
    """
    tokenizer = huggingface.load_tokenizer(plan.model)
    rows = inputs.real_pairs(tokenizer, REAL, plan.pairs)
    epoch = len(rows) // BATCH
    with our_side(rows, plan, SAME, order=2 * epoch) as own:
        batches = own.ready["order"]
        first, counted = batches[: plan.dropped], batches[epoch:]
        theirs = [rows[i] for batch in first + counted for i in batch]
        steps = len(first) + epoch + 1
        with trl_side(theirs, plan, steps, **TUNED) as other:
            same_work(own, other)
            both = {"ours": own, "trl": other}
            before = take_turns(both, len(first))
            same_losses("dpo_rows", before["ours"], before["trl"], len(first))
            for _ in range(epoch - len(first)):
                own.ask("step")
            found = take_turns(both, epoch, fewest=epoch)
    if [a["rows"] for a in found["ours"]] != counted:
        raise Failed("dpo_rows: our side took other rows than TRL was given")
    sums = [sum(a["seconds"] for a in found[side]) for side in ("ours", "trl")]
    say(f"dpo_rows: {epoch} steps take {sums[0]:.1f} s against {sums[1]:.1f} s")
    return [Row("dpo_rows", sums[1] / sums[0], 2.0)]
