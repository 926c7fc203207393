"""Numbers on disk in blocks, memory-mapped; a block counts only where its checksum is right.

    meta.json     what the numbers are
    values.bin    a checksum a block (0: not filled), then the values, block after block

The checksum vouches for the values, so neither the order in which a crash loses bytes matters, nor
whether two processes write the same block at once: bytes that are neither's are seen.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preftune.durable import write_text


class Store:
    """A folder of values in blocks of known sizes."""

    def __init__(
        self, folder: Path, meta: Mapping[str, Any], counts: Sequence[int], dtype: np.dtype
    ) -> None:
        """Open the folder's values, or make room for them where it does not hold this cache whole.

        Args:
            meta: what meta.json holds.
            counts: values in each block.
        Raises:
            OSError: the folder cannot be written.
        """
        self.path = folder / "values.bin"
        self._head = 4 * (len(counts) + len(counts) % 2)
        self.start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        size = self._head + int(self.start[-1]) * dtype.itemsize
        if not (self._agrees(folder, meta) and self._size() == size):
            self._make(folder, meta, size)
        # Reads and writes go to one file, even if another process replaces it by a new one.
        self._file = open(self.path, "r+b" if os.access(self.path, os.W_OK) else "rb")
        whole = np.memmap(self._file, mode="r")
        self.checks = whole[: 4 * len(counts)].view(np.uint32)
        self.values = whole[self._head :].view(dtype)

    def _size(self) -> int | None:
        return self.path.stat().st_size if self.path.is_file() else None

    @staticmethod
    def _agrees(folder: Path, meta: Mapping[str, Any]) -> bool:
        try:
            return json.loads((folder / "meta.json").read_text(encoding="utf-8")) == meta
        except (OSError, ValueError):
            return False

    def _make(self, folder: Path, meta: Mapping[str, Any], size: int) -> None:
        """An empty cache. The old file, if any, is replaced and not cut: another process may be
        reading it."""
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".tmp-")
        with os.fdopen(handle, "wb") as out:
            out.truncate(size)
        os.replace(name, self.path)
        write_text(folder / "meta.json", json.dumps(meta, indent=1, ensure_ascii=False) + "\n")

    def _block(self, i: int) -> slice:
        return slice(int(self.start[i]), int(self.start[i + 1]))

    def holds(self, i: int) -> bool:
        """Whether block i is filled, and as it was written."""
        check = int(self.checks[i])
        return check != 0 and check == zlib.crc32(self.values[self._block(i)].data)

    def put(self, i: int, values: np.ndarray) -> None:
        """Write block i. By the file, not by the map: there a full disk ends the process.

        Raises:
            OSError: the disk is full.
        """
        span = self._block(i)
        assert len(values) == span.stop - span.start, "a block has the size that it was planned in"
        values = np.ascontiguousarray(values, self.values.dtype)
        self._file.seek(self._head + span.start * self.values.itemsize)
        self._file.write(values.data)
        self._file.seek(4 * i)
        self._file.write(np.uint32(zlib.crc32(values.data)).tobytes())
        self._file.flush()
