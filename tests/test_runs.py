"""Lines of a run folder's files, whatever a process that was killed has left of the last one."""

import json
from pathlib import Path

import pytest

from preftune.runs import RunFolder

ROWS = [{"step": 1, "text": "a\u2028b"}, {"step": 2, "text": "\u00e9"}]


@pytest.mark.parametrize("left", [1, 9, -3, -2])
def test_what_follows_a_torn_line_is_read(left: int, tmp_path: Path) -> None:
    """After the bracket, before a number, inside a character of two bytes, behind it."""
    folder, path = RunFolder(tmp_path), tmp_path / "rows.jsonl"
    folder.append(path.name, ROWS)
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + second[:left])
    assert folder.read(path.name) == ROWS[:1]
    folder.append(path.name, [{"step": 3}])
    folder.append(path.name, [{"step": 4}])
    assert folder.read(path.name) == [ROWS[0], {"step": 3}, {"step": 4}]
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == folder.read(path.name)


def test_a_whole_row_without_its_end_of_line_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"step": 1}')
    folder.append("rows.jsonl", [{"step": 2}])
    assert folder.read("rows.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_first_line_that_is_torn_leaves_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"st')
    folder.append("rows.jsonl", [{"step": 2}])
    assert folder.read("rows.jsonl") == [{"step": 2}]
