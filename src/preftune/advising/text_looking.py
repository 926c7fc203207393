"""The diagnosis of a language model's problem: the figures that its user would be shown."""

from dataclasses import replace
from pathlib import Path

import torch

from preftune.advising.looking import PROMPTS, ROWS, SAMPLES, Seen, prices, reached
from preftune.advising.text_scene import load
from preftune.advising.texts import TextProblem
from preftune.diagnosis import measure
from preftune.diagnosis.measure import Job, Measured
from preftune.diagnosis.pieces import Pieces
from preftune.diagnosis.reading import figures
from preftune.numerics import stream_key


def look(problem: TextProblem, models: Path, seed: int = 0) -> Seen:
    """Diagnose it as its user would (see `looking.look`), by as many pairs and answers.

    Args:
        models: folder of reward models.
    """
    held = load(problem, models)
    key = stream_key(seed, problem.name, "diagnosis")
    job = Job(
        reference=held.reference, policy=None, rows=held.rows, seed=key, budget=None,
        judge=lambda samples: held.judge(samples, held.rows), pieces=Pieces(None, ""),
    )  # fmt: skip
    rows = measure.order(job)
    few = rows[:PROMPTS]
    with torch.no_grad():
        data, drawn = measure.data(job, rows[:ROWS]), measure.drawn(job, few, SAMPLES)
    if problem.labels.source == "human":
        assert data.reward is not None and drawn.reward is not None, "the job has a judge"
        gap = drawn.reward[:, 0] - data.reward[: len(few), 0]
        unseen = Measured(data=replace(data, reward=None), drawn=replace(drawn, reward=None))
        found = figures(unseen, seed) | {"reached_chosen": reached(gap, key, seed)}
    else:
        found = figures(Measured(data=data, drawn=drawn), seed)
    return Seen(figures=found, price=prices(problem, len(data.row), len(few) * SAMPLES))
