"""Rewards, models and data as TRL's trainers take them run unchanged."""

import asyncio
import math
from typing import Any

import pytest

from preftune import rewards, train
from preftune.errors import UserError
from preftune.judges import make_reward
from preftune.rewards import Judged

TURNS = [{"role": "user", "content": "Say 1."}]
PLAIN = Judged(
    prompts=["a", "b"], completions=["x", "yy"], tokens=[1, 2], columns={"answer": ["x", "z"]},
    ids=[[5, 1], [6, 6]],
)  # fmt: skip
CHAT = Judged(prompts=[TURNS], completions=["<think>\nx\n</think>\ny"], tokens=[9], ids=[[3] * 9])


def given_rewards(given: Any, judged: Judged, weights: list[float] | None = None) -> list[float]:
    made = make_reward(given, weights)
    assert made is not None
    return rewards.judge(made, judged)


def by_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def by_column(prompts: Any, completions: Any, answer: list[str], **kwargs: Any) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def of_some(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None if len(c) > 1 else 3.0 for c in completions]


def that_logs(completions: Any, log_extra: Any = None, log_metric: Any = None, **kwargs: Any):
    log_extra("length", [len(c) for c in completions])
    log_metric("mean", 0.5)
    return [0.0] * len(completions)


async def awaited(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def by_step(completions: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(by_ids, [2.0, 2.0]), (by_column, [1.0, 0.0]), (that_logs, [0.0, 0.0]), (awaited, [1.0, 2.0])],
)
def test_signatures(function, expected):
    assert given_rewards(function, PLAIN) == expected


def test_a_coroutine_where_a_loop_runs_already():
    async def notebook() -> list[float]:
        return given_rewards(awaited, PLAIN)

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_functions_of_trl():
    trl = pytest.importorskip("trl.rewards", reason="trl is not installed")
    assert given_rewards(trl.think_format_reward, CHAT) == [1.0]
    overlong = trl.get_soft_overlong_punishment(max_completion_len=2, soft_punish_cache=1)
    assert given_rewards(overlong, PLAIN) == [-1.0, -1.0]


def test_none_leaves_a_response_to_the_others():
    both = make_reward([of_some, by_ids], [1.0, 0.5])
    assert isinstance(both, rewards.Weighted)
    first, second = both.each(PLAIN)
    assert first[0] == 3.0 and math.isnan(first[1]) and second == [2.0, 2.0]
    assert rewards.judge(both, PLAIN) == [4.0, 1.0]
    with pytest.raises(UserError, match="returned None for response 1"):
        given_rewards(of_some, PLAIN)
    with pytest.raises(UserError, match="judges response 1.*each returned None"):
        given_rewards([of_some, of_some], PLAIN)


@pytest.mark.parametrize(
    ("given", "words"),
    [(by_step, "takes trainer_state.*Leave the argument out"), (3, "neither a name"),
     ([by_ids, 3], "neither a name")],
)  # fmt: skip
def test_what_is_no_reward(given, words):
    with pytest.raises(UserError, match=words):
        given_rewards(given, PLAIN)


def test_objects_as_trl_takes_them(here, tiny_model):
    """A data set in conversational format, a model and a tokenizer, a list of rewards."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    seen: list[Any] = []

    def kinds(prompts: Any, completions: Any, kind: Any, completion_ids: Any, **more: Any):
        seen.append((prompts[0], completions[0][0]["role"], kind[0], completion_ids[0]))
        both = zip(kind, completions, strict=True)
        return [None if k == "other" else -float(len(c[0]["content"])) for k, c in both]

    judge = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    data = Dataset.from_list([{"prompt": TURNS, "kind": kind} for kind in ("own", "other")])
    run = train(
        {"method": "rloo", "samples_per_prompt": 2, "batch_size": 2, "max_steps": 1,
         "max_new_tokens": 4, "output": "out", "reward_weights": [1.0, 2.0]},
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        tokenizer=AutoTokenizer.from_pretrained(tiny_model), data=data, reward=[kinds, judge],
    )  # fmt: skip
    assert seen[0][0] == TURNS and seen[0][1] == "assistant" and seen[0][2] == "own"
    assert all(isinstance(i, int) for i in seen[0][3])
    (row,) = run.metrics
    assert math.isfinite(row["reward"]) and math.isfinite(row["reward:kinds"])


PAIR = {"chosen": {"role": "assistant", "content": "1"},
        "rejected": {"role": "assistant", "content": "I say 22"}}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("dpo", {"prompt": "Say 1.", "chosen": "1", "rejected": "I say 22"}),
        ("dpo", {"prompt": TURNS, **{k: [v] for k, v in PAIR.items()}}),
        ("dpo", {k: [*TURNS, v] for k, v in PAIR.items()}),
        ("sft", {"messages": [*TURNS, PAIR["chosen"]]}),
        ("sft", {"prompt": TURNS, "completion": [PAIR["chosen"]]}),
        ("kto", {"prompt": TURNS, "completion": [PAIR["chosen"]], "label": True}),
    ],
    ids=["standard", "conversational", "implicit prompt", "messages", "completion", "unpaired"],
)
def test_formats_of_data(here, tiny_model, method, row):
    from datasets import Dataset

    from preftune.config import load
    from preftune.preparing import prepare

    data = Dataset.from_list([row, row | {"label": False}] if "label" in row else [row, row])
    parts = prepare(load({"method": method, "model": tiny_model}), data=data)
    assert parts.data is not None and len(parts.data) == 2
    assert parts.data.responses[0][0][-1] == 1, "the end token is one of the response's"
