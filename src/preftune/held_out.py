"""A run's held-out prompts: a policy's answers to them, as figures and as rows to read."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from preftune import building, judges, judging, loading, rewards
from preftune.data import Renderer, Rows
from preftune.evaluate import Answers, answer, best_of_n, figures, forward_kl, win_figures
from preftune.figures import Figures, displacement, interval
from preftune.likelihoods import pair_figures, plain_text, retention, windows
from preftune.parts import Parts
from preftune.policies.transformer import Transformer
from preftune.runs import JUDGED, RunFolder
from preftune.team import current

log = logging.getLogger("preftune")

EVAL_PROMPTS = 64
SHOWN = 24
"""Held-out samples of each evaluation that are kept."""
BEST_OF, BEST_OF_COST, BEST_OF_PROMPTS = 16, 4, 8
"""Reference samples a prompt for best-of-n; how many times the samples of one evaluation they may
be in all, which bounds the prompts; and the fewest prompts."""


def held_out_answers(
    parts: Parts,
    policy: Transformer,
    num_prompts: int = EVAL_PROMPTS,
    per_prompt: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log_ratio: bool = False,
) -> Answers:
    """A policy's judged samples on the run's held-out prompts."""
    assert parts.held_out is not None, "there are held-out prompts"
    named = {
        r.name: parts.judge(r, parts.held_out) for r in (parts.reward, parts.gold) if r is not None
    }
    # a policy trained behind controls is asked for good; the reference never saw them
    conditioned = policy is parts.model and policy.controls is not None
    asked = building.Asked(parts.held_out, policy) if conditioned else parts.held_out
    return answer(
        policy, parts.reference, asked, named, samples_per_prompt=per_prompt,
        seed=parts.config.seed, micro_batch_tokens=parts.micro_batch_tokens,
        num_prompts=num_prompts, log_ratio=log_ratio,
        own=building.decoding_of(parts.config).unmodified, progress=progress,
    )  # fmt: skip


def sample_rows(
    parts: Parts, answers: Answers, step: int, most: int = SHOWN
) -> list[dict[str, Any]]:
    """Held-out answers as rows of samples.jsonl."""
    assert parts.held_out is not None and parts.renderer is not None, "there are held-out prompts"
    samples, lengths = answers.samples, answers.lengths()
    judged = next(iter(answers.rewards.values()), None)
    rows = []
    for i, row in enumerate(samples.row.tolist()[:most]):
        ids = samples.tokens[i, 0][: int(lengths[i, 0])].tolist()
        rows.append({
            "step": step, "set": "eval", "row": row, "prompt": parts.held_out.texts[row],
            "response": parts.renderer.decode(ids),
            "reward": None if judged is None else float(judged[i, 0]),
            "tokens": int(lengths[i, 0]),
            "finished": bool(samples.finished[i, 0]),
        })  # fmt: skip
    return rows


def eval_metrics(found: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """Evaluation figures under their names in metrics.jsonl; best-of-n is not the policy's own."""
    out: dict[str, Any] = {}
    for name, figure in found.items():
        if name.startswith("best_of_"):
            continue
        out[f"eval_{name}"] = figure["value"]
        if name in ("reward", "kl") or name.startswith(("reward:", "agreement_far:")):
            out |= {f"eval_{name}_low": figure["low"], f"eval_{name}_high": figure["high"]}
    return out


