"""Every kind of source is read to the same rows, and every broken one is refused with a cure."""

import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from preftune.data import load_examples
from preftune.errors import UserError

ROWS = [
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5", "margin": 0.5},
    {"prompt": "Say «é»\nand stop", "chosen": "é", "rejected": "e, or so", "margin": 1.0},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix)
    kind = Path(path.stem).suffix if packed else path.suffix
    plain = path.parent / f"plain{kind}"
    if kind in (".jsonl", ".ndjson"):
        plain.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    elif kind == ".json":
        plain.write_text(json.dumps(rows, indent=1), "utf-8")
    elif kind == ".csv":
        with open(plain, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    data = plain.read_bytes()
    plain.unlink()
    path.write_bytes(packed(data) if packed else data)
    return path


@pytest.mark.parametrize("pack", ["", ".gz", ".xz"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, kind: str, pack: str):
    loaded = load_examples(write(tmp_path / f"data.{kind}{pack}"))
    assert loaded.kind == "pairs" and not loaded.rejected
    assert [(e.prompt, *e.responses) for e in loaded.examples] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in ROWS
    ]
    assert [e.columns for e in loaded.examples] == [{"margin": 0.5}, {"margin": 1.0}]
    assert loaded.examples[1].where == f"data.{kind}{pack}:2"


def test_where_is_the_line_though_lines_are_blank(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n" + json.dumps(ROWS[0]) + "\n\n{broken\n" + json.dumps(ROWS[1]))
    loaded = load_examples(path)
    assert [e.where for e in loaded.examples] == ["d.jsonl:2", "d.jsonl:5"]
    assert loaded.rejected[0].where == "d.jsonl:4" and loaded.rejected[0].row == "{broken"
    assert loaded.rejected[0].reason.startswith("malformed JSON: ")


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    row = {"prompt": "a\u2028b", "chosen": "c\x85d", "rejected": "e"}
    # A bare carriage return is a blank of JSON.
    path.write_text(
        json.dumps(row, ensure_ascii=False).replace(": ", ":\r") + "\r\n",
        encoding="utf-8",
        newline="",
    )
    assert load_examples(path).examples[0].responses == ("c\x85d", "e")


def test_byte_order_mark_is_no_part_of_the_data(tmp_path: Path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\n", encoding="utf-8-sig")
    assert load_examples(path).kind == "pairs"


def test_json_that_holds_lines_or_one_list(tmp_path: Path):
    lines = tmp_path / "lines.json"
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    held = tmp_path / "held.json"
    held.write_text(json.dumps({"version": 1, "data": ROWS}))
    one = tmp_path / "one.json"
    one.write_text(json.dumps(ROWS[0]))
    counts = [len(load_examples(p).examples) for p in (lines, held, one)]
    assert counts == [2, 2, 1]


def test_one_row_of_messages_in_json_is_a_row(tmp_path: Path):
    path = tmp_path / "one.json"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns, "id": "7"}))
    assert load_examples(path).examples[0].responses == ("b",)


def test_turns_in_a_csv_cell(tmp_path: Path):
    path = tmp_path / "d.csv"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows([["messages", "label"], [json.dumps(turns), "True"]])
    (example,) = load_examples(path).examples
    assert example.prompt == turns[:1] and example.columns == {"label": True}


def test_plain_text_is_prompts_only(tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_text("first\n\n second \n")
    assert [e.prompt for e in load_examples(path, want="prompts").examples] == ["first", "second"]
    with pytest.raises(UserError, match="prompts only"):
        load_examples(path, want="pairs")


def test_folder_takes_its_split(tmp_path: Path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:1])
    (tmp_path / "README.txt").write_text("not a prompt")
    assert len(load_examples(tmp_path).examples) == 2
    assert len(load_examples(tmp_path, split="test").examples) == 1
    whole = load_examples(tmp_path, split="validation")
    assert len(whole.examples) == 3 and not whole.rejected


def test_objects_in_memory_and_data_sets(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "saved"))
    split = datasets.DatasetDict({"train": table})
    for source in (ROWS, table, split, tmp_path / "saved"):
        loaded = load_examples(source)
        assert [e.responses for e in loaded.examples] == [("4", "5"), ("é", "e, or so")]
    assert load_examples(ROWS).examples[1].where == "data:2"
    with pytest.raises(UserError, match="no split 'tran' among train. Did you mean 'train'"):
        load_examples(split, split="tran")


