"""Rows of every shape become one shape; rows that cannot are put aside with the reason."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preftune.data import Loaded, check_bad_rows, load_examples, write_rejected
from preftune.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}
HUMAN = "\n\nHuman: hi there\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
TURNS = [user("hi there"), bot("hello"), user("more")]

SHAPES: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "text": ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", ("a", "b")),
    "text as it is": ({"prompt": " p\n", "chosen": " a", "rejected": "b "}, " p\n", (" a", "b ")),
    "lists": (
        {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b")]},
        [user("p")],
        ("a", "b"),
    ),
    "one turn": (
        {"prompt": [user("p")], "chosen": bot("a"), "rejected": bot("b")},
        [user("p")],
        ("a", "b"),
    ),
    "implicit lists": (
        {"chosen": [user("p"), bot("a")], "rejected": [user("p"), bot("b")]},
        [user("p")],
        ("a", "b"),
    ),
    "implicit, null prompt": (
        {"prompt": None, "chosen": [user("p"), bot("a")], "rejected": [user("p"), bot("b")]},
        [user("p")],
        ("a", "b"),
    ),
    "several turns": (
        {"chosen": [SYSTEM, *TURNS, bot("a")], "rejected": [SYSTEM, *TURNS, bot("b")]},
        [SYSTEM, *TURNS],
        ("a", "b"),
    ),
    "dialogue": ({"chosen": HUMAN + " yes", "rejected": HUMAN + " no \n"}, TURNS, ("yes", "no")),
    "open dialogue": ({"prompt": HUMAN, "chosen": " yes", "rejected": " no"}, TURNS, ("yes", "no")),
    "text prompt, lists": (
        {"prompt": "p", "chosen": [bot("a")], "rejected": [bot("b")]},
        [user("p")],
        ("a", "b"),
    ),
    "text prompt, whole conversations": (
        {"prompt": "p", "chosen": [SYSTEM, user("p"), bot("a")],
         "rejected": [SYSTEM, user("p"), bot("b")]},
        [SYSTEM, user("p")],
        ("a", "b"),
    ),
    "list prompt, whole conversations": (
        {"prompt": TURNS, "chosen": [*TURNS, bot("a")], "rejected": [*TURNS, bot("b")]},
        TURNS,
        ("a", "b"),
    ),
    "list prompt, conversations with system": (
        {"prompt": [user("p")], "chosen": [SYSTEM, user("p"), bot("a")],
         "rejected": [SYSTEM, user("p"), bot("b")]},
        [SYSTEM, user("p")],
        ("a", "b"),
    ),
    "prompt goes on": (
        {"prompt": [user("hi there")], "chosen": [bot("hello"), user("more"), bot("a")],
         "rejected": [bot("hello"), user("more"), bot("b")]},
        TURNS,
        ("a", "b"),
    ),
    "list prompt, text": (
        {"prompt": [user("p")], "chosen": "a", "rejected": "b"}, [user("p")], ("a", "b")
    ),
    "completion": ({"prompt": "p", "completion": "a"}, "p", ("a",)),
    "completion list": ({"prompt": [user("p")], "completion": [bot("a")]}, [user("p")], ("a",)),
    "messages": ({"messages": [*TURNS, bot("a")]}, TURNS, ("a",)),
    "prompt": ({"prompt": "p"}, "p", ()),
    "prompt list": ({"prompt": TURNS}, TURNS, ()),
    "prompt dialogue": ({"prompt": HUMAN}, TURNS, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str):
    row, prompt, responses = SHAPES[name]
    (example,) = load_examples([row]).examples
    assert (example.prompt, example.responses) == (prompt, responses)
    assert example.finished == (True,) * len(responses) and example.columns == {}
    # The same row as a source of prompts alone.
    (example,) = load_examples([row], want="prompts").examples
    assert (example.prompt, example.responses, example.finished) == (prompt, (), ())


def test_messages_that_end_in_a_question_are_prompts_only():
    rows = [{"messages": TURNS}, {"messages": [user("p"), bot("a")]}]
    assert [e.prompt for e in load_examples(rows, want="prompts").examples] == [TURNS, [user("p")]]
    loaded = load_examples(rows)
    assert len(loaded.examples) == 1 and reasons(loaded) == [
        "messages do not end in an assistant turn"
    ]


def reasons(loaded: Loaded) -> list[str]:
    return [r.reason for r in loaded.rejected]


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
REFUSED: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "not an object: list"),
    "no object": (None, "not an object: NoneType"),
    "no columns": ({"a": 1}, "no usable column: a"),
    "half a pair": ({"prompt": "p", "chosen": "a"}, "no usable column: prompt, chosen"),
    "null": ({**GOOD, "rejected": None}, "empty rejected"),
    "empty": ({**GOOD, "chosen": " \n"}, "empty chosen"),
    "empty list": ({**GOOD, "chosen": []}, "empty chosen"),
    "empty turn": ({**GOOD, "chosen": [bot("")]}, "empty chosen"),
    "empty dialogue": ({"chosen": HUMAN + " yes", "rejected": HUMAN}, "empty rejected"),
    "empty prompt": ({**GOOD, "prompt": ""}, "empty prompt"),
    "no turns": ({**GOOD, "prompt": []}, "empty prompt"),
    "no prompt in turns": ({"chosen": [bot("a")], "rejected": [bot("b")]}, "empty prompt"),
    "number": ({**GOOD, "chosen": 3}, "chosen is not text: int"),
    "bool prompt": ({**GOOD, "prompt": True}, "prompt is not text: bool"),
    "number in turn": (
        {**GOOD, "chosen": [{**bot(""), "content": 3}]},
        "chosen is not text: a turn's content is int",
    ),
    "turn without role": ({**GOOD, "chosen": [{"content": "a"}]}, "chosen has a turn without role"),
    "role": (
        {**GOOD, "prompt": [{"role": "usr", "content": "p"}]},
        "unknown role: 'usr' in prompt. Did you mean 'user'?",
    ),
    "identical": ({**GOOD, "rejected": "a"}, "chosen and rejected are identical"),
    "surrogate": ({**GOOD, "chosen": "\ud800"}, "chosen is not valid Unicode"),
    "no prompt": ({"chosen": "a x", "rejected": "a y"}, "no prompt: chosen is plain text"),
    "other prompt": (
        {"chosen": [user("p"), bot("a")], "rejected": [user("q"), bot("b")]},
        "chosen and rejected do not share a prompt",
    ),
    "other dialogue": (
        {"chosen": HUMAN + " a", "rejected": HUMAN.replace("hello", "hey") + " b"},
        "chosen and rejected do not share a prompt",
    ),
    "foreign prompt": (
        {"prompt": "q", "chosen": [user("p"), bot("a")], "rejected": [user("p"), bot("b")]},
        "the prompt is no part of the turns of chosen",
    ),
    "question last": (
        {"prompt": "q", "chosen": [user("p")], "rejected": [bot("b")]},
        "chosen does not end in an assistant turn",
    ),
    "dialogue without answer": (
        {"chosen": HUMAN + " a\n\nHuman: b", "rejected": HUMAN + " c"},
        "chosen does not end in an assistant turn",
    ),
    "answer as prompt": ({**GOOD, "prompt": [user("a"), bot("b")]}, "the prompt ends in an assis"),
    "flag": ({**GOOD, "chosen_finished": "perhaps"}, "chosen_finished is neither true nor false"),
    "margin": ({**GOOD, "margin": "wide"}, "margin is not a finite number"),
    "nan": ({**GOOD, "score_chosen": float("nan")}, "score_chosen is not a finite number"),
    "probability": ({**GOOD, "probability": 1.2}, "probability is outside 0 to 1"),
    "other kind": ({"prompt": "p"}, "not of the kind of most rows: prompts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_rows_are_put_aside(name: str):
    row, reason = REFUSED[name]
    loaded = load_examples([GOOD, row, GOOD])
    assert [e.where for e in loaded.examples] == ["data:1", "data:3"]
    (bad,) = loaded.rejected
    assert bad.reason.startswith(reason) and bad.where == "data:2" and bad.row == row


def test_label_that_is_no_label_is_refused():
    good = {"prompt": "p", "completion": "a", "label": True}
    loaded = load_examples([good, {**good, "label": "great"}, {**good, "label": None}])
    assert [e.columns for e in loaded.examples] == [{"label": True}, {"label": None}]
    assert reasons(loaded) == ["label is neither true nor false: 'great'"]


def test_a_label_of_pairs_means_nothing_and_stays():
    (example,) = load_examples([{**GOOD, "label": "helpful"}]).examples
    assert example.columns == {"label": "helpful"}


def test_flags_and_columns():
    row = {**GOOD, "rejected_finished": False, "probability": "0.75", "topic": ["x"], "id": 7}
    (example,) = load_examples([row]).examples
    assert example.finished == (True, False)
    assert example.columns == {"probability": 0.75, "topic": ["x"], "id": 7}
    row = {"prompt": "p", "completion": "a", "finished": "False"}
    assert load_examples([row]).examples[0].finished == (False,)


def test_want_narrows_what_is_accepted():
    single = {"prompt": "p", "completion": "a"}
    assert load_examples([GOOD], want="completions").kind == "pairs"
    assert load_examples([single, GOOD, single], want="completions").kind == "completions"
    assert load_examples([single, GOOD], want="pairs").kind == "pairs"
    with pytest.raises(UserError, match="no usable column. Found: prompt, completion. Wanted: ch"):
        load_examples([single], want="pairs")
    with pytest.raises(ValueError, match="want"):
        load_examples([GOOD], want="everything")


def test_prompts_are_taken_from_rows_whose_responses_are_bad():
    rows = [{**GOOD, "rejected": "a"}, {"prompt": "q"}, {"prompt": "r", "completion": "a"}]
    loaded = load_examples(rows, want="prompts")
    assert [e.prompt for e in loaded.examples] == ["p", "q", "r"] and loaded.kind == "prompts"


def test_no_usable_column_names_the_nearest():
    with pytest.raises(UserError) as error:
        load_examples([{"prompt": "p", "choosen": "a", "rejected": "b"}])
    text = str(error.value)
    assert "Found: prompt, choosen, rejected." in text and "Wanted: chosen and rejected" in text
    assert "'choosen' is not known. Did you mean 'chosen'?" in text


def test_a_source_of_bad_rows_only_says_why():
    rows = [{**GOOD, "rejected": "a"}] * 5 + [{**GOOD, "chosen": ""}]
    with pytest.raises(UserError, match=r"no row of 6.*identical: 5 \(data:1, data:2, data:3, \.+"):
        load_examples(rows)
    with pytest.raises(UserError, match="holds no row"):
        load_examples([])


def test_bad_rows_limit():
    loaded = load_examples([GOOD] * 19 + [{**GOOD, "rejected": "a"}])
    check_bad_rows(loaded, 0.05)
    with pytest.raises(UserError, match=r"1 of 20 rows.*bad_rows: 0\.04.*identical: 1 \(data:20\)"):
        check_bad_rows(loaded, 0.04)
    with pytest.raises(UserError, match="2 of 20 rows"):
        check_bad_rows(loaded, 0.05, later=loaded.rejected)


def test_rejected_rows_are_written_whole_or_not_at_all(tmp_path: Path):
    rows = [GOOD, {**GOOD, "chosen": "\ud800"}, {**GOOD, "rejected": object()}]
    path = tmp_path / "out" / "run.rejected.jsonl"
    write_rejected(load_examples(rows).rejected, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["where"], x["reason"]) for x in lines] == [
        ("data:2", "chosen is not valid Unicode"),
        ("data:3", "rejected is not text: object"),
    ]
    assert lines[0]["row"] == rows[1]

    class Bad:
        def __str__(self) -> str:
            raise RuntimeError

    broken = load_examples([GOOD, {**GOOD, "rejected": Bad()}]).rejected
    with pytest.raises(RuntimeError):
        write_rejected([*load_examples(rows).rejected, *broken], path)
    assert len(path.read_text().splitlines()) == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]


REAL = {
    "hh_helpful.jsonl.gz": (
        2352,
        {"chosen and rejected do not share a prompt": 9, "empty rejected": 4},
    ),
    "alpaca_judged.jsonl.xz": (7366, {"chosen and rejected are identical": 14}),
    "chat_pairs.jsonl": (300, {}),
}


@pytest.mark.parametrize("name", REAL)
def test_known_bad_rows_of_real_files(shared_file: Callable[[str], Path], name: str):
    rows, bad = REAL[name]
    loaded = load_examples(shared_file(name))
    assert Counter(reasons(loaded)) == bad and loaded.kind == "pairs"
    assert len(loaded.examples) == rows - sum(bad.values())
    check_bad_rows(loaded, 0.05)


def test_real_dialogues_become_turns(shared_file: Callable[[str], Path]):
    first = load_examples(shared_file("hh_helpful.jsonl.gz"), max_rows=2).examples[1]
    assert [t["role"] for t in first.prompt] == ["user", "assistant"] * 2 + ["user"]  # type: ignore[index]
    assert first.prompt[0]["content"].startswith("How can I find out")  # type: ignore[index]
    assert first.responses[0].startswith("About 150 species")
    assert not any("Human:" in text for text in first.responses)
