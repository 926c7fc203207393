"""A run's held-out prompts: a policy's answers to them, as figures and as rows to read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from preftune.evaluate import Answers, answer, figures
from preftune.parts import Parts
from preftune.policies.transformer import Transformer
from preftune.runs import RunFolder

EVAL_PROMPTS = 64
SHOWN = 24
"""Held-out samples of each evaluation that are kept."""


def held_out_answers(
    parts: Parts,
    policy: Transformer,
    num_prompts: int = EVAL_PROMPTS,
    per_prompt: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """A policy's judged samples on the run's held-out prompts."""
    assert parts.held_out is not None, "there are held-out prompts"
    named = {
        r.name: parts.judge(r, parts.held_out) for r in (parts.reward, parts.gold) if r is not None
    }
    return answer(
        policy, parts.reference, parts.held_out, named, samples_per_prompt=per_prompt,
        seed=parts.config.seed, micro_batch_tokens=parts.micro_batch_tokens,
        num_prompts=num_prompts, progress=progress,
    )  # fmt: skip


def sample_rows(
    parts: Parts, answers: Answers, step: int, most: int = SHOWN
) -> list[dict[str, Any]]:
    """Held-out answers as rows of samples.jsonl."""
    assert parts.held_out is not None and parts.renderer is not None, "there are held-out prompts"
    samples, lengths = answers.samples, answers.lengths()
    rewards = next(iter(answers.rewards.values()), None)
    rows = []
    for i, row in enumerate(samples.row.tolist()[:most]):
        ids = samples.tokens[i, 0][: int(lengths[i, 0])].tolist()
        rows.append({
            "step": step, "set": "eval", "row": row, "prompt": parts.held_out.texts[row],
            "response": parts.renderer.decode(ids),
            "reward": None if rewards is None else float(rewards[i, 0]),
            "tokens": int(lengths[i, 0]),
            "finished": bool(samples.finished[i, 0]),
        })  # fmt: skip
    return rows


def eval_metrics(found: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """Evaluation figures under their names in metrics.jsonl."""
    out: dict[str, Any] = {}
    for name, figure in found.items():
        out[f"eval_{name}"] = figure["value"]
        if name in ("reward", "kl"):
            out |= {f"eval_{name}_low": figure["low"], f"eval_{name}_high": figure["high"]}
    return out


def evaluator(parts: Parts, folder: RunFolder) -> Callable[[int], dict[str, Any]]:
    """Evaluation as the loop calls it; the reference answers once."""
    assert parts.reference is not None, "held-out prompts bring the reference"
    # its KL to itself is not asked for
    baseline = held_out_answers(replace(parts, reference=None), parts.reference)

    def evaluate(step: int) -> dict[str, Any]:
        answers = held_out_answers(parts, parts.policy)
        found = figures(answers, baseline)
        folder.append("samples.jsonl", sample_rows(parts, answers, step))
        folder.write_json("evaluation.json", found)
        return eval_metrics(found)

    return evaluate
