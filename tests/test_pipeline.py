"""The papers' critical path, with a tiny model and few steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from preftune import cli, pipeline

pytestmark = pytest.mark.long

NAMES = ("ppo", "hypo", "on_policy_dpo")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Two pairs to each of forty prompts."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {i}.", "chosen": "yes" * (1 + k), "rejected": "no" * (3 + k)}
        for i in range(40) for k in range(2)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_whole_path(tiny_model: str, pairs: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    args = ["pipeline", "--model", tiny_model, "--data", pairs, "--output", str(out), "--json",
            "--max-steps", "2", "--batch-size", "4", "--max-new-tokens", "4", "--device", "cpu",
            "--dtype", "float32"]  # fmt: skip
    assert cli.run(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(NAMES)
    assert all(any(k.startswith("reward:") for k in of) for of in found.values()), "a gold reward"
    train, gold, held_out = (
        {r["prompt"] for r in rows(out / "data" / f"{n}.jsonl")}
        for n in ("train", "gold", "held_out")
    )
    assert not train & gold and not (train | gold) & held_out and len(held_out) == 10
    assert len(rows(out / "data/train.jsonl")) == 2 * len(train), "prompts stay whole"
    for name in NAMES:
        config = (out / name / "config.yaml").read_text()
        assert "label_source: rm_same" in config and f"model: {out / 'sft' / 'model'}" in config
    page = (out / "report.html").read_text()
    assert "Gold reward against KL" in page and 'href="gold/report.html"' in page
    # stages that are finished are not run again
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/metrics.jsonl")}
    assert len(before) == 6 and cli.run(args) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_too_few_pairs(tiny_model: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    args = ["pipeline", "--model", tiny_model, "--data", str(path), "--output", str(tmp_path / "o")]
    assert cli.run(args) == 2
    assert "too few to learn two rewards" in capsys.readouterr().err


def test_the_plan_is_of_rows_that_there_are() -> None:
    from preftune import methods

    assert set(pipeline._plan()["methods"]) == set(NAMES) <= set(methods.table())
