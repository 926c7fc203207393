"""A run folder: settings, metrics, samples, the model. Every file appears whole or not at all."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from preftune import durable, plain_yaml
from preftune.durable import write_text
from preftune.errors import UserError
from preftune.team import current


def dumps(value: Any) -> str:
    """JSON on one line; numbers that are not finite become null, as JSON has none."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


LOCK = ".lock"
"""A file of the folder that its writer holds; the system lets go of it when the process ends."""


def _end_line(lines: BinaryIO) -> None:
    """Let a JSONL file end with a line: a process that was killed, or a full disk, leaves half of
    one, which would spoil the row that is put behind it, and hide all that follow."""
    end = lines.seek(0, os.SEEK_END)
    lines.seek(max(0, end - 1))
    if lines.read(1) in (b"", b"\n"):
        return
    lines.seek(0)
    start = lines.read().rfind(b"\n") + 1
    lines.seek(start)
    try:
        json.loads(lines.read().decode())
    except ValueError:
        lines.truncate(start)
    else:
        lines.write(b"\n")  # a whole row that lacks nothing else


def unnamed(kind: str) -> Path:
    """Where a run goes that was given no folder: runs/KIND-TIME."""
    return Path(f"runs/{kind}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")


JUDGED = "judge.jsonl"
"""A judge's answers."""
_held: set[str] = set()


class RunFolder:
    """Where a run writes: the main process of it; what the others would write is the same."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a folder that already holds something, or a file."""
        if not current().main:  # which may have begun there
            return
        for place in (path, *path.parents):
            if place.is_file():
                raise UserError(f"output '{path}': '{place}' is a file. Give a folder.")
        if path.is_dir() and any(p.name != LOCK for p in path.iterdir()):
            raise UserError(
                f"output '{path}' is not empty. Give another folder, or --resume to go on with it."
            )

    @staticmethod
    @contextmanager
    def held(path: Path) -> Iterator[None]:
        """Be the only one that writes into the folder, which is made.

        What a process that was killed there did not finish is removed.

        Raises:
            UserError: another process writes there.
        """
        from filelock import FileLock, Timeout

        if not current().main:
            yield
            return
        path.mkdir(parents=True, exist_ok=True)
        place = str(path.resolve())
        lock = FileLock(path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"output '{path}': another run is writing there. "
                "Wait until it has ended, or give another folder."
            ) from None
        _held.add(place)
        try:
            durable.sweep(path)
            yield
        finally:
            _held.discard(place)
            lock.release()

    @staticmethod
    def is_busy(path: Path) -> bool:
        """Whether a run, here or in another process, is writing there."""
        from filelock import FileLock, Timeout

        if not (path / LOCK).exists():
            return False
        lock = FileLock(path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether this process is the one."""
        return str(path.resolve()) in _held

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """Make the folder and write the resolved settings."""
        folder = cls(path)
        folder.write_config(config)
        return folder

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml."""
        import yaml

        if not current().main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(
            self.path / "config.yaml",
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        )

    def read_config(self) -> dict[str, Any]:
        """config.yaml, as it was written.

        Raises:
            UserError: it holds no settings.
        """
        path = self.path / "config.yaml"
        try:
            found = plain_yaml.load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read: {error}. Restore it.") from error
        if not isinstance(found, dict):
            raise UserError(f"'{path}' holds no settings. Restore it.")
        return {str(name): value for name, value in found.items()}

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a JSONL file of the folder; a torn last line is cut off before them."""
        if not current().main:
            return
        added = "".join(dumps(row) + "\n" for row in rows).encode()
        with open(self.path / name, "a+b") as out:
            _end_line(out)
            out.write(added)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Rows of a JSONL file; a torn last line is left out."""
        path = self.path / name
        if not path.exists():
            return []
        rows = []
        # bytes: a line may be torn inside a character; and not splitlines, which also cuts at ends
        # of lines that a text may hold (U+2028)
        for line in path.read_bytes().split(b"\n"):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line.decode()))
            except ValueError:
                break
        return rows

    def cut_back(self, step: int) -> None:
        """Drop what was logged after `step`: it will be done again."""
        if not current().main:
            return
        for name in ("metrics.jsonl", "times.jsonl", "samples.jsonl", "alarms.jsonl"):
            rows = [r for r in self.read(name) if r.get("step", 0) <= step]
            # where the data ended it, they have gone on
            self._write(name, [r for r in rows if r.get("ended") != "data"])

    def drop(self, name: str, step: int) -> None:
        """Drop what a JSONL file has of a step."""
        if current().main:
            self._write(name, [r for r in self.read(name) if r.get("step") != step])

    def _write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        if (self.path / name).exists():
            write_text(self.path / name, "".join(dumps(r) + "\n" for r in rows))

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file of the folder."""
        if not current().main:
            return
        write_text(
            self.path / name, json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n"
        )

    def read_json(self, name: str) -> Any:
        """What a JSON file holds; None if there is no such file."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
