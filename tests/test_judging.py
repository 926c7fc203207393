"""A judge over real HTTP on this machine: verdicts, nonsense, failures and silence."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fake_judge import Judge, between, longer_wins
from preftune import rewards
from preftune.errors import UserError
from preftune.judge_server import key_for
from preftune.judging import check, compare, connect, score, winner
from preftune.rewards import Judged


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    for name in ("PREFTUNE_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    made = Judge()
    yield made
    made.stop()


# --- verdicts -------------------------------------------------------------------------------------


def test_each_side_stands_first_once(judge: Judge) -> None:
    judge.reply = longer_wins
    said = compare(judge.server(), ["p", "q", "r"], ["long", "a", "same"], ["b", "much", "size"])
    assert said.wins == [1.0, 0.0, 0.5] and said.malformed == [0.0, 0.0, 1.0]
    assert len(judge.asked) == 6 and set(judge.paths) == {"/v1/models", "/v1/chat/completions"}
    assert judge.paths.count("/v1/models") == 1
    assert all(body["model"] == "tiny-judge" and body["temperature"] == 0 for body in judge.asked)
    seen = {
        (between(q, "response_A"), between(q, "response_B"))
        for q in (body["messages"][0]["content"] for body in judge.asked)
    }
    assert {("long", "b"), ("b", "long")} <= seen


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_of_places_alone_gives_ties(judge: Judge, letter: str) -> None:
    judge.reply = lambda question: letter
    said = compare(judge.server(), ["p"] * 5, list("vwxyz"), list("abcde"))
    assert said.wins == [0.5] * 5 and said.malformed == [0.0] * 5


def test_one_malformed_answer_of_two_counts_half(judge: Judge) -> None:
    judge.reply = lambda q: "A" if between(q, "response_A") == "mine" else "cannot say"
    said = compare(judge.server(), ["p"], ["mine"], ["other"])
    assert said.wins == [0.75] and said.malformed == [0.5]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("A", 1.0), ("B", 0.0), (" b.\n", 0.0), ("**A**", 1.0), ("[[B]]", 0.0), ("Response A", 1.0),
        ("The better response is B", 0.0), ("Answer: A", 1.0), ("Final verdict: [[A]] it is", 1.0),
        ("<think>B is long, B it is</think>\nA", 1.0), ("<think>A, but I never end", None),
        ("", None), ("A or B", None), ("A tie", None), ("[[A]] or [[B]]", None), ("C", None),
        ("AB", None), ("A good question", None),
    ],
)  # fmt: skip
def test_what_counts_as_a_verdict(answer: str, found: float | None) -> None:
    assert winner(answer) == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("7", 7.0), (" 7.5\n", 7.5), ("**10**", 10.0), ("8/10", 8.0), ("8 out of 10", 8.0),
        ("Score: 3", 3.0), ("<think>9</think>2", 2.0), ("11", None), ("0", None), ("-3", None),
        ("good", None), ("", None), ("3 or 4", None), ("score: 3, score: 4", None),
    ],
)  # fmt: skip
def test_what_counts_as_a_score(answer: str, found: float | None) -> None:
    assert score(answer) == found


def test_conversations_are_told_turn_by_turn(judge: Judge) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{hi}"}]
    compare(judge.server(), [turns], ["x {y}"], ["z"])
    question = judge.asked[0]["messages"][0]["content"]
    assert between(question, "prompt") == "system: Be brief.\nuser: {hi}"


# --- the judge as a reward ------------------------------------------------------------------------


def judged(*completions: str) -> Judged:
    return Judged(
        prompts=["p"] * len(completions), completions=list(completions),
        tokens=[1] * len(completions),
    )  # fmt: skip


def test_scores_as_a_reward(judge: Judge, caplog: pytest.LogCaptureFixture) -> None:
    judge.reply = lambda q: {"good": "9", "bad": "2/10"}.get(between(q, "response"), "hm")
    reward = rewards.make(f"judge:{judge.url}#my-model", lambda name: pytest.fail("no classifier"))
    assert reward.label_source == "judge" and reward.name == f"judge:{judge.url}#my-model"
    assert rewards.judge(reward, judged("good", "odd", "bad")) == [9.0, 5.5, 2.0]
    assert {body["model"] for body in judge.asked} == {"my-model"}
    assert "/v1/models" not in judge.paths
    assert "1 of 3 answers" in caplog.text and "5.5" in caplog.text
    caplog.clear()
    rewards.judge(reward, judged("good"))
    assert not caplog.text


# --- failures -------------------------------------------------------------------------------------


def test_what_passes_is_tried_again(judge: Judge) -> None:
    failures = iter([500, (429, {"Retry-After": "0"}), 503])
    judge.reply = lambda q: next(failures, "A")
    assert judge.server().ask("x") == "A"
    assert len(judge.asked) == 4


def test_a_server_that_stays_broken_is_a_users_error(judge: Judge) -> None:
    judge.reply = lambda q: 500
    with pytest.raises(UserError, match=r"no answer after 4 tries \(status 500: no\)") as error:
        compare(judge.server(), ["p"], ["a"], ["b"])
    assert judge.url in str(error.value)


def test_slow_answers_are_given_up(judge: Judge) -> None:
    slow = threading.Event()
    judge.reply = lambda q: "A" if slow.is_set() else (slow.set(), time.sleep(1.0), "B")[2]
    assert judge.server(timeout=0.2).ask("x") == "A", "the second try is in time"
    judge.reply = lambda q: (time.sleep(1.0), "B")[1]
    with pytest.raises(UserError, match=r"2 tries \(.*timed out"):
        judge.server(timeout=0.1, tries=2).ask("x")


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
    began = time.perf_counter()
    with pytest.raises(UserError, match="refused.*Start the server"):
        check(connect(f"http://127.0.0.1:{free}/v1", wait=0.01))
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (401, "wants another key.*PREFTUNE_JUDGE_KEY"), (403, "wants another key"),
        (404, "no such address or model.*up to /v1"),
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}), "no such address.*302"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_said_at_once(judge: Judge, reply: Any, words: str) -> None:
    judge.reply = lambda q: reply
    with pytest.raises(UserError, match=words):
        check(judge.server())
    assert len(judge.asked) == 1, "not tried again, and no redirect is followed"


def test_one_refused_question_is_a_tie_and_all_are_an_error(judge: Judge) -> None:
    judge.reply = lambda q: 400 if "too long" in q else "A"
    said = compare(judge.server(), ["p", "too long"], ["a", "b"], ["c", "d"])
    assert said.malformed == [0.0, 1.0] and said.wins == [0.5, 0.5]
    assert len(judge.asked) == 4, "a refusal is final"
    with pytest.raises(UserError, match=r"refuses every question.*status 400.*tiny-judge"):
        compare(judge.server(), ["too long"], ["a"], ["b"])
    with pytest.raises(UserError, match="refuses every question"):
        judge.reply = lambda q: 400
        check(judge.server())


@pytest.mark.parametrize("nonsense", [b"not json", b"[]", b'{"choices": []}', b'{"choices": null}'])
def test_an_answer_that_is_no_completion_is_malformed(judge: Judge, nonsense: bytes) -> None:
    judge.reply = lambda q: nonsense
    assert compare(judge.server(), ["p"], ["a"], ["b"]).malformed == [1.0]


def test_a_server_without_a_list_of_models_needs_a_name(judge: Judge) -> None:
    for models in ({"data": []}, {"object": "list"}):
        judge.models = models
        with pytest.raises(UserError, match="lists no model.*#MODEL"):
            judge.server().ask("x")
    assert connect(f"{judge.url}#m").ask("x") == "A"


# --- keys and addresses ---------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    judge.server().ask("x")
    monkeypatch.setenv("OPENAI_API_KEY", "of OpenAI alone")
    judge.server().ask("x")
    assert key_for("https://api.openai.com/v1") == "of OpenAI alone"
    for other in ("https://api.openai.com.example.org/v1", "http://127.0.0.1:1/api.openai.com"):
        assert key_for(other) is None
    monkeypatch.setenv("PREFTUNE_JUDGE_KEY", "first")
    judge.server().ask("x")
    assert key_for("https://api.openai.com/v1") == "first"
    assert judge.keys == [None, None, "Bearer first"]


@pytest.mark.parametrize(
    "given",
    ["judge:", "judge:localhost:8000", "judge:ftp://x/v1", "judge:http://", "judge:http://x:y/"],
)
def test_no_address(given: str) -> None:
    with pytest.raises(UserError, match="judge:http://host:port/v1"):
        connect(given)


@pytest.mark.parametrize("given", ["http://me:secret@host/v1", "https://host/v1?key=secret"])
def test_no_key_in_the_address(given: str) -> None:
    with pytest.raises(UserError, match="PREFTUNE_JUDGE_KEY") as error:
        connect(given)
    assert "secret" not in str(error.value)


def test_an_address_in_full_is_understood(judge: Judge) -> None:
    for given in (f"{judge.url}/", f"judge:{judge.url}/chat/completions"):
        assert connect(given).url == judge.url


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert judge.server().ask("x") == "A"
