"""The quickstart as a user runs it, on the default model (slow), and its table."""

import io
import json
import time

import pytest

from preftune import quickstart
from preftune.errors import UserError


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="no quickstart"):
        quickstart._clear(tmp_path)
    assert (tmp_path / "mine.txt").exists()


def test_an_earlier_quickstart_is_replaced(tmp_path):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "config.yaml").write_text("method: reference\n")
    quickstart._clear(tmp_path)
    assert not tmp_path.exists()


def test_cells_show_intervals_and_gaps():
    figure = {"value": -1.5, "low": -2.0, "high": -1.0}
    names, ((method, *cells),) = quickstart.cells(
        [{"method": "x", "reward": figure, "length": {"value": 3.0, "low": None, "high": None},
          "seconds": 12.3}]
    )  # fmt: skip
    row = dict(zip(names[1:], cells, strict=True))
    assert method == "x" and row["reward"] == "-1.50 [-2.00, -1.00]"
    assert row["tokens"] == "3.0" and row["win rate"] == "–" and row["seconds"] == "12"


@pytest.mark.slow
def test_quickstart(tmp_path):
    from rich.console import Console

    began = time.perf_counter()
    rows = quickstart.run(tmp_path / "q", Console(file=io.StringIO()))
    by_name = {r["method"]: r for r in rows}
    assert list(by_name) == ["reference", "pref_ft", "dpo", "hypo"]
    # paired by prompt: twelve updates in bfloat16 gain less than what prompts differ by
    assert all(by_name[name]["reward_gain"]["low"] > 0 for name in quickstart.METHODS)
    for name in quickstart.METHODS:
        assert (tmp_path / "q" / name / "model" / "model.safetensors").exists()
        steps = [json.loads(r) for r in (tmp_path / "q" / name / "metrics.jsonl").open()]
        assert [s["step"] for s in steps] == list(range(13))
    assert (tmp_path / "q" / "report.html").stat().st_size > 1e6
    print(f"quickstart took {time.perf_counter() - began:.0f} s")
