"""Files, folders, Hub data sets and objects in memory, as a stream of raw rows.

A row is whatever the source holds (an object, or something else that `formats` refuses); a line
that cannot be read is a `Malformed`. What is wrong with the file as a whole is a `UserError`.
"""

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.data.unpacking import PACKED, check_growth, open_bytes
from preftune.errors import UserError, nearest

ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
_ALIASES = {".ndjson": ".jsonl"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KNOWN = "JSONL, JSON, Parquet or CSV (each also as .gz or .xz)"


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """A line or row that could not be read."""

    reason: str
    text: str
    """What stands in the file."""


def read_rows(source: Any, *, split: str = "train") -> Iterator[tuple[str, Any]]:
    """`(where, row)` of every row of a path, folder, Hub id, data set or list, in order.

    Raises:
        UserError: the source as a whole cannot be used.
    """
    if isinstance(source, (str, Path)):
        yield from _read_named(str(source), split)
        return
    if isinstance(source, Mapping):  # a datasets.DatasetDict
        if split not in source:
            raise UserError(
                f"data: no split '{split}' among {', '.join(map(str, source))}."
                f"{nearest(split, map(str, source))}"
            )
        source = source[split]
    if not isinstance(source, Iterable):
        raise UserError(
            f"data: got {type(source).__name__}. Give a path, a Hub id, a list of objects "
            "or a datasets.Dataset."
        )
    yield from _numbered("data", source)


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", row


def _read_named(source: str, split: str) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _read_folder(path, split)
    elif path.exists():
        yield from read_file(path)
    elif _HUB_ID.fullmatch(source) and source[0] != "." and ending(path) is None:
        yield from _numbered(source, _read_hub(source, split))
    else:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"data '{source}': no such file.{nearest(path.name, beside)} "
            "Give a file, a folder, or a Hub id of the form owner/name."
        )


def _read_hub(name: str, split: str) -> Iterable[Any]:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds for a missing id or no network
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data '{name}': there is no such file or folder here, and the Hub did not give "
            f"split '{split}' of a data set of that name ({first}). Check the name and the "
            "network, or give a local file."
        ) from error


def ending(path: Path) -> str | None:
    """The kind of a data file by its name, its compression put aside; None if not known."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    last = _ALIASES.get(last, last)
    return last if last in ENDINGS else None


def _read_folder(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        from datasets import load_from_disk

        try:
            stored: Any = load_from_disk(str(folder))
        except Exception as error:  # as above: many kinds
            raise UserError(
                f"data '{folder}': a saved data set that cannot be read: {error}"
            ) from error
        yield from read_rows(stored, split=split)
        return
    places = [folder, folder / "data"]
    # A text file in a folder of data is a README more often than prompts.
    found = [
        p
        for place in places
        if place.is_dir()
        for p in sorted(place.iterdir())
        if p.is_file() and not p.name.startswith(".") and ending(p) not in (None, ".txt")
    ]
    if not found:
        raise UserError(f"data '{folder}': the folder holds no data file. Put {_KNOWN} into it.")
    named = [p for p in found if re.match(rf"{re.escape(split)}(?![a-zA-Z])", p.name)]
    for path in named or found:
        yield from read_file(path)


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """`(where, row)` of every row of one file, by the ending of its name.

    Raises:
        UserError: unknown ending, empty, truncated, not text, or not of its kind.
    """
    kind = ending(path)
    if kind is None:
        raise UserError(
            f"data '{path}': unknown ending '{''.join(path.suffixes[-2:])}'. Give {_KNOWN}, "
            "or .txt with one prompt a line."
        )
    try:
        rows = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt, ".parquet": _parquet}
        some = False
        for number, row in rows[kind](path):
            some = True
            yield f"{path.name}:{number}", row
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"data '{path}': the compressed file is truncated or damaged ({error}). Fetch it again."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"data '{path}': not UTF-8 text (byte {error.object[error.start]:#04x}). "
            f"Save it as UTF-8, or give it the ending of its kind: {_KNOWN}."
        ) from error
    except OSError as error:
        raise UserError(f"data '{path}': cannot be read: {error.strerror or error}.") from error
    if not some:
        raise UserError(f"data '{path}': the file is empty. Give a file with at least one row.")


def _text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    with open_bytes(path) as probe:
        if b"\0" in probe.read(4096):
            raise UserError(
                f"data '{path}': holds binary data, not text. Save it as UTF-8 text, or give it "
                f"the ending of its kind: {_KNOWN}."
            )
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


def parse(text: str) -> Any:
    """A line of JSON; what cannot be read is a `Malformed`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Malformed(reason=f"malformed JSON: {error}", text=text)


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, parse(line.rstrip("\n"))


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    # newline="\n": a bare carriage return is white space in JSON, not the end of a row.
    with _text(path, newline="\n") as handle:
        yield from _lines(handle)


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """A list of rows, an object that holds one such list, one row, or lines of JSON after all."""
    with _text(path) as handle:
        text = handle.read()
    if not text.strip():
        return
    whole = parse(text)
    if isinstance(whole, Malformed):
        rows = list(_lines(text.split("\n")))
        if all(isinstance(row, Malformed) for _, row in rows) or len(rows) == 1:
            raise UserError(f"data '{path}': {whole.reason}. Check that the file is whole.")
        yield from rows
        return
    if isinstance(whole, dict):
        lists = [v for v in whole.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        texts = [v for v in whole.values() if isinstance(v, str)]
        whole = lists[0] if len(lists) == 1 and not texts else [whole]
    if not isinstance(whole, list):
        raise UserError(f"data '{path}': holds no list of objects. Give a list of rows.")
    yield from enumerate(whole, 1)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(1 << 30)  # the default refuses cells above 128 KiB
    with _text(path, newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        number = 0
        try:
            for number, row in enumerate(reader, 1):
                # A line with more or fewer cells than the header is keyed, or filled, by None.
                uneven = None in row or None in row.values()
                if uneven:
                    text = json.dumps([v for v in row.values() if v is not None])
                    yield number, Malformed(reason="cells do not match the header", text=text)
                else:
                    yield number, {k: _cell(v) for k, v in row.items()}
        except csv.Error as error:
            raise UserError(
                f"data '{path}': row {number + 1} is not CSV ({error}). "
                "Check its quotes, or give JSONL."
            ) from error


def _cell(text: str) -> Any:
    """A cell; lists of turns stand in CSV as JSON, and an empty cell is a missing value."""
    if text.startswith("[{"):
        value = parse(text)
        return text if isinstance(value, Malformed) else value
    return text or None


def _txt(path: Path) -> Iterator[tuple[int, Any]]:
    with _text(path) as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield number, {"prompt": line.strip()}


_BATCH = 64
"""Rows that are unpacked at once: a page that holds one long text can hold it for each of them."""


def _check_parquet(path: Path, metadata: Any) -> None:
    """Refuse a bomb by what the file says of itself: pages, and rows of next to nothing each."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    check_growth(path, max(sum(g.total_byte_size for g in groups), metadata.num_rows))


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(path) as handle:
            packed = path.suffix.lower() in PACKED
            file = parquet.ParquetFile(pyarrow.BufferReader(handle.read()) if packed else path)
            _check_parquet(path, file.metadata)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, pyarrow.ArrowInvalid) as error:
        raise UserError(
            f"data '{path}': not a whole Parquet file ({str(error).splitlines()[0]}). "
            "Fetch it again."
        ) from error
