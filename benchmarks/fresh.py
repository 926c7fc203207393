"""Fresh samples: the sampler against others, the whole on-policy step, and what HyPO costs."""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import inputs
import samplers
from dpo import SAME, made, our_side, same_work, say, shown, trl_side
from results import Plan, Row, Skipped
from workers import Answer, Worker, take_turns, typical

from preftune import huggingface

PROMPTS, SAMPLES, TOKENS = 16, 8, 64
VLLM = "PREFTUNE_VLLM_PYTHON"
GENTLE = 1e-6
"""Learning rate of steps with samples: lengths stay what they are."""
FRESH = {**SAME, "learning_rate": GENTLE}
HYPO_TOKENS = 53


def _sampler(side: str, plan: Plan, python: str = sys.executable) -> Worker:
    tokenizer = huggingface.load_tokenizer(plan.model)
    texts = inputs.prompts(tokenizer, PROMPTS)
    job = {
        "side": side, "label": side, "samples": SAMPLES, "tokens": TOKENS,
        "model": huggingface.resolve_model(plan.model),
        "prompts": [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts],
        "ends": [tokenizer.eos_token_id],
    }  # fmt: skip
    return Worker("samplers.py", job, environment=samplers.environment(side), python=python)


def _rate(name: str, answers: list[Answer], plan: Plan) -> float:
    """Tokens a second: how many there are differs by draw."""
    rates = [{"rate": a["tokens"] / a["seconds"]} for a in answers]
    rate = typical(rates, plan, "rate")
    tokens = " ".join(str(a["tokens"]) for a in answers)
    ended = sum(a["ended"] for a in answers) / len(answers)
    say(f"sampling: {name} {rate:.0f} tokens/s; {tokens} tokens, {ended:.2f} of them ended early")
    return rate


def _against(other: str, python: str, plan: Plan) -> float:
    """The ratio of tokens a second."""
    few = replace(plan, turns=max(2, plan.turns - 2), dropped=1)
    with _sampler("ours", plan) as mine, _sampler(other, plan, python) as theirs:
        found = take_turns({"ours": mine, other: theirs}, few.turns)
    return _rate("ours", found["ours"], few) / _rate(other, found[other], few)


def sampling(plan: Plan) -> list[Row]:
    """Against `generate`."""
    return [Row("sampling", _against("transformers", sys.executable, plan), 2.5)]


def sampling_vllm(plan: Plan) -> list[Row]:
    """Against an engine made for it."""
    python = os.environ.get(VLLM)
    if not python:
        raise Skipped(f"{VLLM} does not name the python of an environment with vllm")
    return [Row("sampling_vllm", _against("vllm", python, plan), 1.0)]


def on_policy_step(plan: Plan) -> list[Row]:
    """Sample, judge, score, train, step: two samples to each of eight prompts, one update."""
    tokenizer = huggingface.load_tokenizer(plan.model)
    rows = [{"prompt": text} for text in inputs.prompts(tokenizer, 8, tokens=96)]
    mine: dict[str, Any] = {"method": "on_policy_dpo", "passes": 1, "max_new_tokens": TOKENS}
    theirs: dict[str, Any] = {
        "learning_rate": GENTLE, "lr_scheduler_type": "constant", "max_new_tokens": TOKENS,
        "temperature": 1.0, "per_device_train_batch_size": len(rows),
    }  # fmt: skip
    with (
        our_side(rows, plan, {**FRESH, **mine}, reward=True) as own,
        trl_side(rows, plan, plan.turns + 1, method="online_dpo", **theirs) as other,
    ):
        same_work(own, other)
        found = take_turns({"ours": own, "trl": other}, plan.turns)
    for name, answers in found.items():
        say(f"on_policy_step: {name} drew {' '.join(str(a['drawn']) for a in answers)} tokens")
    return [Row("on_policy_step", shown("on_policy_step", found["ours"], found["trl"], plan), 3.0)]


def hypo(plan: Plan) -> list[Row]:
    """What fresh samples add to a DPO step; beside it the other rows that draw, without targets."""
    rows = made(plan)
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    few = min(plan.turns, plan.dropped + 2)  # where there is no target
    # four at once would fill the memory
    for names, turns in ((("dpo", "hypo"), plan.turns), (("ppo", "on_policy_dpo"), few)):
        with ExitStack() as stack:
            sides = {
                name: stack.enter_context(our_side(rows, plan, **_row(name))) for name in names
            }
            for name, answers in take_turns(sides, turns).items():
                seconds[name] = typical(answers, plan)
                peaks[name] = sides[name].ask("peak")["peak"]
                drawn = answers[-1]["drawn"]
                say(
                    f"hypo: {name} {seconds[name]:.2f} s a step, {drawn} tokens drawn a round, "
                    f"peak {peaks[name] / 1e6:.0f} MB"
                )
    return [
        Row("hypo_step", seconds["dpo"] / seconds["hypo"], 0.3),
        Row("hypo_memory", peaks["dpo"] / peaks["hypo"], 0.9),
    ]


def _row(name: str) -> Mapping[str, Any]:
    """The run of a row as it comes, with samples of at most so many tokens where it draws."""
    more = {"method": name} if name == "dpo" else {"method": name, "max_new_tokens": HYPO_TOKENS}
    return {"more": {**FRESH, **more}, "reward": name in ("ppo", "on_policy_dpo")}