def best_of_prompts(asked: int, samples: int) -> int:
    """Prompts for best-of-n: as many as keep it near the cost of a few evaluations."""
    return min(asked, max(BEST_OF_PROMPTS, BEST_OF_COST * asked // samples))


def judge_figures(
    server: judging.Server,
    answers: Answers,
    against: Answers,
    rows: Rows,
    renderer: Renderer,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Figures:
    """Win rate by a judge against another policy's answers to the same prompts."""
    mine, other = (judges.judged(a.samples, rows, renderer) for a in (answers, against))
    said = judging.compare(server, mine.prompts, mine.completions, other.completions, progress)
    won, malformed = (
        torch.tensor(x, dtype=torch.float64).view(answers.samples.finished.shape)
        for x in (said.wins, said.malformed)
    )
    found = win_figures("judge_win_rate", won, answers, against, seed)
    return found | {"judge_malformed": interval(malformed, seed)}


def spread_figures(
    reward: rewards.Reward | None, answers: Answers, rows: Rows, renderer: Renderer, seed: int = 0
) -> Figures:
    """How far the members of an ensemble disagree on the answers."""
    if not isinstance(reward, rewards.Ensemble):
        return {}
    spread = torch.tensor(reward.spread(judges.judged(answers.samples, rows, renderer)))
    return {"reward_spread": interval(spread.view(answers.samples.finished.shape), seed)}


def evaluator(
    parts: Parts, folder: RunFolder, *, with_best_of_n: bool = True
) -> Callable[[int, bool], dict[str, Any]]:
    """Evaluation as the loop calls it; the reference answers once.

    The last step's is the full one: forward KL, pairs, retention, a judge, best-of-n.

    Raises:
        UserError: the judge or the plain text that the settings name cannot be used.
    """
    assert parts.reference is not None, "held-out prompts bring the reference"
    # that it answers was checked before the run folder was made
    server = None
    if parts.config.judge is not None:
        answers = judging.JudgeAnswers(folder.path / JUDGED)
        server = judging.connect(parts.config.judge, answers=answers)
    pieces = None if parts.config.retention is None else pieces_of(parts, parts.config.retention)
    # its KL to itself is not asked for
    baseline = held_out_answers(replace(parts, reference=None), parts.reference)
    if not baseline.own:
        log.warning("no KL and no entropy on held-out prompts: decoding is not temperature 1 alone")

    def evaluate(step: int, last: bool) -> dict[str, Any]:
        answers = held_out_answers(parts, parts.policy, log_ratio=last)
        found = figures(answers, baseline)
        if last:
            folder.drop("samples.jsonl", step)  # of one that was not full
            found |= _in_full(parts, answers, baseline, server, pieces)
            if with_best_of_n:
                found |= _best_of_n(parts, answers)
        folder.append("samples.jsonl", sample_rows(parts, answers, step))
        folder.write_json("evaluation.json", found)
        return eval_metrics(found)

    return evaluate


def pieces_of(parts: Parts, source: str) -> list[list[int]]:
    """A run's plain text as token ids."""
    size = building.context_of(parts.policy.model) or loading.DEFAULT_MAX_LENGTH
    size = min(size, parts.config.max_length or loading.DEFAULT_MAX_LENGTH)
    return windows(plain_text(source), parts.tokenizer, size)


def _in_full(
    parts: Parts,
    answers: Answers,
    baseline: Answers,
    server: judging.Server | None,
    pieces: list[list[int]] | None,
) -> Figures:
    """What is measured once, at the end of a run."""
    reference, rows, renderer = parts.reference, parts.held_out, parts.renderer
    assert reference is not None and rows is not None and renderer is not None, "see evaluator"
    budget = parts.micro_batch_tokens
    found = forward_kl(parts.policy, reference, baseline, budget)
    found |= spread_figures(parts.reward, answers, rows, renderer)
    if rows.kind == "pairs":
        few = rows.select(range(min(EVAL_PROMPTS, len(rows))))
        found |= pair_figures(parts.policy, reference, few, budget)
        warning = displacement(found)
        if warning:
            log.warning("%s", warning)
    if pieces is not None:
        found |= retention(parts.policy, reference, pieces, budget)
    if server is not None:
        found |= current().by_main(lambda: judge_figures(server, answers, baseline, rows, renderer))
    return found


def _best_of_n(parts: Parts, answers: Answers) -> Figures:
    """Best-of-n from the reference on some of the held-out prompts."""
    if not answers.rewards or not answers.own or parts.reference is None:
        return {}
    prompts = best_of_prompts(len(answers.samples.row), BEST_OF)
    drawn = held_out_answers(replace(parts, reference=None), parts.reference, prompts, BEST_OF)
    return best_of_n(drawn, answers.first(prompts))[0]
