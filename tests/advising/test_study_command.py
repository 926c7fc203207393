"""`preftune advise-study`, in process: draw, run, go on, refuse."""

import json
from pathlib import Path

import pytest

from preftune import cli

pytestmark = pytest.mark.long


def shrunk(folder: Path) -> None:
    """Budgets for a few updates, so that a test is quick."""
    for path in folder.glob("*.json"):
        plain = json.loads(path.read_text())
        plain |= {"budget": 200.0, "beta": 0.15, "pairs": plain["pairs"][:100]}
        path.write_text(json.dumps(plain))


@pytest.fixture
def drawn(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.run(["advise-study", "--draw", "3", "--output", "problems", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["problems"] == ["likely-0000", "unlikely-0001", "narrow-0002"]
    shrunk(here / "problems")
    return here / "problems"


@pytest.mark.slow
def test_the_shipped_rule_is_measured(drawn: Path, capsys, here: Path) -> None:
    path = sorted(drawn.glob("*.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "<script>alert(1)"}))
    args = ["advise-study", "--problems", str(drawn), "--output", "out", "--json"]
    assert cli.run(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(Path("out/advice.json").read_text())
    assert found["problems"] + len(found["apart"]) == 3
    assert {"mean_regret", "best_fixed", "best_fixed_regret", "halving_regret"} <= set(found)
    page = Path("out/advice.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    before = Path("out/runs/metrics.jsonl").read_text()
    assert cli.run(args) == 0
    capsys.readouterr()
    assert Path("out/runs/metrics.jsonl").read_text() == before, "nothing is run twice"


def test_problems_of_another_seed_base_are_not_mixed_in(here: Path, capsys) -> None:
    def draw(count: str, base: str) -> int:
        args = ["advise-study", "--draw", count, "--output", "problems"]
        return cli.run([*args, "--seed-base", base])

    assert draw("1", "7") == 0 and draw("2", "7") == 0
    before = [(p, p.read_text()) for p in sorted(Path("problems").glob("*.json"))]
    assert draw("3", "0") == 2
    assert "another seed base, --seed-base 7" in capsys.readouterr().err
    (here / "problems/seed-base.txt").unlink()
    assert draw("3", "0") == 2, "drawn by nobody knows which"
    assert [(p, p.read_text()) for p in sorted(Path("problems").glob("*.json"))] == before


def test_results_do_not_go_among_the_problems(here: Path, capsys) -> None:
    assert cli.run(["advise-study", "--draw", "1", "--output", "problems"]) == 0
    before = sorted(Path("problems").iterdir())
    args = ["advise-study", "--problems", "problems", "--output", "./problems"]
    assert cli.run(args) == 2
    assert "among which results" in capsys.readouterr().err
    assert sorted(Path("problems").iterdir()) == before


@pytest.mark.parametrize(("args", "words"), [
    ([], "--draw N"),
    (["--draw", "2", "--problems", "x"], "--draw N"),
    (["--draw", "0"], "--draw"),
    (["--problems", "nowhere"], "no .json file"),
])  # fmt: skip
def test_mistakes(args: list[str], words: str, here: Path, capsys) -> None:
    assert cli.run(["advise-study", *args]) == 2
    assert words in capsys.readouterr().err
