"""A language model's problem as runs: the world of one run, and what its policy is worth."""

import copy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preftune import building, huggingface, loading, loop
from preftune.advising import files, text_judges
from preftune.advising.text_judges import Judge
from preftune.advising.texts import TextProblem
from preftune.counting import counts
from preftune.data import Renderer, Rows
from preftune.evaluate import Answers, answer
from preftune.method import Method
from preftune.policies.transformer import Transformer
from preftune.rounds import World
from preftune.samples import Samples

SAMPLES = 16
"""Answers to a held-out prompt, each time that a policy is judged."""
REFERENCE_SAMPLES = 96
"""Of the reference, once."""
TRUE, JUDGE = "true", "judge"


@dataclass(frozen=True)
class TextScene:
    """One problem. Its fields but for `digest` say where things are."""

    path: str = field(repr=False)
    """Of its file."""
    digest: str
    """Of all that decides what its runs give."""
    models: str = field(repr=False)
    """Folder of reward models that are trained on the way."""
    chunk: int = field(default=1, repr=False)
    cost: float = field(default=100.0, repr=False)

    def problem(self, run: int = 0) -> TextProblem:
        """Of any of its runs."""
        return _problem(self.path)

    def world(
        self, method: Method, seeds: tuple[int, ...], batch_size: int, data: Samples | None = None
    ) -> World:
        """See `study.Problem.world`; there is one run at a time."""
        assert data is None and len(seeds) == 1, "one run, on pairs of its own"
        held = _loaded(self.path, self.models)
        policy = held.policy(method)
        judge = held.judge
        if held.problem.labels.source == "human":
            judge = text_judges.by_human(judge, seeds[0])
        return World(
            policy=policy, reference=held.reference, data=held.rows, prompts=held.rows,
            reward=lambda samples: judge(samples, held.rows), seed=seeds[0],
            batch_size=batch_size, micro_batch_tokens=None,
        )  # fmt: skip

    def evaluate(self, run: loop.State) -> dict[str, Tensor]:
        """Figures by sampling, [1] each, and what has been spent."""
        policy, seed = run.world.policy, run.world.seed
        assert isinstance(policy, Transformer) and isinstance(seed, int), "a language model's"
        held = _loaded(self.path, self.models)
        found = worth(held, held.answers(policy, seed), _paired(held, seed))
        return {k: torch.tensor([v]).double() for k, v in (found | counts(run)).items()}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A problem with its model, rows and judges at hand."""

    problem: TextProblem
    model: Any
    tokenizer: Any
    renderer: Renderer
    rows: Rows
    """The pairs."""
    held_out: Rows
    """Prompts."""
    reference: Transformer
    true: Judge
    judge: Judge
    """What it goes by, where it is a human."""

    def policy(self, method: Method) -> Transformer:
        """The model as it starts, to be trained."""
        return building.make_policy(
            self.problem.config(), copy.deepcopy(self.model), self.tokenizer, method
        )

    def answers(self, policy: Transformer, seed: int, samples: int | None = None) -> Answers:
        """A policy's judged answers to the held-out prompts. Of equal seeds, they are drawn by the
        same random numbers, whichever the policy."""
        judges = {
            name: lambda samples, judge=judge: judge(samples, self.held_out)
            for name, judge in ((TRUE, self.true), (JUDGE, self.judge))
        }
        return answer(
            policy, self.reference, self.held_out, judges, seed=seed,
            samples_per_prompt=samples or SAMPLES,
        )  # fmt: skip


def _problem(path: str) -> TextProblem:
    found = files.load(Path(path))
    assert isinstance(found, TextProblem), "a language model's"
    return found


@lru_cache(maxsize=4)
def _loaded(path: str, models: str) -> Loaded:
    """Read once a process."""
    return load(_problem(path), Path(models))


def load(problem: TextProblem, models: Path) -> Loaded:
    """A problem's model, rows and judges.

    Raises:
        UserError: a row that the model cannot take, a reward that cannot be made.
    """
    config = problem.config()
    tokenizer = huggingface.load_tokenizer(config.model)
    model = huggingface.load_model(config.model, torch.float32)
    reference = building.make_policy(config, copy.deepcopy(model), tokenizer).frozen_copy()
    renderer = building.make_renderer(config, tokenizer, reference)
    context = building.context_of(model)
    rows, held_out = (
        loading.load_rows(
            [dict(row) for row in each], config, renderer, want=want, context=context,
            reserve=config.max_new_tokens,
        )[0]
        for each, want in ((problem.pairs, "pairs"), (problem.held_out, "prompts"))
    )  # fmt: skip
    return Loaded(
        problem=problem, model=model, tokenizer=tokenizer, renderer=renderer, rows=rows,
        held_out=held_out, reference=reference, true=text_judges.by_reward(problem, renderer),
        judge=text_judges.judge_of(problem, renderer, models),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What a run's figures are compared with."""

    same: dict[str, Tensor]
    """Rewards [N, K] of the reference's answers by a run's own random numbers, by judge."""
    many: dict[str, Tensor]
    """[N, M], of many more."""


_known: dict[tuple[str, int], dict[str, Tensor]] = {}


def _paired(held: Loaded, seed: int) -> Paired:
    """The reference's rewards, drawn once a process."""

    def rewards(key: int, samples: int) -> dict[str, Tensor]:
        name = held.problem.digest, key
        if name not in _known:
            _known[name] = dict(held.answers(held.reference, key, samples).rewards)
        return _known[name]

    return Paired(same=rewards(seed, SAMPLES), many=rewards(-1, REFERENCE_SAMPLES))


def worth(held: Loaded, found: Answers, against: Paired) -> dict[str, float]:
    """What a policy is worth, means over held-out prompts.

    The same figures as of an enumerable problem (see `scene.worth`), by sampling.
    """
    beta, kl = held.problem.beta, found.kl
    assert kl is not None, "answers of the policy's own distribution"
    earned = {
        name: controlled(found.rewards[name] - beta * kl, against.same[name], against.many[name])
        for name in (TRUE, JUDGE)
    }
    gap = found.rewards[TRUE][:, :, None] - against.many[TRUE][:, None, :]
    return {
        "value": earned[TRUE], "proxy": earned[JUDGE],
        "proxy_spread": float(found.rewards[JUDGE].var(-1).mean().sqrt()),
        "win": float(torch.sigmoid(gap).mean()), "reverse_kl": float(kl.mean()),
    }  # fmt: skip


def controlled(
    own: Float[Tensor, "N K"], same: Float[Tensor, "N K"], many: Float[Tensor, "N M"]
) -> float:
    """The mean of `own`, less what is luck in it: samples of the policy are paired with those of
    the reference by the same random numbers, and the reference's mean is known from many more.

    Exactly the reference's where the policy is the reference; never much worse than the plain mean,
    since the coefficient is the regression's.
    """
    x, y = (z - z.mean(-1, keepdim=True) for z in (same, own))
    slope = float((x * y).sum() / (x * x).sum()) if bool(x.any()) else 1.0
    return float(own.mean()) - min(max(slope, 0.0), 1.0) * float(same.mean() - many.mean())


def parameters(problem: TextProblem) -> int:
    """Trained numbers of a policy."""
    model = huggingface.load_model(problem.model, torch.float32)
    return sum(p.numel() for p in model.parameters())
