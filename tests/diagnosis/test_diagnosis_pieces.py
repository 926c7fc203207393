"""What is measured once: pieces on disk, and what they hang on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from preftune import cli
from preftune.config import load
from preftune.diagnosis import job
from preftune.diagnosis.pieces import Pieces

pytestmark = pytest.mark.long


def answers_file(path: Path, answer: str, count: int = 8) -> None:
    """Pairs with a column that a reward may read."""
    rows = (
        {"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"no {n}", "answer": answer}
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


REWARD = """
def f(completions, answer, **_):
    return [{sign} * len(x) - len(y) for x, y in zip(completions, answer)]
"""


def figures() -> dict:
    return json.loads(Path("out/diagnosis.json").read_text())["figures"]


def test_an_edited_reward_judges_anew(here, tiny_model, capsys) -> None:
    """Its file is another one, though it is called as before."""
    answers_file(here / "d.jsonl", "x")
    args = ["diagnose", "--model", tiny_model, "--data", "d.jsonl", "--max-new-tokens", "3"]
    args += ["--reward", "my.py:f", "--output", "out", "--probe-steps", "0"]
    found = []
    for sign in ("-1", "1"):
        (here / "my.py").write_text(REWARD.format(sign=sign))
        assert cli.run(args) == 0
        found.append(figures()["reward_accuracy"]["value"])
    assert found == [1.0, 0.0], "the chosen are the shorter"


@pytest.fixture
def key(here: Path, tiny_model: str) -> Callable[..., str]:
    """What pieces hang on, by settings."""
    answers_file(here / "d.jsonl", "x")
    (here / "my.py").write_text(REWARD.format(sign="1"))
    given = {"model": tiny_model, "data": "d.jsonl", "output": "out", "max_new_tokens": 3}

    def of(**changes: object) -> str:
        return job._prepare(load(given | changes), None)[0].pieces.key

    return of


def test_pieces_hang_on_what_a_reward_reads(key, here: Path) -> None:
    plain, judged = key(), key(reward="my.py:f")
    assert plain != judged != key(reward="length:min")
    answers_file(here / "d.jsonl", "another")
    assert key() == plain, "nobody reads the column"
    assert key(reward="my.py:f") != judged


def test_pieces_hang_on_nothing_that_does_not_measure(key, here: Path, make_tiny_model) -> None:
    plain = key(reward="length:min")
    shutil.copy("d.jsonl", "held.jsonl")
    for changes in (
        {"beta": 0.4}, {"label_source": "human"}, {"eval_data": "held.jsonl"}, {"output": "other"},
        {"learning_rate": 0.1}, {"threads": 1},
    ):  # fmt: skip
        assert key(reward="length:min", **changes) == plain, changes
    other = make_tiny_model(here / "other", seed=1)
    for changes in (
        {"seed": 1}, {"max_new_tokens": 4}, {"max_rows": 4}, {"dtype": "float64"}, {"model": other},
    ):  # fmt: skip
        assert key(reward="length:min", **changes) != plain, changes


def test_a_torn_piece_is_made_again(tmp_path: Path) -> None:
    pieces, index = Pieces(tmp_path, "s"), torch.arange(2)
    made = pieces.get("a", index, lambda: {"x": torch.ones(2)})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for torn in (b"", whole[:20], whole[:-1], whole + b"0"):
        path.write_bytes(torn)
        again = pieces.get("a", index, lambda: {"x": torch.ones(2)})
        assert torch.equal(again["x"], made["x"]) and path.read_bytes() == whole
    assert pieces.found == 0
    pieces.get("a", index, lambda: {})
    assert pieces.found == 1
    other = Pieces(tmp_path, "t").get("a", index, lambda: {"x": torch.zeros(2)})
    assert not other["x"].any(), "of other settings"
