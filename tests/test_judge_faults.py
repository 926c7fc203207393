"""A judge that fails in the middle: nothing is lost, nothing is asked twice, the run goes on."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fake_judge import Judge
from preftune import asking, train
from preftune.errors import UserError
from preftune.judging import JudgeAnswers
from preftune.resuming import resumed
from test_training import same, timeless

pytestmark = pytest.mark.long


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setattr(asking, "_LONGEST_WAIT", 0.01)
    found = Judge()
    yield found
    found.stop()


def by_length(question: str) -> str:
    return str(1 + len(question) % 10)


def settings(model: str, data: str, output: Path, judge: Judge, **more: Any) -> dict[str, Any]:
    return {
        "model": model, "data": data, "output": str(output), "threads": 1, "batch_size": 2,
        "method": "on_policy_dpo", "reward": f"judge:{judge.url}", "judge": judge.url,
        "max_steps": 4, "save_every": 2, "max_new_tokens": 4, "learning_rate": 1e-2,
        "eval_fraction": 0.25, **more,
    }  # fmt: skip


def questions(judge: Judge) -> list[str]:
    return [body["messages"][0]["content"] for body in judge.asked]


def test_a_server_that_stops_in_mid_round(judge, tiny_model, pairs_file, tmp_path) -> None:
    judge.reply = by_length
    whole = train(settings(tiny_model, pairs_file, tmp_path / "whole", judge))
    needed = Counter(questions(judge))
    judge.asked.clear()
    answered: list[str] = []

    def stops(question: str) -> Any:
        with judge.lock:
            if len(answered) >= 0.6 * needed.total():
                return 503
            answered.append(question)
        return by_length(question)

    judge.reply = stops
    broken = settings(tiny_model, pairs_file, tmp_path / "broken", judge)
    with pytest.raises(UserError, match=r"status 503.*--resume goes on from there"):
        train(broken)
    judge.reply = by_length
    again = train(resumed({**broken, "resume": True}))
    assert same(whole.folder, again.folder)
    assert timeless(whole.metrics) == timeless(again.metrics)
    asked = Counter(questions(judge))
    assert asked.keys() == needed.keys()
    at_start = {q for q in asked if "Yes." in q or q.startswith("Answer with")}
    refused = set(questions(judge)) - set(answered)
    twice = {q for q in set(answered) - at_start - refused if asked[q] > needed[q]}
    assert not twice, "what was answered before the server stopped is not asked again"
    assert max(needed[q] for q in needed.keys() - at_start) == 1


@pytest.mark.parametrize(
    "fault",
    [
        429, 500, 503, b"", b"{", b'{"choices": [{"message": {"content": ',
        (503, {"Retry-After": "1"}),
    ],
)  # fmt: skip
def test_faults_that_pass_change_nothing(fault, judge, tiny_model, pairs_file, tmp_path) -> None:
    """Every third answer is one of them; those that are no answer at all are asked for again."""
    judge.reply = by_length
    more = {"max_steps": 2, "eval_fraction": 0.0}
    whole = train(settings(tiny_model, pairs_file, tmp_path / "whole", judge, **more))
    count = iter(range(10**9))
    lock = threading.Lock()

    def flaky(question: str) -> Any:
        with lock:
            return fault if next(count) % 3 == 0 else by_length(question)

    judge.reply = flaky
    again = train(settings(tiny_model, pairs_file, tmp_path / "again", judge, **more))
    assert timeless(whole.metrics) == timeless(again.metrics)
    assert same(whole.folder, again.folder)


def test_answers_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    JudgeAnswers(path).get("m", "one", lambda: "1")
    with open(path, "a") as out:
        out.write('{"question": "cut o')
    answers = JudgeAnswers(path)
    assert answers.get("m", "one", lambda: "other") == "1"
    assert answers.get("n", "one", lambda: "2") == "2", "another model"
    assert answers.get("m", "\ud800", lambda: "3") == "3"
    again = JudgeAnswers(path)
    assert [again.get(m, q, lambda: "") for m, q in (("m", "one"), ("n", "one"))] == ["1", "2"]
    assert again.get("m", "\ud800", lambda: "") == "3"


def test_one_answer_counts_where_two_threads_ask(tmp_path: Path) -> None:
    answers = JudgeAnswers(tmp_path / "judge.jsonl")
    numbers = iter(range(10**6))
    gate = threading.Barrier(8)

    def ask() -> str:
        gate.wait()
        return str(next(numbers))

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: answers.get("m", "q", ask), range(8)))
    assert len(found) == 1
    rows = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == list(found)
