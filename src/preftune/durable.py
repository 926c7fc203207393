"""Files and folders that are whole or not there: a crash at any moment leaves the old or the new.

A folder is written under a name that begins with `.tmp-`; a manifest with the size and SHA-256 of
each of its files is written last; when all of it is on the disk, the folder gets its name.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_UNFINISHED = ".tmp-"
_ASIDE = f"{_UNFINISHED}old-"
_FORMAT = 1
_NOT_OURS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError,
)  # fmt: skip
"""Errors of reading what we did not write."""
_LARGEST_MANIFEST = 2**20
"""Bytes; a folder of ours has a few files."""


class Damaged(Exception):
    """What was written is not what stands there now."""


def reach(point: str) -> None:
    """A named place in the writing of a folder; tests end the process at each of them."""


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file atomically: a crash leaves the old one or the new one.

    Args:
        errors: as `open` has it, of characters that UTF-8 has no bytes for.
    """
    write_bytes(path, text.encode("utf-8", errors))


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write a file of JSON lines atomically; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_bytes(path: Path, data: bytes) -> None:
    """The same of bytes."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED)
    try:
        os.chmod(name, 0o644)  # mkstemp's files are the owner's alone
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Remove what a process that was killed left unfinished; nobody else may be writing there."""
    for aside in folder.glob(f"*/{_ASIDE}*"):  # the old one, while there was no new one yet
        target = aside.with_name(aside.name.removeprefix(_ASIDE))
        if not target.exists():
            os.replace(aside, target)
    for path in (*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"*/{_UNFINISHED}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder whole.

    Args:
        fill: writes plain files into the folder it is given.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work, aside = (target.with_name(f"{kind}{target.name}") for kind in (_UNFINISHED, _ASIDE))
    for leftover in (work, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir()
    reach("begun")
    try:
        fill(work)
        reach("filled")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in _files(work)}
        (work / MANIFEST).write_text(
            json.dumps({"format": _FORMAT, "files": files}), encoding="utf-8"
        )
        reach("listed")
        for path in (*work.iterdir(), work):
            _flush(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    reach("flushed")
    if target.exists():
        os.replace(target, aside)
        reach("aside")
    os.replace(work, target)
    reach("renamed")
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def verify(folder: Path) -> None:
    """Compare a folder with its manifest.

    Raises:
        Damaged: with the reason.
    """
    try:
        path = folder / MANIFEST
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise Damaged(f"{MANIFEST} is larger than any of ours")
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise Damaged(f"{MANIFEST} is of another format")
        files = found["files"]
        listed = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except _NOT_OURS as error:
        raise Damaged(f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    present = {p.name: p for p in _files(folder) if p.name != MANIFEST}
    if present.keys() != listed.keys():
        raise Damaged(f"files {sorted(present)} stand there, {sorted(listed)} were written")
    for name, (size, digest) in listed.items():
        if present[name].stat().st_size != size or _hash(present[name]) != digest:
            raise Damaged(f"{name} is not what was written")


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())


def _hash(path: Path) -> str:
    with open(path, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
