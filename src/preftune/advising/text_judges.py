"""Who judges fresh samples of a language model's problem, as functions of samples."""

from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from preftune import huggingface, judges, training
from preftune.advising.scene import ranked
from preftune.advising.texts import TextProblem
from preftune.data import Renderer, Rows
from preftune.numerics import stream_keys
from preftune.problems.drawn import gumbel
from preftune.reward_model import RewardModel
from preftune.samples import Samples

EPOCHS, BATCH, RATE = 3, 32, 1e-3
"""Of a reward model: it overfits beyond, as its accuracy on further pairs shows."""
Judge = Callable[[Samples, Rows], Tensor]
"""Of samples that answer these rows: [N, K], float64."""
OWN = "rm_same"


def own_model(problem: TextProblem, folder: Path) -> RewardModel:
    """A reward model of the problem's own pairs, trained once and kept in a folder.

    Args:
        folder: of all of them; each stands under its problem's name and digest.
    """
    place = folder / f"{problem.name}-{problem.digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{place.name}.lock"):  # two processes want it once
        if not (place / "model" / "config.json").is_file():
            _train(problem, place)
    model, _ = huggingface.load_classifier(str(place), torch.float32)
    return RewardModel(model, share_prefix=False, packing=False)


def _train(problem: TextProblem, place: Path) -> None:
    """By the row for reward models."""
    config = problem.config().model_dump(exclude_unset=True) | {
        "method": "reward", "output": str(place), "resume": True, "epochs": EPOCHS,
        "batch_size": BATCH, "learning_rate": RATE, "eval_fraction": 0.0, "log_every": 10,
        "compile": False,
    }  # fmt: skip
    training.train(config, data=[dict(row) for row in problem.pairs])


def by_model(model: RewardModel) -> Judge:
    """Scores of a reward model."""

    @torch.no_grad()
    def judge(samples: Samples, rows: Rows) -> Tensor:
        return model.score(
            samples.prompt, samples.prompt_mask, samples.tokens, samples.mask
        ).double()

    return judge


def by_reward(problem: TextProblem, renderer: Renderer, *, other: bool = False) -> Judge:
    """The true reward, or that of `rm_other`."""
    made = problem.other_reward() if other else problem.true_reward()

    def judge(samples: Samples, rows: Rows) -> Tensor:
        return judges.judge_of(made, rows, renderer)(samples)

    return judge


def judge_of(problem: TextProblem, renderer: Renderer, folder: Path) -> Judge:
    """What the judge of fresh samples goes by: a reward model's scores, or the true reward (of
    which a human's preferences are draws)."""
    if problem.labels.source == OWN:
        return by_model(own_model(problem, folder))
    return by_reward(problem, renderer, other=problem.labels.source == "rm_other")


def by_human(judge: Judge, seed: int) -> Judge:
    """A ranking of each prompt's responses by somebody who prefers by Bradley-Terry on a judge."""
    keys = stream_keys((seed,), "labels")[:, None]

    def rank(samples: Samples, rows: Rows) -> Tensor:
        return ranked(judge(samples, rows) + gumbel(keys, samples))

    return rank
