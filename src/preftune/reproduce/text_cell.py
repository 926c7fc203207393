"""Runs of a row on a language problem, as a study takes them: the ordinary training of a model
folder, judged on held-out prompts on the way.
"""

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from preftune import config, held_out, loop, parts, preparing, training
from preftune.errors import GuardStop
from preftune.evaluate import Answers, figures
from preftune.likelihoods import pair_figures, pair_logp
from preftune.numerics import stream_key
from preftune.parts import Parts
from preftune.reproduce.places import Place
from preftune.runs import RunFolder
from preftune.study import Row, one_thread

ANSWERS = 192
"""On held-out prompts, each time that a policy is judged, where a cell does not say."""
TRAINED_PAIRS = 64
"""Of the run's own pairs, whose log-ratios are followed."""
OF_UPDATES = ("loss", "grad_norm", "seconds", "reward_queries", "no_end", "pairs")
"""Metrics of an update that are kept where a run is judged."""


@dataclass(frozen=True, kw_only=True)
class TextCell:
    """Runs of one row with one setting at one place."""

    place: Place
    method: str
    settings: tuple[tuple[str, Any], ...] = ()
    """Of a config, beside those of the place and those below; `terms.I...` as by --set."""
    updates: int
    batch_size: int
    learning_rate: float
    evals: int = 4
    """Times that a run is judged after its start."""
    answers: int | None = None
    """To held-out prompts in all, each time."""
    chunk: int = 1

    @property
    def key(self) -> str:
        """See `study.Runnable.key`."""
        return f"{self.method}-{self.place.problem}-{stream_key(self.plain()):016x}"

    @property
    def cost(self) -> float:
        """See `study.Runnable.cost`."""
        return self.updates * self.batch_size * (6.0 if self.place.model == "small" else 600.0)

    def plain(self) -> dict[str, Any]:
        """See `study.Runnable.plain`."""
        return {
            "place": repr(self.place), "method": self.method, "settings": dict(self.settings),
            "updates": self.updates, "batch_size": self.batch_size,
            "learning_rate": self.learning_rate, "evals": self.evals, "answers": self.answers,
        }  # fmt: skip

    def placed(self, folder: Path) -> "TextCell":
        """See `study.Runnable.placed`."""
        return replace(self, place=replace(self.place, folder=str(folder)))

    def run(self, seeds: tuple[int, ...]) -> list[Row]:
        """See `study.Runnable.run`."""
        with one_thread():
            return [row for seed in seeds for row in self._one(seed)]

    def _one(self, seed: int) -> list[Row]:
        made = self.place.made(seed)
        terms = {k: v for k, v in self.settings if k.startswith("terms.")}
        plain = {k: v for k, v in self.settings if not k.startswith("terms.")}
        with tempfile.TemporaryDirectory() as scratch:
            given = {
                "method": self.method, "output": f"{scratch}/run", "seed": seed,
                "max_steps": self.updates, "batch_size": self.batch_size,
                "learning_rate": self.learning_rate, "warmup_ratio": 0.0,
                "lr_schedule": "constant", "log_every": max(1, self.updates // self.evals),
                "eval_every": max(1, self.updates // self.evals), **made.settings(), **plain,
            }  # fmt: skip
            of = preparing.prepare(config.load(given), overrides=terms)
            return _trained(of, seed, self.answers or ANSWERS)


def _trained(of: Parts, seed: int, answers: int) -> list[Row]:
    """Rows of a run: at its start, on the way, and at its last step, whether or not it came there:
    a run that had to stop stays as it was judged last, each time until the end, and its last row
    says `stopped`."""
    settings = parts.make_settings(of)
    folder = RunFolder.create(of.output, parts.resolved_config(of, settings))
    judged = _judging(of, answers)
    stopped = math.nan
    with _quiet():
        try:
            training.execute(of, settings, folder, evaluate=judged, tell=lambda *_, **__: None)
        except GuardStop:
            stopped = 1.0
    rows: list[Row] = []
    for metrics in folder.read("metrics.jsonl"):
        found = {k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_")}
        if found:
            own = {k: v for k, v in metrics.items() if k in OF_UPDATES and v is not None}
            rows.append({"seed": seed, "step": metrics["step"], **own, **found})
    if rows[-1]["step"] != settings.max_steps:
        last = rows[-1]
        rows += [{**last, "step": step} for step in _judged_at(settings) if step > last["step"]]
        rows[-1]["stopped"] = stopped
    rows[-1] |= {f"alarm_{alarm['alarm']}": 1.0 for alarm in folder.read("alarms.jsonl")}
    return rows


def _judged_at(settings: loop.Settings) -> list[int]:
    """Updates after which a run that goes to its last step is judged, and 0."""
    assert settings.eval_every is not None, "a cell is judged on the way"
    return [*range(0, settings.max_steps, settings.eval_every), settings.max_steps]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of single runs among hundreds: claims have their own notes."""
    logger = logging.getLogger("preftune")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _judging(of: Parts, answers: int) -> Any:
    """What a policy is like on held-out prompts, and on some pairs that it trains on."""
    rows, reference = of.held_out, of.reference
    assert rows is not None and reference is not None and of.data is not None, "a place has all"
    each = max(1, answers // len(rows))
    baseline = _answers(of, reference, each)
    few = of.data.select(range(min(TRAINED_PAIRS, len(of.data))))

    budget = of.micro_batch_tokens
    ref_logp = pair_logp(reference, few, budget) if few.kind == "pairs" else None

    def judge(step: int, last: bool) -> dict[str, Any]:
        found = figures(_answers(of, of.policy, each), baseline)
        if ref_logp is not None:
            found |= pair_figures(of.policy, reference, few, budget, ref_logp=ref_logp)
        return {f"eval_{name}": figure["value"] for name, figure in _named(found).items()}

    return judge


def _answers(of: Parts, policy: Any, each: int) -> Answers:
    assert of.held_out is not None, "a place has held-out prompts"
    with torch.no_grad():
        return held_out.held_out_answers(of, policy, len(of.held_out), each)


def _named(found: Mapping[str, Any]) -> dict[str, Any]:
    """`gold` is the true reward, `proxy` the one that is optimised: the same where it is true."""
    out: dict[str, Any] = {}
    for name, figure in found.items():
        base, colon, _ = name.partition(":")
        if base == "reward":
            out["gold" if colon else "proxy"] = figure
        elif colon:
            out[base] = figure  # by the true reward
        elif name not in out:
            out[name] = figure
    out.setdefault("gold", out["proxy"])
    return out