def test_hub_id_goes_through_datasets(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, *, split: str) -> Any:
        asked.append((name, split))
        if name == "owner/gone":
            raise ConnectionError("no network\nand a page of advice")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_examples("owner/pairs", split="test").examples) == 2
    with pytest.raises(UserError, match=r"'owner/gone'.*\(no network\).*local file"):
        load_examples("owner/gone")
    assert asked == [("owner/pairs", "test"), ("owner/gone", "train")]


def test_max_rows_counts_rows_read(tmp_path: Path):
    path = write(tmp_path / "d.jsonl")
    assert len(load_examples(path, max_rows=1).examples) == 1
    with pytest.raises(UserError, match="max_rows: 0"):
        load_examples(path, max_rows=0)


WHOLE = json.dumps(ROWS[0]).encode() * 200
BROKEN = {
    "empty.jsonl": (b"", "is empty"),
    "empty.csv": (b"", "is empty"),
    "empty.json": (b" \n", "is empty"),
    "blank.jsonl": (b"\n\n", "is empty"),
    "header.csv": (b"prompt,chosen,rejected\n", "is empty"),
    "none.json": (b"[]", "is empty"),
    "data.xlsx": (b"x", r"unknown ending '\.xlsx'.*JSONL"),
    "data": (b"x", "unknown ending"),
    "zeros.jsonl": (b"\0\1\2\3" * 9, "binary data"),
    "latin.jsonl": ('{"prompt": "é"}'.encode("latin-1"), r"not UTF-8 text \(byte 0xe9\)"),
    "utf16.csv": ("prompt,chosen".encode("utf-16"), "not UTF-8 text|binary"),
    "prose.jsonl": (b"some prose\nand more\n", r"no row is an object \(prose.jsonl:1: malformed"),
    "numbers.jsonl": (b"1\n2\n", r"no row is an object \(numbers.jsonl:1: not an object: int"),
    "half.json": (b'[{"prompt": "a"}, {"pro', "malformed JSON.*whole"),
    "number.json": (b"3", "no list of objects"),
    "cut.jsonl.gz": (gzip.compress(WHOLE)[:-20], "truncated or damaged"),
    "cut.jsonl.xz": (lzma.compress(WHOLE)[:-20], "truncated or damaged"),
    "false.jsonl.gz": (WHOLE, "truncated or damaged"),
    "false.jsonl.xz": (WHOLE, "truncated or damaged"),
    "inner.jsonl.gz": (gzip.compress(WHOLE)[:30] + b"x" * 40, "truncated or damaged"),
    "false.parquet": (WHOLE, "not a whole Parquet file"),
    "false.parquet.gz": (gzip.compress(WHOLE), "not a whole Parquet file"),
    "naked.csv": (b"What is it?,this,that\nWho?,he,she\n", "Found: What is it.*names its columns"),
    "quotes.csv": (b'prompt,chosen,rejected\na,"b"x,c\n', "row 1 is not CSV"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_reason(tmp_path: Path, name: str):
    content, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"data '{path}'.*({reason})"):
        load_examples(path)


def test_no_such_file_offers_its_neighbour(tmp_path: Path):
    write(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="no such file. Did you mean 'pairs.jsonl'"):
        load_examples(tmp_path / "pair.jsonl")
    with pytest.raises(UserError, match=r"data 'missing/data.jsonl': no such file\."):
        load_examples("missing/data.jsonl")  # not taken for a Hub id


def test_folder_without_data_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no data file"):
        load_examples(tmp_path)


def test_source_of_another_type_is_refused():
    with pytest.raises(UserError, match="got int"):
        load_examples(3)


def test_a_csv_row_that_is_too_long_or_short_is_put_aside(tmp_path: Path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\nd,e,f,g\nh,i\n")
    loaded = load_examples(path)
    assert len(loaded.examples) == 1
    assert [(r.where, r.row) for r in loaded.rejected] == [
        ("d.csv:2", '["d", "e", "f", ["g"]]'),
        ("d.csv:3", '["h", "i"]'),
    ]
