"""Compressed files, read with an eye on what they grow to: a megabyte can hold a terabyte."""

import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preftune.errors import UserError

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
RATIO = 200
"""Text shrinks to a tenth or a twentieth."""
FREE = 2**26
"""Bytes that may come of any file."""


def open_bytes(path: Path) -> Any:
    """A file's bytes, unpacked where its name says that it is packed.

    Raises:
        UserError: while it is read, that it grows beyond what text does.
    """
    opener = PACKED.get(path.suffix.lower())
    if opener is None:
        return open(path, "rb")
    return io.BufferedReader(_Watched(opener(path, "rb"), path), 2**16)


def check_growth(path: Path, size: int) -> None:
    """Refuse a file of which so many bytes have come.

    Raises:
        UserError: it is no data.
    """
    packed = path.stat().st_size
    if size > FREE and size > RATIO * packed:
        raise UserError(
            f"data '{path}': its {packed} bytes grow to {size} or more, {RATIO} times as many, as "
            "no text does: a decompression bomb, or nothing but repetition. Unpack it by hand if "
            "you trust it."
        )


class _Watched(io.RawIOBase):
    """Counts what is read."""

    def __init__(self, inside: Any, path: Path) -> None:
        self.inside, self.path, self.size = inside, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.inside.read(len(buffer))
        buffer[: len(data)] = data
        self.size += len(data)
        check_growth(self.path, self.size)
        return len(data)

    def close(self) -> None:
        self.inside.close()
        super().close()
