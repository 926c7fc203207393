"""The script of pairs of known character, on a tiny model."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from preftune.errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import strong_pairs  # noqa: E402


def judged() -> list[dict[str, str]]:
    """Eight prompts that a answered; b answered as many and lost, c one."""
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"{n}, as asked", "rejected": "no", "chosen_model": "a",
         "rejected_model": "b"}
        for n in range(8)
    ]  # fmt: skip
    other = {"chosen": "c's", "rejected": "another of a's", "chosen_model": "c"}
    return [*rows, {"prompt": "Say 0.", **other, "rejected_model": "a"}]


@pytest.fixture
def given(here: Path, tiny_model: str) -> Namespace:
    (here / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in judged()))
    return Namespace(
        data=Path("in.jsonl"), output=Path("new/out.jsonl"), model=tiny_model, writer=None,
        count=6, seed=0, max_new_tokens=6, own=None,
    )  # fmt: skip


def made(given: Namespace, **more: object) -> list[dict]:
    strong_pairs.make(Namespace(**(vars(given) | more)))
    return [json.loads(line) for line in Path("new/out.jsonl").read_text().splitlines()]


def test_the_strong_writer() -> None:
    found, won = strong_pairs.written([*judged(), "no row", {"prompt": 3}])
    assert {w: len(answers) for w, answers in found.items()} == {"a": 8, "b": 8, "c": 1}
    assert found["a"]["Say 0."] == "0, as asked", "the first one to a prompt"
    assert strong_pairs.strongest(found, won, None) == "a"
    assert strong_pairs.strongest(found, won, "c") == "c"


def test_strong_against_own(given) -> None:
    rows = made(given)
    assert 0 < len(rows) <= 6 and len({r["prompt"] for r in rows}) == len(rows)
    for row in rows:
        assert row["chosen"] == f"{row['prompt'][4]}, as asked" and row["chosen_model"] == "a"
        assert row["rejected"].strip() and isinstance(row["rejected_finished"], bool)
    assert made(given) == rows and made(given, seed=1) != rows
    assert any(not row["rejected_finished"] for row in rows), "six tokens cut most of them"


def test_own_samples_ranked(given) -> None:
    reward = (
        "def late(prompts, completions, **_):\n"
        "    return [float(ord(c[0])) if c else 0 for c in completions]\n"
    )
    Path("r.py").write_text(reward)
    rows = made(given, own="r.py:late", count=8)
    assert rows
    for row in rows:
        assert row["score_chosen"] == ord(row["chosen"][0]) > row["score_rejected"]
        assert set(row) >= {"chosen_finished", "rejected_finished"}
    assert made(given, own="length:min", count=8) == [], "all cut at one length: ties"


def test_what_it_makes_is_read_by_the_package(given, capsys) -> None:
    from preftune import cli

    rows = made(given)
    args = ["inspect", "--model", given.model, "--data", "new/out.jsonl", "--json"]
    assert cli.run(args) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["count"] == len(rows) and facts["refused"] == 0
    ends = facts["end"]
    assert ends["responses"] - ends["finished"] == sum(not r["rejected_finished"] for r in rows)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"writer": "z"}, "wrote nothing there"),
        ({"count": 0}, "Give 1 or more"),
        ({"own": "length:far"}, "is unknown"),
        ({"data": Path("nowhere.jsonl")}, "cannot be read"),
    ],
)
def test_mistakes(given, more, words) -> None:
    with pytest.raises(UserError, match=words):
        made(given, **more)
    assert not Path("new").exists()


def test_a_mistake_is_one_message(given, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["strong_pairs.py", "in.jsonl", "o.jsonl", "--writer", "z"])
    assert strong_pairs.main() == 2
    assert capsys.readouterr().err.startswith("error: writer 'z'")
