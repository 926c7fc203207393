"""The papers' critical path, with a tiny model and few steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from preftune import cli, pipeline
from preftune import config as configs
from preftune.errors import UserError

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


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the pipeline would have trained, by its data."""
    trained: list[str] = []
    monkeypatch.setattr(pipeline, "write_report", lambda runs, page, **how: page)
    monkeypatch.setattr(
        pipeline.training, "train", lambda config, **how: trained.append(config["data"])
    )
    return trained


def test_going_on_with_other_data_is_refused(pairs: str, tmp_path: Path, stages: list[str]) -> None:
    """Its stages would be taken for finished ones of the new data."""
    other, out = tmp_path / "other.jsonl", tmp_path / "out"
    other.write_text(Path(pairs).read_text().replace("Say", "Tell"))

    def run(**changes: Any) -> None:
        pipeline.run(configs.load({"data": pairs, **changes}), out)

    run()
    kept = {p: p.read_bytes() for p in (out / "data").iterdir()}
    for changes, words in (
        ({"data": str(other)}, f"data: {pairs} became {other}"),
        ({"eval_data": str(other)}, f"eval_data: None became {other}"),
        ({"max_rows": 60}, "max_rows: None became 60"),
        ({"seed": 1}, "seed: 0 became 1"),
    ):
        count = len(stages)
        with pytest.raises(UserError, match="was begun with other data") as caught:
            run(**changes)
        assert words in str(caught.value) and len(stages) == count, "nothing is run"
    assert kept == {p: p.read_bytes() for p in (out / "data").iterdir()}
    # a file that was moved is the same data; one that was edited is not
    moved = tmp_path / "moved.jsonl"
    Path(pairs).rename(moved)
    run(data=str(moved))
    moved.rename(pairs)
    Path(pairs).write_text(other.read_text())
    with pytest.raises(UserError, match="the rows of the data are others now"):
        run()


def test_a_folder_that_keeps_no_source_is_gone_on_with_where_its_rows_agree(
    pairs: str, tmp_path: Path, stages: list[str]
) -> None:
    out = tmp_path / "out"
    pipeline.run(configs.load({"data": pairs}), out)
    (out / "data" / pipeline.CUT).unlink()
    with pytest.raises(UserError, match="was begun with other data"):
        pipeline.run(configs.load({"data": pairs, "seed": 1}), out)
    pipeline.run(configs.load({"data": pairs}), out)
    assert (out / "data" / pipeline.CUT).is_file()


def test_halves_are_cut_from_so_many_rows_of_which_few_are_bad(
    pairs: str, tmp_path: Path, stages: list[str]
) -> None:
    pipeline.run(configs.load({"data": pairs, "max_rows": 64}), tmp_path / "out")
    parts = {n: rows(tmp_path / "out/data" / f"{n}.jsonl") for n in ("train", "gold", "held_out")}
    prompts = {row["prompt"] for own in parts.values() for row in own}
    assert prompts == {f"Say {i}." for i in range(32)}
    with open(pairs, "a") as out:
        out.write('{"prompt": "no answers"}\n' * 8)
    with pytest.raises(UserError, match="8 of 88 rows cannot be used, above bad_rows: 0.05"):
        pipeline.run(configs.load({"data": pairs}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    pipeline.run(configs.load({"data": pairs, "bad_rows": 0.2}), tmp_path / "other")


def test_the_plan_is_of_rows_that_there_are() -> None:
    from preftune import methods

    assert set(pipeline._plan()["methods"]) == set(NAMES) <= set(methods.table())
