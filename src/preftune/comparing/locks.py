"""Who runs a job: lock files in a folder that several machines may share.

The holder of a job is who made its file of the highest number, KEY.1, KEY.2, ... A file is made
with `O_EXCL`, so one of several who try is it, on a network's file system, too. None is ever
removed: a holder who is gone is followed by the next number. It is gone where it said so, where its
process on this machine has ended, or where it gave no sign for `SILENT` seconds.
"""

import json
import os
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune import durable
from preftune.runs import dumps

LOCKS = "locks"
BEAT = 5.0
"""Seconds between signs of life."""
SILENT = 180.0
"""Seconds without one after which a holder counts as gone."""


def this_host() -> str:
    """Where a process number means this process: this machine since it was started, and of its
    containers this one."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _begun(pid: int) -> str:
    """When a process began, which tells it from another of the same number; empty if unknown."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


@dataclass
class Lock:
    """A job that this process holds, with signs of life from a thread until it is let go of."""

    folder: Path
    key: str
    number: int
    said: dict[str, Any] = field(default_factory=dict)
    """What others may know of it: how far the job is."""
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / f"{self.key}.{self.number}"

    def lost(self) -> bool:
        """Whether somebody took it for gone and follows: a laptop that slept, say."""
        return max(_numbers(self.folder, self.key), default=0) > self.number

    def beat(self) -> None:
        """Give a sign of life now."""
        with suppress(OSError):  # a full disk, a network away: the next sign may come through
            durable.write_text(self.path, _words(self.said))

    def begin(self) -> None:
        """Give signs of life from now on; end the process where the lock is lost."""
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._end.wait(BEAT):
            if self.lost():
                os._exit(1)  # another process runs the job now: nothing of this one may be written
            self.beat()

    def release(self) -> None:
        """Let go: the job may be taken at once, if it has no result."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if not self.lost():
            durable.write_text(self.path, _words(self.said | {"released": True}))


def _words(said: dict[str, Any]) -> str:
    pid = os.getpid()
    return dumps({"host": this_host(), "pid": pid, "begun": _begun(pid), **said}) + "\n"


def acquire(folder: Path, key: str) -> Lock | None:
    """The job, where nobody has it."""
    place = folder / LOCKS
    place.mkdir(parents=True, exist_ok=True)
    number = max(_numbers(place, key), default=0)
    if number and not _is_gone(place / f"{key}.{number}"):
        return None
    lock = Lock(place, key, number + 1)
    try:
        handle = os.open(lock.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(_words({}))
    return lock


def deaths(folder: Path, key: str, before: int) -> int:
    """Holders of lower numbers that never let go: their processes died, or fell silent."""
    found = (_read(folder / LOCKS / f"{key}.{n}") for n in range(1, before))
    return sum(not said.get("released") for said in found)


def forget(folder: Path, key: str) -> None:
    """Remove a job's files, where nobody holds it."""
    for number in _numbers(folder / LOCKS, key):
        (folder / LOCKS / f"{key}.{number}").unlink(missing_ok=True)


def held(folder: Path, key: str) -> dict[str, Any] | None:
    """What the holder of a job says; None where nobody has it."""
    path = _newest(folder, key)
    return None if path is None or _is_gone(path) else _read(path)


def is_ours(folder: Path, key: str) -> bool:
    """Whether it was a process of this machine that held the job last."""
    path = _newest(folder, key)
    return path is not None and _read(path).get("host") == this_host()


def _newest(folder: Path, key: str) -> Path | None:
    number = max(_numbers(folder / LOCKS, key), default=0)
    return folder / LOCKS / f"{key}.{number}" if number else None


def _numbers(place: Path, key: str) -> list[int]:
    if not place.is_dir():
        return []
    name = re.compile(re.escape(key) + r"\.(\d+)")
    found = (name.fullmatch(entry) for entry in os.listdir(place))
    return [int(match[1]) for match in found if match]


def _read(path: Path) -> dict[str, Any]:
    """Empty where it is just being written."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _is_gone(path: Path) -> bool:
    said = _read(path)
    if said.get("released"):
        return True
    if said.get("host") == this_host():
        return not _lives(int(said["pid"]), str(said.get("begun", "")))
    return _age(path) > SILENT


def _lives(pid: int, begun: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _begun(pid) == begun


def _age(path: Path) -> float:
    """Seconds since the last sign, by the clock of the file system: machines' clocks differ."""
    now = path.parent / f".now-{os.getpid()}-{threading.get_ident()}"
    try:
        now.touch()
        os.utime(now)
        return now.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        now.unlink(missing_ok=True)
